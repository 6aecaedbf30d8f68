"""How a model is spread: functions from model to model. Only this room knows meshes."""
