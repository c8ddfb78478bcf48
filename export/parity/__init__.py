"""Compare what ships with PyTorch in FP32: cases, inputs, backends, the comparison and what is recorded of it."""
