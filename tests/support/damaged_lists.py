"""Lists of operators with small damages, executed where they are accepted: what bad luck or an attacker would write."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np

from json_mutations import mutated
from native_graphs import LIST, Files
from operator_lists import DECODER, ENCODER, HEADS, SIZE, VISION, WORDS, decoder_list, encoder_list, vision_list
from transom.runtime.errors import TransomError
from transom.runtime.graph_spec import Graph, shape_of
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.native.backend import NativeBackend
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.operator_list import list_to_json

MADE = {"encoder": (encoder_list, ENCODER), "decoder": (decoder_list, DECODER), "vision": (vision_list, VISION)}
WHOLE = {name: (list_to_json(made()[0]), made()[1], graph) for name, (made, graph) in MADE.items()}


def feeds_of(name: str, rng: Random) -> dict[str, Any]:
    """Inputs that the undamaged list takes, of a few rows and tokens."""
    rows, length = rng.randint(1, 3), rng.randint(1, 9)
    ids = np.array([[rng.randrange(WORDS) for _ in range(length)] for _ in range(rows)])
    if name == "vision":
        return {"pixel_values": np.ones((rows, 3, 4, 6), np.float32)}
    if name == "encoder":
        return {"input_ids": ids, "attention_mask": np.array([[rng.randrange(2)] * length for _ in range(rows)])}
    caches = {key: np.zeros((rows, HEADS, length + 2, SIZE), np.float32) for key in ("key_cache.0", "value_cache.0")}
    places = np.array([rng.randrange(3) for _ in range(rows)])
    return {"input_ids": ids, "write_indices": places, "logits_positions": np.zeros((rows, 1), np.int64), **caches}


def shapes_of(graph: Graph, feeds: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        for axis, size in zip(tensor.shape, feeds[tensor.name].shape, strict=True):
            if isinstance(axis, str):
                sizes[axis] = size
    return {each.name: shape_of(each, sizes) for each in graph.outputs if each.aliases is None}


def run_damaged(rng: Random, library: NativeLibrary) -> str | None:
    """Damage a list and run it; return the error on one line, None where it was accepted and gave all outputs."""
    name = rng.choice(list(WHOLE))
    whole, weights, graph = WHOLE[name]
    value = mutated(whole, rng, [each for each, _, _ in WHOLE.values()], most=rng.randint(1, 3))
    files = Files({LIST: json.dumps(value).encode(), "model.weights": weights})
    try:
        backend = NativeBackend(
            GraphFile(graph, {"native": LIST}, "model.weights"), files, 1 + rng.randrange(2), library
        )
        feeds = feeds_of(name, rng)
        shapes = shapes_of(graph, feeds)
        found = backend.run(feeds, shapes)
    except TransomError as error:
        return str(error)
    assert {key: array.shape for key, array in found.items()} == shapes
    return None
