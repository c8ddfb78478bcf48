"""Models: definitions in PyTorch, checkpoints, and the registry of families."""
