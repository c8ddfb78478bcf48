"""Lower the graphs of a bundle, where a library is here that can prove the lists, and record what came of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from transom.export.native.lowering import Lowered, lower
from transom.export.native.row_program import CannotLowerError
from transom.runtime.graph_spec import Graph
from transom.runtime.native.library import status
from transom.runtime.native.operator_list import list_problems

LIST = ".operators.json"  # the end of a list's file name
ALIGNMENT = 64  # bytes
NO_KERNELS = (
    "the export had no kernels to prove a list with (`transom doctor` says why)"  # with paths, which no bundle has
)
BF16 = "BF16 has no kernels for a CPU: its graphs round as a GPU would"


@dataclass(frozen=True)
class NativeLists:
    """Lists by graph, and the field ``native`` of bundle.json.

    That says of each graph what was fused, for which instruction set the kernels were that proved it, and the hash of
    their sources; or why it has no list.
    """

    lowered: Mapping[str, Lowered] = field(default_factory=dict)
    record: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


NO_LISTS = NativeLists()


def lower_graphs(models: Mapping[str, ir.Model], graphs: tuple[Graph, ...]) -> NativeLists:
    """Return the lists of all graphs that have one; of none where no library is here to compare them with PyTorch."""
    found = status()
    if found.library is None:
        return refused(graphs, NO_KERNELS)
    lowered: dict[str, Lowered] = {}
    record: dict[str, Mapping[str, Any]] = {}
    for graph in graphs:
        try:
            lowered[graph.name] = checked(lower(models[graph.name], graph), graph)
            fused = dict(lowered[graph.name].operators.counts)
            record[graph.name] = {"fused": fused, "kernels": found.library.name, "sources": found.library.sources}
        except CannotLowerError as error:
            record[graph.name] = {"refused": str(error)}
    return NativeLists(lowered, record)


def refused(graphs: tuple[Graph, ...], reason: str) -> NativeLists:
    """Return no list for any graph, for one reason."""
    return NativeLists({}, {graph.name: {"refused": reason} for graph in graphs})


def checked(lowered: Lowered, graph: Graph) -> Lowered:
    """Return a list that its reader takes. Raises CannotLowerError for what is beyond the reader's limits."""
    offsets, size = {}, 0
    for name, weight in lowered.weights.items():
        offsets[name] = size
        size += -(-weight.tensor.nbytes // ALIGNMENT) * ALIGNMENT
    problems = list_problems(lowered.placed("", offsets), graph.with_state_dtype("float32"), size)
    if problems:
        raise CannotLowerError(problems[0])
    return lowered
