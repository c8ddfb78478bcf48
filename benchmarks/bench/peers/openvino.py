"""OpenVINO on this project's FP32 graphs: FP32, BF16, and INT8 by NNCF, fixed to the workload's shape.

Encoders: NNCF's post-training quantisation for Transformers, on the samples that every quantiser gets. GPT-2: a graph
of standard operators with a cache that grows (graphs/gpt.py), made stateful as OpenVINO's own exporters do; its INT8 is
NNCF's 8-bit compression of the weights, which OpenVINO multiplies with dynamically quantised activations. A
Transformer's is the same; its graphs and search are in openvino_translation.py.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.paths import Paths
from bench.peers import openvino_translation as translation
from bench.session import Arrays, Calls
from bench.workloads import GENERATION, THREADS, TRANSLATION, WORKLOADS, Workload

TRANSFORMER = {"encoder": translation.encoder, "decoder": translation.decoder}
OUTPUTS = {"bert": "last_hidden_state", "vit": "logits"}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("openvino", "nncf")}


def prepare(variant: str, model: str, paths: Paths) -> str:
    """Write NNCF's models; the others are read from the FP32 graph each time."""
    import openvino

    if "int8" not in variant:
        return "this project's FP32 graph" if model != "gpt" else "a graph with a growing cache"
    import nncf

    parts = {workload.part for workload in WORKLOADS.values() if workload.model == model}
    for part in sorted(TRANSFORMER if model == "transformer" else parts):
        source = read(model, part, paths)
        if model in ("gpt", "transformer"):
            made, note = nncf.compress_weights(source, mode=nncf.CompressWeightsMode.INT8_ASYM), "weights, INT8_ASYM"
        else:
            samples = calibration(source, model, paths)
            made = nncf.quantize(
                source, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
            )
            note = f"nncf.quantize, TRANSFORMER, {len(samples)} samples"
        target = quantized(model, part, paths)
        target.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(made, target, compress_to_fp16=False)
    return note


def quantized(model: str, part: str, paths: Paths) -> Path:
    return paths.peer("openvino") / f"{model}{part}-int8.xml"


def read(model: str, part: str, paths: Paths) -> Any:
    """Return the FP32 model."""
    import openvino

    core = openvino.Core()
    if model == "transformer":
        return TRANSFORMER[part](paths)
    if model == "gpt":
        from openvino import _offline_transformations

        from bench.graphs.names import plain_gpt

        found = core.read_model(plain_gpt(paths))
        pairs = {f"past.{i}.{kind}": f"present.{i}.{kind}" for i in range(12) for kind in ("key", "value")}
        _offline_transformations.apply_make_stateful_transformation(found, pairs)
        return found
    from bench.graphs.names import canonical

    return core.read_model(canonical(model, part, paths))


def calibration(source: Any, model: str, paths: Paths) -> list[Arrays]:
    """Return the calibration samples, one row each, with the inputs that the graph has."""
    data = dict(np.load(paths.calibration(model)))
    if "input_ids" in data:
        data.setdefault("attention_mask", np.ones_like(data["input_ids"]))
        data["token_type_ids"] = np.zeros_like(data["input_ids"])
    wanted = [value.any_name for value in source.inputs]
    return [{name: data[name][row : row + 1] for name in wanted} for row in range(16)]


def open_session(variant: str, workload: Workload, inputs: Arrays, paths: Paths) -> Calls:
    import openvino

    core = openvino.Core()

    def model_of(part: str) -> Any:
        if "int8" in variant:
            return core.read_model(quantized(workload.model, part, paths))
        return read(workload.model, part, paths)

    settings = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if "bf16" in variant else "f32",
    }
    if workload.kind == TRANSLATION:
        models = model_of("encoder"), translation.with_state(model_of("decoder"), workload.beams)
        return translation.session(*(core.compile_model(each, "CPU", settings) for each in models), workload, inputs)
    model = model_of(workload.part)
    if workload.kind == GENERATION:
        return generation(core.compile_model(model, "CPU", settings), workload, inputs)
    feeds = {"token_type_ids": np.zeros_like(inputs["input_ids"]), **inputs} if "input_ids" in inputs else inputs
    names = [value.any_name for value in model.inputs]
    model.reshape({name: list(feeds[name].shape) for name in names})
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for name in names:
        request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(feeds[name])))
    wanted = OUTPUTS.get(workload.model, f"{workload.part}_embeds")

    def run() -> Any:
        request.infer()
        return request.get_tensor(wanted).data

    return Calls(workload, run=run)


def generation(compiled: Any, workload: Workload, inputs: Arrays) -> Calls:
    """Return a greedy loop over the stateful model."""
    request = compiled.create_infer_request()
    ids = inputs["input_ids"]

    def logits_of(tokens: Any, start: int) -> Any:
        request.infer({"input_ids": tokens, "positions": np.arange(start, start + tokens.shape[1])[None]})
        return request.get_tensor("logits").data[0]

    def generate(new: int) -> Any:
        request.reset_state()
        tokens = [int(logits_of(ids, 0).argmax())]
        while len(tokens) < new:
            tokens.append(int(logits_of(np.array([[tokens[-1]]]), ids.shape[1] + len(tokens) - 1).argmax()))
        return tokens

    def logits() -> Any:
        request.reset_state()
        return logits_of(ids, 0).copy()

    return Calls(workload, generate=generate, logits=logits)
