"""Lower ONNX graphs to lists of fused operators, which the native library executes in place of ONNX Runtime."""
