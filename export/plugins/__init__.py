"""The attention kernel for shapes that TensorRT has no fused kernel of: Triton source, PTX, TensorRT plugin."""
