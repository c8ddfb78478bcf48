"""ONNX Runtime on this project's own FP32 graphs: as they are, and by its own quantisers.

Dynamic: ``quantize_dynamic`` on MatMul and Gemm alone (of an opset-23 ``Attention`` it would make an invalid graph),
per channel. Static: ``quantize_static`` as its documentation advises for this processor, U8 activations, S8 weights per
channel, min-max. Where U8 x S8 saturates, sessions ask for exact sums, and ``-saturating`` ones do not.
Decoders run by this project's runtime with these graphs in place of the bundle's.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.graphs.names import canonical, canonical_graphs
from bench.paths import Paths
from bench.peers import transom
from bench.session import Arrays, Calls
from bench.workloads import ENCODER, THREADS, Workload

LINEARS = ["MatMul", "Gemm"]


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnxruntime", "onnx")}


def prepare(variant: str, model: str, paths: Paths) -> str:
    """Quantise every graph of the FP32 bundle."""
    kind = variant.removesuffix("-saturating")
    if kind == "fp32" or kind != variant:
        return "this project's FP32 graph"
    quantize = {"dynamic": quantized_dynamically, "static": quantized_statically}[kind]
    logging.getLogger().setLevel(logging.ERROR)
    for name, graph in canonical_graphs(model, paths).items():
        target = graph_file(kind, model, name, paths)
        target.parent.mkdir(parents=True, exist_ok=True)
        plain = target.with_name(f"{name}-fp32.onnx")
        with_weights_inside(graph, plain)
        with contextlib.redirect_stdout(io.StringIO()):
            quantize(plain, target, model, paths)
        plain.unlink()
    return f"onnxruntime.quantization, {kind}, {' and '.join(LINEARS)}, per channel"


def graph_file(kind: str, model: str, name: str, paths: Paths) -> Path:
    return paths.peer("onnxruntime") / f"{model}-{kind}" / f"{name}.onnx"


def with_weights_inside(graph: Path, target: Path) -> None:
    import onnx

    onnx.save(onnx.load(graph), target)


def quantized_dynamically(graph: Path, target: Path, model: str, paths: Paths) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        graph, target, op_types_to_quantize=LINEARS, per_channel=True, weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def quantized_statically(graph: Path, target: Path, model: str, paths: Paths) -> None:
    import numpy as np
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    session = InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    wanted = [given.name for given in session.get_inputs()]
    data = dict(np.load(paths.calibration(model)))
    data.setdefault("attention_mask", np.ones_like(data.get("input_ids", np.zeros((16, 1), np.int64))))
    data.setdefault("token_type_ids", np.zeros_like(data["attention_mask"]))
    samples = [{name: data[name][row : row + 1] for name in wanted} for row in range(len(data["attention_mask"]))]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(samples)

        def get_next(self) -> Any:
            return next(self._left, None)

    quantize_static(
        graph, target, Reader(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=LINEARS, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    kind, model = variant.removesuffix("-saturating"), workload.model
    known = canonical_graphs(model, paths)
    files = known if kind == "fp32" else {name: graph_file(kind, model, name, paths) for name in known}
    exact = kind != "fp32" and kind == variant
    if workload.kind != ENCODER:
        return decoder_session(files, exact, workload, inputs, paths)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    if exact:
        ask_for_exact_sums(options)
    name = canonical(model, workload.part, paths)
    path = next(files[key] for key, file in known.items() if file == name)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {given.name for given in session.get_inputs()}
    feeds = {key: array for key, array in with_types(inputs).items() if key in wanted}
    output = {"bert": "last_hidden_state", "vit": "logits", "clip": f"{workload.part}_embeds"}[model]
    return Calls(workload, run=lambda: session.run([output], feeds)[0])


def ask_for_exact_sums(options: Any) -> None:
    """Set what makes 8-bit sums exact on this processor: nothing where they are, for there it doubles the time."""
    from transom.runtime.backends.integer_sums import integer_sums

    for key, setting in integer_sums().entries.items():
        options.add_session_config_entry(key, setting)


def with_types(inputs: Arrays) -> Arrays:
    import numpy as np

    return {"token_type_ids": np.zeros_like(inputs["input_ids"]), **inputs} if "input_ids" in inputs else inputs


def decoder_session(files: dict[str, Path], exact: bool, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    """Return calls on the bundle's runtime around these graphs."""
    from transom.runtime.backends.ort import OrtBackend
    from transom.runtime.bundle import Bundle
    from transom.runtime.loading import load_with_backends
    from transom.runtime.manifest_graphs import PRODUCTS, GraphFile

    bundle = Bundle(paths.bundle(transom.PEER, workload.model, "fp32"))
    integers = PRODUCTS if exact else None
    backends = {}
    for file in bundle.manifest.graphs:
        path = files[file.graph.name]
        given = GraphFile(file.graph, {"default": path.name}, None, integers=integers)
        backends[file.graph.name] = OrtBackend(given, reader_of(path.parent), "cpu", THREADS)
    return transom.session_of(load_with_backends(bundle, backends), workload, inputs)


def reader_of(folder: Path) -> Callable[[str], bytes]:
    return lambda name: (folder / name).read_bytes()
