"""Read and write the graphs of bundle.json: GraphFile and Plan, their tensors and axes.

The keys of bundle.json are those of format version 1; where a field's name is another one, KEYS has both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transom.runtime.errors import BackendError
from transom.runtime.graph_spec import (
    ARANGE,
    CACHE,
    IMAGES,
    Axis,
    Graph,
    Tensor,
    cache_inputs,
    is_cache,
    is_decoder,
    token_input,
)
from transom.runtime.json_reader import Fields

MAX_AXIS = 2**31 - 1
DTYPES = ("int64", "float32")  # half precision stays inside the graph: the edges are the same in every bundle
STATE_DTYPES = ("float32", "float16", "bfloat16")  # but for state, which is the graph's own
NEXT = ".next"  # the end of an output's name that replaces the state of the rest of its name
ARANGE_JSON = "count"  # ARANGE, as bundle.json calls it
KEYS = {"same_as": "like", "exclusive_max": "below", "aliases": "writes"}  # field of Axis or Tensor -> key
# What a CPU session makes of the integers of a graph: products of U8 x S8; weights in blocks (MatMulNBits); or Q/DQ
# pairs computed in float32, as of the graph for TensorRT, whose S8 x S8 no CPU is to multiply.
PRODUCTS, BLOCKS, SIMULATED = "products", "blocks", "simulated"
NATIVE = "native"  # a list of fused operators, among the files of a graph
# What a bundle was made for: in one for the CPU alone no graph is TensorRT's, in one for TensorRT alone a CPU computes
# TensorRT's graph in float32.
BOTH, CPU_ALONE, TENSORRT_ALONE = "both", "cpu", "tensorrt"
MADE_FOR = (BOTH, CPU_ALONE, TENSORRT_ALONE)


@dataclass(frozen=True)
class Plan:
    """An engine of one graph: its file, and the library that built it. ``sm`` is the GPU's that built it, if any.

    ``axes`` are the bounds that it was built for, those of the bundle where bundle.json does not say (version 0.1.0).
    """

    file: str
    library: str
    version: str
    sm: str | None = None
    target: str = ""
    axes: Mapping[str, Axis] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphFile:
    """A graph and its files: ``files`` maps a variant ("default", "cpu") to an ONNX file, and NATIVE to a list of fused
    operators; ``plans`` a target to an engine. ``integers`` is PRODUCTS, BLOCKS, SIMULATED, or None where the graph has
    none. A bundle for the CPU alone may have no "default"."""

    graph: Graph
    files: Mapping[str, str]
    weights: str | None  # external data shared by all of ``files``
    plans: Mapping[str, Plan] = field(default_factory=dict)
    integers: str | None = None

    def file_for(self, device: str) -> str:
        """Return the file that runs on ``device``. Raises BackendError where the bundle has none for it."""
        name = self.files.get(device, self.files.get("default"))
        if name is None:
            raise BackendError(
                f"the graph {self.graph.name!r} has no file for {device}: the bundle was exported with --for cpu. Load "
                "it with device='cpu', or export the checkpoint again with --for both."
            )
        return name


def axis_from_json(name: str, value: Any, problems: list[str]) -> Axis:
    fields = Fields(value, f"axes.{name}", problems)
    like, divides = fields.text("like", None), fields.text("divides", None)
    low, opt, high = (fields.integer(key, 1, MAX_AXIS) or 1 for key in ("min", "opt", "max"))
    if not low <= opt <= high:
        problems.append(f"axes.{name} has min {low}, opt {opt}, max {high}, expected them in this order")
    fields.done()
    return Axis(low, opt, high, like, divides)


def axis_to_json(axis: Axis) -> dict[str, Any]:
    """Return an axis as plain data; what is not set is left out."""
    return {KEYS.get(name, name): value for name, value in vars(axis).items() if value is not None}


def graph_from_json(
    value: Any, axes: Mapping[str, Axis], files: Collection[str], problems: list[str], made_for: str = BOTH
) -> GraphFile:
    fields = Fields(value, "graphs[]", problems)
    needed = ("default", "cpu") if made_for == CPU_ALONE else ("default",)
    expected = "an object of file names, one of them " + " or ".join(f'"{key}"' for key in needed)
    targets = fields.take("files", lambda given: _names(given, needed), expected) or {}
    weights = fields.text("weights", None)
    named = [*targets.values(), *([weights] if weights else [])]
    problems += [f"graphs[] names the file {str(f)[:60]!r}, which files does not list" for f in named if f not in files]
    if NATIVE in targets and not weights:
        problems.append("graphs[] has a list of operators and no weights")
    graph = Graph(
        name=fields.text("name"),
        inputs=tuple(tensor_from_json(v, axes, problems) for v in fields.sequence("inputs")),
        outputs=tuple(tensor_from_json(v, axes, problems) for v in fields.sequence("outputs")),
    )
    fields.done()
    tensors = [str(tensor.name) for tensor in (*graph.inputs, *graph.outputs)]
    problems += [f"two tensors are called {n[:60]!r}" for n in sorted(set(tensors)) if tensors.count(n) > 1]
    given = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
    asked = {size for tensor in graph.outputs for size in tensor.shape if isinstance(size, str)}
    problems += decoder_problems(graph, axes) + interleaved_problems(graph, axes)
    if not asked <= given:
        problems.append(f"graphs[] has outputs with the axes {sorted(asked - given)}, which no input has")
    return GraphFile(graph, targets, weights)


def decoder_problems(graph: Graph, axes: Mapping[str, Axis]) -> list[str]:
    """Return what is wrong with a graph that updates a state: the runtime relies on its inputs' names and shapes."""
    written = [output for output in graph.outputs if output.aliases is not None]
    inputs = {tensor.name: tensor.shape for tensor in graph.inputs}
    problems = [
        f"{str(output.name)[:60]!r} writes {str(output.aliases)[:60]!r}, which is no input of its shape: (B, H, C, D), "
        "or (B, ...) of fixed sizes"
        for output in written
        if inputs.get(str(output.aliases)) != output.shape or not is_state_shape(output.shape)
    ]
    problems += [
        f"{str(output.name)[:60]!r} writes {str(output.aliases)[:60]!r}, expected the input of its name"
        for output in graph.outputs
        if str(output.name).endswith(NEXT) and output.aliases != str(output.name).removesuffix(NEXT)
    ]
    targets = [str(output.aliases) for output in written]
    problems += [f"two outputs write {name[:60]!r}" for name in sorted(set(targets)) if targets.count(name) > 1]
    if not any(is_cache(output) for output in written):
        return problems + (recurrent_problems(graph, axes) if written else [])
    if graph.outputs[0].shape[:2] != ("B", "P") or not isinstance(graph.outputs[0].shape[-1], int):
        problems.append("a graph that writes caches gives logits (B, P, vocabulary) first")
    if (
        inputs.get("write_indices") != ("B",)
        or inputs.get("logits_positions") != ("B", "P")
        or len(graph.inputs[0].shape) != 2
        or not isinstance(graph.inputs[0].shape[1], str)
        or graph.inputs[0].dtype != "int64"
        or graph.inputs[0].exclusive_max is None
    ):
        problems.append(
            "a graph that writes caches takes bounded tokens (B, S) first, "
            "write_indices (B) and logits_positions (B, P)"
        )
    return problems


