"""A trained model at work: loading, cached generation, `microtron generate`, `microtron chat`."""
