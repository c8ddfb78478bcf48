"""Libraries that execute a bundle's graphs, ONNX Runtime and TensorRT, and the GPU below them."""
