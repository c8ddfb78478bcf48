"""TensorRT engines of a bundle: its graphs in TensorRT's variant, built for GPUs that need not be present."""
