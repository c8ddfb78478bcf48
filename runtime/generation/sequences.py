"""Token sequences that generation appends to, and the decoder that it needs for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class DecoderProtocol(Protocol):
    """A decoder that has read R rows of tokens, with their KV cache."""

    def decode_step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to each row: (R,) -> logits (R, V) of the next token."""

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Let row i continue what row ``rows[i]`` was; R becomes ``len(rows)``."""


class Sequences:
    """R sequences of tokens: prompts, each followed by its new tokens.

    tokens   (R, L) int64; row r is ``tokens[r, : lengths[r]]``, the rest is unused
    prompts  (R,) lengths of the prompts; ``lengths`` counts the new tokens, too
    limits   (R,) lengths at which a row ends
    shortest (R,) lengths before which no end-of-sequence token is chosen
    """

    def __init__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], shortest: Sequence[int]) -> None:
        self.lengths: NDArray[np.int64] = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self.prompts = self.lengths.copy()
        self.limits: NDArray[np.int64] = np.array(limits, dtype=np.int64)
        self.shortest: NDArray[np.int64] = np.array(shortest, dtype=np.int64)
        self.tokens: NDArray[np.int64] = np.zeros((len(prompts), max(limits)), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = prompt

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, row: int) -> NDArray[np.int64]:
        """Return a view of the row's tokens, prompt included."""
        return self.tokens[row, : self.lengths[row]]

    def append(self, tokens: NDArray[np.int64]) -> None:
        """Append one token to each row: (R,)."""
        self.tokens[np.arange(len(self)), self.lengths] = tokens
        self.lengths += 1

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Let row i continue what row ``rows[i]`` was, as in ``DecoderProtocol.reorder``."""
        for name in ("tokens", "lengths", "prompts", "limits", "shortest"):
            setattr(self, name, getattr(self, name)[rows])
