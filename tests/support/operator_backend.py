"""A backend that executes lists of fused operators in numpy, in place of the native library's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from operator_reference import run_operators
from transom.runtime.backends.base import Array, Read
from transom.runtime.json_reader import parse_json
from transom.runtime.manifest_graphs import NATIVE, GraphFile
from transom.runtime.native.library import NativeStatus
from transom.runtime.native.operator_list import list_from_json
from transom.runtime.process_bound import ProcessBound


class OperatorBackend(ProcessBound):
    """A graph's list, executed in float64."""

    device = "cpu"
    made: ClassVar[list[str]] = []  # the files that were opened

    def __init__(self, file: GraphFile, read: Read, threads: int | None, library: Any) -> None:
        assert file.weights is not None
        self.graph, self._weights = file.graph.with_state_dtype("float32"), read(file.weights)
        name = file.files[NATIVE]
        self.operators = list_from_json(parse_json(read(name), name), self.graph, len(self._weights))
        self.made.append(name)

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Return the outputs that ``shapes`` names; caches are written in place."""
        found = run_operators(self.operators, self._weights, feeds, compute_masked=True)
        for name in self.graph.written:
            feeds[name][...] = found[name]
        outputs = {tensor.name: tensor.aliases or tensor.name for tensor in self.graph.outputs}
        return {name: found[outputs[name]].reshape(tuple(shape)) for name, shape in shapes.items()}


def use_operator_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make exports write lists, and prove them by this backend, whatever library is here."""
    library: Any = SimpleNamespace(name="numpy", sources="numpy")
    monkeypatch.setattr("transom.export.native.lists.status", lambda: NativeStatus(library, "numpy"))
    monkeypatch.setattr("transom.runtime.native.library.status", lambda: NativeStatus(library, "numpy"))
    monkeypatch.setattr("transom.runtime.native.backend.NativeBackend", OperatorBackend)
