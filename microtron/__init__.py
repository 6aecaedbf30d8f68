"""microtron: pretrain a small sparse language model, on a laptop or on a cluster.

Importing the package does no work; every room is imported where it is used.
"""

__version__ = "0.1.0"
