"""ONNX Runtime on a GPT-2 graph laid out by hand for it (graphs/gpt.py), a loop of IOBinding on caches in place.

INT8: ``quantize_dynamic`` per channel on every MatMul, or MatMulNBits (blocks of 32, accuracy level 4) of 8 or 4 bits.
"""

from __future__ import annotations

import contextlib
import io
import logging
from importlib.metadata import version
from typing import Any

import numpy as np

from bench.graphs.names import fused_gpt, plain_gpt
from bench.paths import Paths
from bench.peers.onnxruntime import ask_for_exact_sums
from bench.session import Arrays, Calls
from bench.workloads import THREADS, Workload

BLOCK, ACCURACY = 32, 4
LAYERS, HEADS, HEAD, VOCABULARY = 12, 12, 64, 50257


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnxruntime", "onnx")}


def prepare(variant: str, model: str, paths: Paths) -> str:
    import onnx

    from bench.graphs import gpt

    target = fused_gpt(variant.removesuffix("-saturating"), paths)
    fp32 = fused_gpt("fp32", paths)
    if not fp32.exists() or variant == "fp32":
        weights = gpt.weights_of(paths.checkpoint(model))
        gpt.write(gpt.plain(weights), plain_gpt(paths))
        gpt.write(gpt.fused(weights), fp32)
    target.parent.mkdir(parents=True, exist_ok=True)
    if variant == "dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with contextlib.redirect_stdout(io.StringIO()):
            quantize_dynamic(
                fp32, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )  # fmt: skip
    elif variant.startswith("nbits"):
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        settings = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY, bits=int(variant.removeprefix("nbits"))
        )
        logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
        quantizer = MatMulNBitsQuantizer(onnx.load(fp32), algo_config=settings)
        quantizer.process()
        gpt.write(quantizer.model.model, target)
    return f"graphs/gpt.py, {variant}"


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    if variant == "dynamic":
        ask_for_exact_sums(options)
    path = fused_gpt(variant.removesuffix("-saturating"), paths)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = inputs["input_ids"]
    decoder = Decoder(onnxruntime, session, ids.shape[1] + workload.new)
    return Calls(workload, generate=lambda new: decoder.generate(ids, new), logits=lambda: decoder.step(ids, 0).copy())


class Decoder:
    """A session with its caches; ``step`` reads tokens from a position on and returns the last one's logits."""

    def __init__(self, library: Any, session: Any, capacity: int) -> None:
        self._library, self._session = library, session
        self._binding = session.io_binding()
        self._logits = np.empty((1, VOCABULARY), np.float32)
        shape = (1, HEADS, capacity, HEAD)
        for i in range(LAYERS):
            for kind in ("key", "value"):
                cache = library.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self._binding.bind_ortvalue_input(f"past.{i}.{kind}", cache)
                self._binding.bind_ortvalue_output(f"present.{i}.{kind}", cache)
        self._bind(self._binding.bind_output, "logits", self._logits)

    def step(self, ids: Any, start: int) -> Any:
        end = start + ids.shape[1]
        feeds = {
            "input_ids": np.ascontiguousarray(ids),
            "positions": np.arange(start, end, dtype=np.int64)[None],
            "seqlens_k": np.array([end - 1], np.int32),
            "total": np.array(end, np.int32),
        }
        for name, array in feeds.items():
            self._bind(self._binding.bind_input, name, array)
        self._session.run_with_iobinding(self._binding)
        return self._logits[0]

    def generate(self, ids: Any, new: int) -> list[int]:
        tokens = [int(self.step(ids, 0).argmax())]
        while len(tokens) < new:
            tokens.append(int(self.step(np.array([[tokens[-1]]]), ids.shape[1] + len(tokens) - 1).argmax()))
        return tokens

    def _bind(self, to: Any, name: str, array: Any) -> None:
        to(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
