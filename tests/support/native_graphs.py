"""Graphs of the native backend without a bundle: a list, its weights in memory or in a file, and the library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from operator_reference import run_operators
from transom.runtime.errors import BackendError
from transom.runtime.graph_spec import Graph
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.native.backend import NativeBackend
from transom.runtime.native.library import NativeLibrary, library_path, open_library
from transom.runtime.native.operator_list import list_to_json
from transom.runtime.native.operators import OperatorList
from transom.runtime.native.records import ISA_NAMES
from transom.runtime.native.trust import why_not_trusted

LIST = "graph.operators.json"


class Files:
    """A ``ReadInPieces`` of files in memory; ``piece`` bytes at a time."""

    def __init__(self, files: dict[str, bytes], piece: int = 1000) -> None:
        self.files, self.piece = files, piece

    def __call__(self, name: str) -> bytes:
        return self.files[name]

    def size(self, name: str) -> int:
        return len(self.files[name])

    def pieces(self, name: str) -> Iterator[memoryview]:
        data = self.files[name]
        for start in range(0, len(data), self.piece):
            yield memoryview(data)[start : start + self.piece]


def libraries() -> list[Any]:
    """One parameter for each instruction set that the library can use here, skipped where that is none."""
    try:
        library = open_library(library_path())
    except BackendError as error:
        return [pytest.param(None, marks=pytest.mark.skip(reason=str(error)), id="no library")]
    found = []
    for isa in range(len(ISA_NAMES)):
        why = why_not_trusted(library.path, isa) if library.supports(isa) else "the processor does not have it"
        marks = () if why is None else (pytest.mark.skip(reason=why),)
        found.append(pytest.param(library.with_isa(isa), marks=marks, id=ISA_NAMES[isa]))
    return found


def files_of(operators: OperatorList, weights: bytes) -> Files:
    return Files({LIST: json.dumps(list_to_json(operators)).encode(), "model.weights": weights})


def native(
    graph: Graph, made: tuple[OperatorList, bytes], library: NativeLibrary, threads: int | None = 1
) -> NativeBackend:
    """Open a list for a graph as a bundle would be."""
    file = GraphFile(graph, {"native": LIST}, "model.weights")
    return NativeBackend(file, files_of(*made), threads, library)


def worst(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> dict[str, float]:
    """max|ours - theirs| / max|theirs| by name."""
    return {name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in ours}


def reference(made: tuple[OperatorList, bytes], feeds: dict[str, Any], **options: Any) -> dict[str, NDArray[Any]]:
    return run_operators(*made, feeds, **options)
