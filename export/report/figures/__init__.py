"""One picture per family of what the model does, drawn from the bundle's own graph."""