def recurrent_problems(graph: Graph, axes: Mapping[str, Axis]) -> list[str]:
    """Return what is wrong with a graph whose state is all recurrent: it reads one token of each row."""
    tokens, logits = next(iter(graph.inputs), None), graph.outputs[0]
    if (
        tokens is None
        or tokens.dtype != "int64"
        or tokens.exclusive_max is None
        or len(tokens.shape) != 2
        or not isinstance(tokens.shape[1], str)
        or tokens.shape[1] not in axes
        or axes[tokens.shape[1]].max != 1
        or logits.shape[:-1] != tokens.shape
        or not isinstance(logits.shape[-1], int)
    ):
        return [
            "a graph with a recurrent state takes bounded tokens (B, T) first, T at most 1, and gives logits "
            "(B, T, vocabulary) first"
        ]
    return []


def interleaved_problems(graph: Graph, axes: Mapping[str, Axis]) -> list[str]:
    """Return what is wrong with a graph whose tokens see images: the runtime counts and joins these along I."""
    seen = [tensor for tensor in graph.inputs if tensor.name == "image_indices"]
    if not seen:
        return []
    tokens = token_input(graph).shape
    groups = [name for name, axis in axes.items() if (axis.divides,) == tokens[:1]]
    images = [tensor for tensor in graph.inputs if any(size in (IMAGES, *groups) for size in tensor.shape)]
    if (
        seen[0].shape != tokens
        or seen[0].dtype != "int64"
        or not images
        or not all(tensor.state and is_images_shape(tensor.shape, groups) for tensor in images)
    ):
        return [
            "a graph with image_indices takes them of its tokens' shape (B, S), and keys and values of images "
            "(G, H, I, N, D), G dividing B"
        ]
    return []


def is_images_shape(shape: Sequence[int | str], groups: Collection[str]) -> bool:
    """Return whether this is (G, H, I, N, D), G one of the axes ``groups``."""
    if len(shape) != 5 or shape[2] != IMAGES or shape[0] not in groups:
        return False
    return all(isinstance(shape[place], int) for place in (1, 3, 4))


def one_token_axes(graph: Graph) -> tuple[str, ...]:
    """Return the axes of a graph that are always 1: the tokens of one whose state is all recurrent."""
    return (str(token_input(graph).shape[1]),) if is_decoder(graph) and not cache_inputs(graph) else ()


