"""Execute graphs with the native library: rows packed, memory reused, no work for padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transom.runtime.backends.base import Array, BoundRun, Read, ReadInPieces, RepeatedRun
from transom.runtime.backends.kernels import LIST
from transom.runtime.errors import BundleError
from transom.runtime.host import physical_cores
from transom.runtime.json_reader import parse_json
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.native.bound_run import NativeBoundRun
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.operator_list import checked_list
from transom.runtime.native.program import Program
from transom.runtime.native.rows import Packer
from transom.runtime.native.workspace import Workspace, output_slots
from transom.runtime.process_bound import ProcessBound

KEPT = 4  # workspaces that wait for the next run
KEPT_BYTES = 256 << 20  # of one that waits; a larger one is given back
KEY_STEP = 64  # working memory is asked for so many keys at a time


class NativeBackend(ProcessBound):
    """A graph as a list of fused operators; callable from many threads at once.

    Raises BundleError where the list or the weights are not usable, BackendError where there is no memory.
    """

    device = "cpu"

    def __init__(self, file: GraphFile, read: Read, threads: int | None, library: NativeLibrary) -> None:
        self.graph = file.graph.with_state_dtype("float32")
        self.library, self.threads = library, threads or physical_cores()
        name = file.files[LIST]
        weights = weights_size(file, read)
        operators, registers = checked_list(parse_json(read(name), name), self.graph, weights)
        if operators.weights != file.weights:
            raise BundleError(
                f"{name} reads {operators.weights[:60]!r}, bundle.json has {file.weights!r}; export it again."
            )
        self.program = Program(operators, registers, self.graph, library, read)
        self.packer = Packer(self.program, self.graph)
        self.packs_rows = operators.mask is not None
        self._scratch: dict[int, int] = {}
        self._free: list[Workspace] = []

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        wanted = frozenset(t.name for t in self.graph.outputs if t.name in shapes and t.aliases is None)
        variant = self.program.variant(wanted, padded=True)
        rows = self.packer.pack(feeds, variant)
        if not rows.padded:
            variant = self.program.variant(wanted, padded=False)
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace(self.program)
        outputs = {name: np.empty(tuple(shapes[name]), np.float32) for name in wanted}
        workspace.place(rows, self.scratch(rows.longest), self.threads)
        workspace.bind(rows.slots)
        workspace.bind(output_slots(self.program, variant, rows, outputs))
        self.library.execute(variant.operators, workspace.run)
        if len(self._free) < KEPT and workspace.size <= KEPT_BYTES:
            self._free.append(workspace)
        return outputs

    def bound_run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> BoundRun:
        """Return a run over these inputs, which are read anew each time."""
        return NativeBoundRun(self, feeds, shapes) if self.packer.caches else RepeatedRun(self, feeds, shapes)

    def give_back(self) -> None:
        """Free the memory of activations; the next run takes new memory."""
        self._free.clear()

    def scratch(self, keys: int) -> int:
        """Return the bytes of attention's working memory for one thread and up to so many keys."""
        keys = -(-keys // KEY_STEP) * KEY_STEP
        if keys not in self._scratch:
            found = (self.library.attention_scratch(record, keys) for record in self.program.attentions)
            self._scratch[keys] = max(found, default=0)
        return self._scratch[keys]


def weights_size(file: GraphFile, read: Read) -> int:
    """Return the bytes of a graph's weights. Raises BundleError where it has none beside it."""
    if file.weights is None:
        raise BundleError(f"the graph {file.graph.name!r} has a list of operators and no weights; export it again.")
    return read.size(file.weights) if isinstance(read, ReadInPieces) else len(read(file.weights))
