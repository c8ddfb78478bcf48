"""How a PyTorch definition becomes an artefact: ONNX, passes, parity, the bundle."""
