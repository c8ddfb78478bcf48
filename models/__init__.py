"""What a model is: definitions in PyTorch, checkpoints, and the registry of families."""
