"""Find external data of a model that lies elsewhere than in the weights of its bundle.

ONNX Runtime reads the location of such data relative to the working directory of the process, whatever it names, in any
tensor: of the graph, of a subgraph, of an attribute, of a function. Field numbers are those of ``onnx/onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator

from transom.runtime.backends.inlined_model import EXTERNAL_DATA, KEY, VALUE, fields

LOCATION = b"location"
DEEPEST = 100  # messages inside of each other that Protocol Buffers read
# The fields of a message that hold, in the end, tensors: number -> kind of message.
MODEL = {7: "graph", 25: "function", 20: "training"}
INSIDE = {
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


def foreign_location(model: bytes, weights: str | None, inlined: int) -> str | None:
    """Return the location of the first external data that is not ``weights``; None where there is none.

    ``inlined`` is how many tensors were found to lie in ``weights``: a model in which the word occurs no more often has
    no others, and is not walked through. Raises ValueError or IndexError for what is no model.
    """
    if model.count(LOCATION) <= inlined:
        return None
    return next((place for place in locations(memoryview(model), MODEL) if place != weights), None)


def locations(message: memoryview, kinds: dict[int, str], depth: int = 0) -> Iterator[str]:
    """Yield the locations of all external data in a message whose fields ``kinds`` names."""
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} messages inside of each other")
    for number, content, _ in fields(message):
        kind = kinds.get(number)
        if kind is None or content is None:
            continue
        if kind == "tensor":
            yield from tensor_locations(content)
        else:
            yield from locations(content, INSIDE[kind], depth + 1)


def tensor_locations(tensor: memoryview) -> Iterator[str]:
    """Yield the locations that a TensorProto gives."""
    for number, content, _ in fields(tensor):
        if number == EXTERNAL_DATA and content is not None:
            entry = {key: bytes(text) for key, text, _ in fields(content) if text is not None}
            if entry.get(KEY) == LOCATION:
                yield entry.get(VALUE, b"").decode(errors="replace")