def shared_state_problems(graphs: Sequence[Graph], axes: Mapping[str, Axis]) -> list[str]:
    """Return where graphs disagree about a state tensor that passes from one to the other.

    One graph may give a tensor row by row and piece by piece, and another take it in groups of rows and with several
    pieces: an axis of one fits an axis that divides it, and a size of 1 any axis that may be 1.
    """
    tensors = [tensor for graph in graphs for tensor in (*graph.inputs, *graph.outputs)]
    passed = {tensor.name for tensor in tensors if tensor.state}
    known: dict[str, Tensor] = {}
    problems = []
    for tensor in tensors:
        other = known.setdefault(tensor.name, tensor) if tensor.name in passed else tensor
        fits = len(tensor.shape) == len(other.shape) and all(
            sizes_fit(*pair, axes) for pair in zip(tensor.shape, other.shape, strict=True)
        )
        if not fits or (tensor.state, tensor.dtype) != (other.state, other.dtype):
            problems.append(
                f"two graphs have other shapes or dtypes of {str(tensor.name)[:60]!r}: {other.dtype} "
                f"{shape_text(other)} and {tensor.dtype} {shape_text(tensor)}"
            )
    return problems


def sizes_fit(one: str | int, other: str | int, axes: Mapping[str, Axis]) -> bool:
    """Return whether a tensor of size ``one`` in one graph can be of size ``other`` in the next."""
    if one == other:
        return True
    found = {name: axes[name] for name in (one, other) if isinstance(name, str) and name in axes}
    if len(found) == 2:
        return any(axis.divides in found for axis in found.values())
    return 1 in (one, other) and any(axis.min == 1 for axis in found.values())


def shape_text(tensor: Tensor) -> str:
    """Return a shape for a message: ``(B, 2, C, 80)``."""
    return f"({', '.join(map(str, tensor.shape))})"[:80]


def is_state_shape(shape: Sequence[str | int]) -> bool:
    """Return whether a state may have this shape: a cache's (B, H, C, D), or a recurrent state's (B, ...)."""
    if CACHE in shape:
        return len(shape) == 4 and shape[2] == CACHE and all(isinstance(shape[axis], int) for axis in (1, 3))
    return len(shape) > 1 and shape[0] == "B" and all(isinstance(size, int) for size in shape[1:])


def tensor_from_json(value: Any, axes: Mapping[str, Axis], problems: list[str]) -> Tensor:
    fields = Fields(value, "graphs[].tensor", problems)
    state = fields.boolean("state", False)
    default = fields.take("default", _is_default, f"an integer of 32 bits or {ARANGE_JSON!r}", None)
    tensor = Tensor(
        name=fields.text("name"),
        dtype=fields.text("dtype", among=STATE_DTYPES if state else DTYPES),
        shape=tuple(fields.sequence("shape")),
        default=ARANGE if default == ARANGE_JSON else default,
        exclusive_max=fields.integer("below", 1, 2**63 - 1, None),
        state=state,
        aliases=fields.text("writes", None),
    )
    fields.done()
    for size in tensor.shape:
        known = size in axes if isinstance(size, str) else type(size) is int and 0 < size <= MAX_AXIS
        if not known:
            problems.append(f"the shape of {tensor.name!r} has {repr(size)[:60]}, expected an axis name or a size")
    return tensor


def _is_default(value: Any) -> bool:
    return value == ARANGE_JSON or (type(value) is int and abs(value) <= 2**31)


def _names(value: Any, needed: Sequence[str]) -> bool:
    if not isinstance(value, dict) or not any(key in value for key in needed):
        return False
    return all(isinstance(name, str) for name in value.values())


def graph_to_json(file: GraphFile) -> dict[str, Any]:
    """Return a graph's entry in bundle.json: what is null or false is left out."""
    entry = every_field(file)
    for side in ("inputs", "outputs"):
        entry[side] = [set_fields(tensor) for tensor in entry[side]]
    return set_fields(entry)


def every_field(file: GraphFile) -> dict[str, Any]:
    """Return a graph as plain data, null where something is not set."""
    return {
        "name": file.graph.name,
        "files": dict(file.files),
        "weights": file.weights,
        "inputs": [tensor_to_json(tensor) for tensor in file.graph.inputs],
        "outputs": [tensor_to_json(tensor) for tensor in file.graph.outputs],
    }


def tensor_to_json(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor as plain data, null where something is not set."""
    entry = {KEYS.get(name, name): value for name, value in vars(tensor).items()}
    return entry | ({"default": ARANGE_JSON} if tensor.default == ARANGE else {})


def set_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry that are neither null nor false."""
    return {key: value for key, value in entry.items() if value is not None and value is not False}
