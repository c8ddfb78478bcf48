"""ONNX to engines: a bundle's graphs in TensorRT's flavour, built for GPUs that need not be here."""
