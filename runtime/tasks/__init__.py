"""What a loaded bundle can be asked for: one file per family."""
