"""Compute each text of a bundle once, though a gate asks for it twice: for the outputs' error, and for the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transom.calib.run_samples import IDS, MASK
from transom.runtime.backends.base import Array, Backend
from transom.runtime.bundle import Bundle
from transom.runtime.graph_spec import Graph
from transom.runtime.loading import load_with_backends
from transom.runtime.session import LoadedBundle


class RememberedRows:
    """A backend that remembers outputs with one vector per text, by the text's inputs without padding.

    Neither the padding of a row nor the rows beside it change a bit of its result (``runtime/text/batch.py``). Runs of
    other outputs go through.
    """

    device = "cpu"

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.graph = backend.graph
        self._by_row = {tensor.name for tensor in self.graph.outputs if is_vector(tensor.shape)}
        self._known: dict[bytes, dict[str, Array]] = {}

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Run the graph on those rows alone that were not run before with these outputs."""
        if not {*shapes} <= self._by_row:
            return self._backend.run(feeds, shapes)
        keys = [self._key(feeds, row, shapes) for row in range(len(feeds[MASK]))]
        new = [row for row, key in enumerate(keys) if key not in self._known]
        if new:
            rows = {name: array[new] for name, array in feeds.items()}
            found = self._backend.run(rows, {name: (len(new), *shape[1:]) for name, shape in shapes.items()})
            for place, row in enumerate(new):
                self._known[keys[row]] = {name: found[name][place].copy() for name in shapes}
        return {name: np.stack([self._known[key][name] for key in keys]) for name in shapes}

    def _key(self, feeds: Mapping[str, Array], row: int, shapes: Mapping[str, Sequence[int]]) -> bytes:
        length = 1 + int(np.flatnonzero(feeds[MASK][row]).max(initial=0))
        parts = [array[row, :length].tobytes() for _, array in sorted(feeds.items())]
        return b"".join(parts) + repr(sorted(shapes)).encode()


def is_vector(shape: Sequence[int | str]) -> bool:
    """Return whether an output has one vector of known size per row of a batch."""
    return len(shape) == 2 and shape[0] == "B" and isinstance(shape[1], int)


def remembering(bundle: Bundle, loaded: LoadedBundle) -> LoadedBundle:
    """Load ``bundle`` around the open backends of ``loaded``; those that read masked texts compute each once."""
    backends = [loaded.backend(file.graph.name) for file in bundle.manifest.graphs]
    return load_with_backends(
        bundle,
        {each.graph.name: RememberedRows(each) if reads_texts(each.graph) else each for each in backends},
    )


def reads_texts(graph: Graph) -> bool:
    return {IDS, MASK} <= {tensor.name for tensor in graph.inputs} and not any(t.aliases for t in graph.outputs)
