"""Run a Transformer in OpenVINO: this project's FP32 graphs with a cache that grows, kept as its state.

OpenVINO has no TensorScatter, by which the decoder's graph writes its caches in place: it is read as a Concat behind
the rows that the beams go on from. Search is written here, greedy or by beams of one length: no hypothesis ends early.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.graphs.names import canonical_graphs
from bench.paths import Paths
from bench.session import Arrays, Calls
from bench.workloads import Workload

START, END = 31999, 0  # the checkpoint's decoder_start_token_id and eos_token_id
ROWS = "beam_idx"  # input: which row of the state each beam goes on from
CACHE_LENGTH = 2  # axis of a cache, (B, N, C, H)
LOWEST = -1e9


def encoder(paths: Paths) -> Any:
    """Return the encoder's model."""
    import openvino

    return openvino.Core().read_model(canonical_graphs("transformer", paths)["encoder"])


def decoder(paths: Paths) -> Any:
    """Return the decoder's model, whose caches are inputs and outputs still."""
    import openvino
    from openvino import opset13 as ops
    from openvino.frontend.onnx import ConversionExtension

    def joined(node: Any) -> Any:
        return ops.concat([node.get_input(0), node.get_input(1)], CACHE_LENGTH).outputs()

    core = openvino.Core()
    core.add_extension(ConversionExtension("TensorScatter", joined))
    model = core.read_model(canonical_graphs("transformer", paths)["decoder"])
    rows = ops.parameter([-1], np.int64, name=ROWS)
    rows.output(0).set_names({ROWS})
    written = {name: model.output(f"{name}.written").get_node().input_value(0).get_node() for name in caches(model)}
    length = written["key_cache.0"].output(0)
    for name, concat in written.items():
        cache = model.input(name)
        for reader in cache.get_target_inputs():
            if reader.get_node().get_type_name() == "ShapeOf":  # the buffer's length, which the mask is as long as
                reader.replace_source_output(length)
        concat.input(0).replace_source_output(ops.gather(cache, rows, np.int64(0)).output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
    return model


def caches(model: Any) -> list[str]:
    return [value.any_name for value in model.inputs if "_cache." in value.any_name]


def with_state(model: Any, beams: int) -> Any:
    """Make the caches of ``beams`` rows the model's state, empty at first."""
    from openvino import _offline_transformations

    names = caches(model)
    for name in names:
        shape = model.input(name).partial_shape
        model.input(name).get_node().set_partial_shape(type(shape)([beams, *list(shape)[1:]]))
    model.validate_nodes_and_infer_types()
    pairs = {name: f"{name}.written" for name in names}
    _offline_transformations.apply_make_stateful_transformation(model, pairs)
    return model


def session(encoder: Any, decoder: Any, workload: Workload, inputs: Arrays) -> Calls:
    """Return the calls on two compiled models."""
    import openvino

    reading, writing = encoder.create_infer_request(), decoder.create_infer_request()
    crossing = [value.any_name for value in encoder.outputs if value.any_name.startswith("cross_")]
    beams = workload.beams
    writing.set_tensor("attention_mask", openvino.Tensor(np.repeat(inputs["attention_mask"], beams, axis=0)))

    def generate(new: int) -> Any:
        reading.infer({name: inputs[name] for name in ("input_ids", "attention_mask")})
        for name, array in {name: reading.get_tensor(name).data for name in crossing}.items():
            writing.set_tensor(name, openvino.Tensor(np.repeat(array, beams, axis=0)))
        writing.reset_state()
        scores = np.array([0.0] + [LOWEST] * (beams - 1), np.float32)
        tokens, rows = np.zeros((beams, 0), np.int64), np.arange(beams)
        last = np.full((beams, 1), START)
        for step in range(new):
            at = {"write_indices": np.full(beams, step), "logits_positions": np.zeros((beams, 1), np.int64)}
            writing.infer({"decoder_input_ids": last, ROWS: rows, **at})
            logits = writing.get_tensor("logits").data[:, 0]
            rows, chosen, scores = best(logits, scores)
            tokens = np.concatenate([tokens[rows], chosen[:, None]], axis=1)
            last = chosen[:, None]
        return tokens[int(scores.argmax())]

    return Calls(workload, generate=generate)


def best(logits: Any, scores: Any) -> tuple[Any, Any, Any]:
    """Return the rows that the best continuations go on from, their tokens, and their scores; END is never chosen."""
    beams, vocabulary = logits.shape
    logits = logits.copy()
    logits[:, END] = -np.inf
    if beams == 1:
        return np.zeros(1, np.int64), logits.argmax(1), scores
    top = logits.max(1, keepdims=True)
    total = (scores[:, None] + logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))).ravel()
    found = np.argpartition(total, -beams)[-beams:]
    return found // vocabulary, found % vocabulary, total[found]
