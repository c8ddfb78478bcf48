"""Run lists of fused operators with kernels of our own: what a list says, the library, and the backend of a bundle."""
