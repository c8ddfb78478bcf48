"""Model repositories of Triton Inference Server, written without torch, onnx or a GPU.

config      ModelConfig in protobuf's text format
models      the models that a bundle gives, by kind
repository  bundles -> models around the runtime, and ONNX files
plans       engines of full TensorRT -> models, for `transom build --repository`
"""
