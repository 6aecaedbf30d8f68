"""The model: single-device PyTorch. It knows nothing of meshes, configs or training."""
