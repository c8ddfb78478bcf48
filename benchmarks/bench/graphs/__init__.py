"""ONNX graphs of GPT-2 that peers run, written by hand, and where this project's own graphs lie."""
