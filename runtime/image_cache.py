"""Keep keys and values of the images of a decoder's rows: computed once, shared by beams, fed where they are seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.errors import BackendError, InputError
from transom.runtime.feeds import storage
from transom.runtime.graph_spec import IMAGES, Graph, Tensor, state_inputs

EncodedImage = Mapping[str, Array]  # keys and values of one image by name of the input, (H, 1, N, D) each


def image_inputs(graph: Graph) -> list[Tensor]:
    """Return the inputs that take keys and values of images, (G, H, I, N, D): state that the graph does not write."""
    written = {tensor.name for tensor in state_inputs(graph)}
    return [tensor for tensor in graph.inputs if IMAGES in tensor.shape and tensor.name not in written]


class ImageCache:
    """The images of R rows, at most ``limit`` each: what ``tensors``, inputs (G, H, I, N, D) of a decoder, take.

    Rows that come from one, as beams do, share its images: no reordering copies an array. A call gets the images alone
    that its tokens see, so that a step costs the same after one image as after many.
    """

    def __init__(self, tensors: Sequence[Tensor], rows: int, limit: int) -> None:
        self._tensors, self._limit = tensors, limit
        self._images: list[list[EncodedImage]] = [[] for _ in range(rows)]  # by source
        self._sources: NDArray[np.intp] = np.arange(rows)  # of each row, whose images it reads
        self._key: object = None
        self._arrays: dict[str, Array] = {}

    def counts(self) -> NDArray[np.int64]:
        """Return how many images each row has: (R,)."""
        return np.array([len(self._images[source]) for source in self._sources], np.int64)

    def append(self, images: Sequence[Sequence[EncodedImage]]) -> None:
        """Give each row further images, behind those that it has; InputError for more than the limit.

        From then on no rows share; where there is none for any row, all stays as it is.
        """
        if not any(images):
            return
        joined = [[*self._images[source], *new] for source, new in zip(self._sources.tolist(), images, strict=True)]
        for row, found in enumerate(joined):
            if len(found) > self._limit:
                raise InputError(f"row {row} has {len(found)} images; the cache holds {self._limit}.")
        self._set(joined)

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` images of each row."""
        if (self.counts() > count).any():
            self._set([self._images[source][:count] for source in self._sources])

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Let row i read the images of what row ``rows[i]`` was; there are ``len(rows)`` from now on."""
        self._sources = self._sources[rows]

    def window(self, indices: NDArray[np.int64]) -> tuple[dict[str, Array], NDArray[np.int64]]:
        """Return the inputs for tokens that see the images ``indices`` (R, S), from 1, and these indices among them.

        The arrays (G, H, I, N, D) have the images that some token of the group sees, zeros where a group has fewer than
        another, and one of zeros where no token sees any. Groups are as large as the rows allow: all rows of a source
        where every source has as many. The same arrays come back until another image is seen or a group changes.
        Raises InputError where a row has fewer images than a token asks for.
        """
        missing = np.flatnonzero(indices.max(axis=1, initial=0) > self.counts())
        if len(missing):
            row = int(missing[0])
            raise InputError(
                f"row {row} has {int(indices[row].max())} image marks and {int(self.counts()[row])} images; expected "
                "as many. Append the images of the marks first."
            )
        K = self._group()
        sources = self._sources[::K].tolist()
        seen = [np.unique(rows[rows > 0]) for rows in indices.reshape(len(sources), -1)]
        key = [(source, *places.tolist()) for source, places in zip(sources, seen, strict=True)]
        if key != self._key:
            self._arrays = {}  # first, so that old and new need not fit together
            self._arrays = {tensor.name: self._joined(tensor, sources, seen) for tensor in self._tensors}
            self._key = key
        places = np.zeros_like(indices)
        for row in range(len(indices)):
            own = indices[row]
            places[row] = np.where(own > 0, np.searchsorted(seen[row // K], own) + 1, 0)
        return self._arrays, places

    def _set(self, images: list[list[EncodedImage]]) -> None:
        self._images, self._sources, self._key = images, np.arange(len(images)), None

    def _group(self) -> int:
        """Return the most rows that a group may have: it divides every run of neighbours that read the same images."""
        ends = np.flatnonzero(np.diff(self._sources)) + 1
        runs = np.diff(np.concatenate([[0], ends, [len(self._sources)]]))
        return int(np.gcd.reduce(runs))

    def _joined(self, tensor: Tensor, sources: Sequence[int], seen: Sequence[NDArray[np.int64]]) -> Array:
        """Put the images that are seen side by side: (G, H, I, N, D)."""
        _, heads, _, latents, size = tensor.shape
        most = max(1, *map(len, seen))
        shape = (len(sources), int(heads), most, int(latents), int(size))
        try:
            joined = np.zeros(shape, storage(tensor))
        except (MemoryError, ValueError):
            raise BackendError(
                f"there is no memory for images of {shape}. Give fewer prompts, or fewer images in each."
            ) from None
        for group, source in enumerate(sources):
            for place, index in enumerate(seen[group].tolist()):
                joined[group, :, place] = self._images[source][index - 1][tensor.name][:, 0]
        return joined
