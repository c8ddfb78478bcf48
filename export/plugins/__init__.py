"""Kernels of our own, for what TensorRT has none."""
