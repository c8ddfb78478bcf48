"""Requests that any operation of a served bundle takes, made from its inputs. Needs numpy, Pillow and the runtime."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from transom.runtime.errors import InputError
from transom.runtime.feeds import complete_sizes
from transom.runtime.graph_spec import Graph, shape_of
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.ports import Array
from transom.runtime.serving.service import Request
from transom.runtime.serving.tasks import task_operation
from transom.runtime.session import LoadedBundle

WORDS = ("the", "people", "city", "him", "a")


def task_or_none(bundle: LoadedBundle) -> Operation | None:
    """Return the operation of the bundle's task; None where it takes tensors only."""
    try:
        return task_operation(bundle)
    except InputError:
        return None


def request_for(operation: Operation, seed: int, *, rows: int = 1, images: int = 1) -> Request:
    """Return a request of one length of texts for each seed; where the operation generates, of three new tokens."""
    rng = np.random.default_rng(seed)
    inputs = {
        port.name: array
        for port in operation.inputs
        if (array := input_of(port.name, rng, rows, images, 1 + seed % 3)) is not None
    }
    if any(port.name == "mask" for port in operation.outputs):
        inputs["text"] = of_bytes([[row[0][:2] + b"[MASK]"] for row in inputs["text"]])
    return Request(inputs, {"max_new_tokens": 3} if operation.stream else {})


def input_of(name: str, rng: np.random.Generator, rows: int, images: int, words: int) -> Array | None:
    if name == "image":
        return of_bytes([[png(rng) for _ in range(images)] for _ in range(rows)])
    if name == "input_ids":
        return rng.integers(1, 5, (rows, 1 + words))
    if name == "candidate_label":
        return of_bytes([[b"the", b"city"]] * rows)
    if name in ("text", "question", "context", "following"):
        return of_bytes([[" ".join(rng.choice(WORDS, words)).encode()] for _ in range(rows)])
    if name in ("pair", "template"):
        return None  # both may be left out
    raise AssertionError(f"no example of the input {name}")


def tensors_for(bundle: LoadedBundle, graph: Graph, seed: int, rows: int = 1) -> Request:
    """Return raw inputs of a graph: all axes but the rows at their least."""
    rng = np.random.default_rng(seed)
    sizes = {name: axis.min for name, axis in bundle.axes.items()} | {"B": rows}
    if "G" in sizes:
        sizes["G"] = rows
    complete_sizes(graph, bundle.axes, sizes)
    return Request(
        {
            tensor.name: (
                np.zeros(shape_of(tensor, sizes), tensor.dtype)
                if tensor.dtype.startswith("int")
                else rng.standard_normal(shape_of(tensor, sizes)).astype(tensor.dtype)
            )
            for tensor in graph.inputs
            if tensor.default is None
        }
    )


def png(rng: np.random.Generator) -> bytes:
    written = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(written, "PNG")
    return written.getvalue()


def of_bytes(rows: list[list[bytes]]) -> Array:
    """Return rows of bytes as servers' libraries have them: an array of objects."""
    found = np.empty((len(rows), len(rows[0])), object)
    for place, row in enumerate(rows):
        found[place] = row
    return found
