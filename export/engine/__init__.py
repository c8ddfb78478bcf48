"""ONNX to engines: a bundle's graphs in TensorRT's variant, built for GPUs that need not be here."""
