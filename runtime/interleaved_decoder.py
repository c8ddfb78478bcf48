"""Run a decoder graph whose tokens see images: a Decoder that keeps the images' keys and values beside its cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, Backend
from transom.runtime.decoder import Decoder, Floats, Ids
from transom.runtime.feeds import IMAGE_INDICES
from transom.runtime.image_cache import EncodedImage, ImageCache, image_inputs


class InterleavedDecoder(Decoder):
    """R rows of text and images in one decoder graph. The token ``mark`` stands for an image; each row has its own.

    A token sees the latest image before it, a mark its own image, and a token before the first mark none (Alayrac et
    al., 2022, arXiv:2204.14198, section 2.3). ``limit`` and ``most_logits`` are those of Decoder, ``most_images`` is
    how many images a row may have.
    """

    def __init__(
        self, backend: Backend, rows: int, limit: int, mark: int, most_images: int, *, most_logits: int | None = None
    ) -> None:
        super().__init__(backend, rows, limit, most_logits=most_logits)
        self._mark = mark
        self._images = ImageCache(image_inputs(backend.graph), rows, most_images)
        self._marks: Ids = np.zeros(rows, np.int64)  # marks read, per row
        self._constants: dict[str, Array] | None = None  # what the state has now
        self._image_indices: Ids = np.zeros((rows, 1), np.int64)  # of the tokens of a run

    @property
    def images(self) -> NDArray[np.int64]:
        """Return how many images each row has: (R,)."""
        return self._images.counts()

    def append_images(self, images: Sequence[Sequence[EncodedImage]]) -> None:
        """Give each row the images of the marks that it reads next, in their order; none is fine.

        Raises InputError for more images than a row may have.
        """
        self._images.append(images)

    def prefill(self, tokens: Ids, lengths: Ids | None = None) -> Floats:
        """Run prompts as Decoder does. The images of their marks are appended before; InputError where one is not."""
        before = self._marks
        if lengths is not None:  # what is no token of the row is no mark either
            padding = np.arange(tokens.shape[1]) >= lengths[:, None]
            tokens = np.where(padding & (tokens == self._mark), (self._mark == 0) * 1, tokens)
        try:
            return super().prefill(tokens, lengths)
        except BaseException:
            self._marks = before  # as if nothing of it had been read
            raise

    def reorder(self, rows: NDArray[np.intp]) -> None:
        super().reorder(rows)
        self._images.reorder(rows)
        self._marks = self._marks[rows]

    def rewind(self, tokens: int, images: int) -> None:
        """Go back to one row, the first, as it was after ``tokens`` tokens with ``images`` images."""
        self.reorder(np.zeros(1, np.intp))
        self._images.truncate(images)
        self._ends, self._marks = [tokens], np.array([images])

    def decode_step(self, tokens: Ids) -> Floats:
        marks = self._look(tokens[:, None])
        logits = super().decode_step(tokens)
        self._marks = marks
        return logits

    def _step(self, tokens: Ids, write_indices: Ids, positions: NDArray[np.intp]) -> Floats:
        marks = self._look(tokens)
        logits = super()._step(tokens, write_indices, positions)
        self._marks = marks
        return logits

    def _look(self, tokens: Ids) -> Ids:
        """Let the state have the images that tokens (R, S) see, and note which; return the marks read then, per row."""
        marks = self._marks[:, None] + np.cumsum(tokens == self._mark, axis=1)
        constants, self._image_indices = self._images.window(marks)
        if constants is not self._constants:
            self._constants = self._steps = None  # of the state, until it has the new ones
            self._state.set_constants(constants)
            self._constants = constants
        read: Ids = marks[:, -1]
        return read

    def _values(self, tokens: Ids, write_indices: Ids, positions: NDArray[np.intp]) -> dict[str, Ids]:
        return {**super()._values(tokens, write_indices, positions), IMAGE_INDICES: self._image_indices}

    def _write_values(self, values: dict[str, Ids], tokens: Ids) -> None:
        super()._write_values(values, tokens)
        values[IMAGE_INDICES][:] = self._image_indices
