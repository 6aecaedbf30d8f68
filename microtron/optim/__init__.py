"""Optimizers, which parameters they take, and the balancing of experts."""
