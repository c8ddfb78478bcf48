"""Run a decoder graph over a KV cache: prefill of prompts, decode steps of one token a row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, Backend
from transom.runtime.errors import InputError
from transom.runtime.feeds import LOGITS_POSITIONS, WRITE_INDICES
from transom.runtime.graph_spec import token_input
from transom.runtime.kv_cache import new_decoder_state

CHUNK = 256  # tokens of a prompt read at once: the scores inside attention grow with chunk times capacity

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Decoder:
    """R rows in one decoder graph, each at its own position.

    ``limit`` is the most tokens a row may have. ``encoder_outputs`` is what the graph reads beside tokens and
    caches, one row of each array per row: the encoder's keys and values, and its mask. ``most_logits``
    is the most positions of a row whose logits one run gives, the bound of axis P.

    The state belongs to this object alone. Not to be shared by threads.
    """

    def __init__(
        self,
        backend: Backend,
        rows: int,
        limit: int,
        encoder_outputs: Mapping[str, Array] | None = None,
        *,
        most_logits: int | None = None,
    ) -> None:
        graph = backend.graph
        self._backend = backend
        self._tokens = token_input(graph).name
        self._vocabulary = int(graph.outputs[0].shape[2])
        self._logits = graph.outputs[0].name
        self._state = new_decoder_state(backend, rows, limit, encoder_outputs or {})
        self._limit = limit
        self._most_logits = limit if most_logits is None else most_logits
        self._ends: Ids = np.zeros(rows, np.int64)  # tokens read, per row

    @property
    def rows(self) -> int:
        return len(self._ends)

    @property
    def capacity(self) -> int:
        """Return how many tokens the buffers hold per row now."""
        return self._state.capacity

    def prefill(self, tokens: Ids, lengths: Ids | None = None) -> Floats:
        """Run prompts (R, S), padded on the right to ``lengths`` (R,); return logits (R, V) of each row's last token.

        In chunks of CHUNK. What is written for padding lies past its row's end and is overwritten before it is read.
        """
        R, S = tokens.shape
        lengths = np.full(R, S) if lengths is None else lengths
        last = np.empty((R, self._vocabulary), np.float32)
        start = self._ends
        for first in range(0, S, CHUNK):
            chunk = tokens[:, first : first + CHUNK]
            place = np.clip(lengths - 1 - first, 0, chunk.shape[1] - 1)
            logits = self._step(chunk, start + first, place[:, None])[:, 0]
            here = (lengths - 1) // CHUNK == first // CHUNK
            last[here] = logits[here]
        self._ends = start + lengths
        return last

    def forward_logits(self, tokens: Ids) -> Floats:
        """Append tokens (R, S) and return the logits of every one: (R, S, V)."""
        parts = []
        for first in range(0, tokens.shape[1], self._most_logits):
            chunk = tokens[:, first : first + self._most_logits]
            parts.append(self._step(chunk, self._ends, np.tile(np.arange(chunk.shape[1]), (self.rows, 1))))
            self._ends = self._ends + chunk.shape[1]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def decode_step(self, tokens: Ids) -> Floats:
        """Append one token to each row, (R,), and return the logits (R, V) of the next one."""
        return self.prefill(tokens[:, None])

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Replace row i by what row ``rows[i]`` was; there are ``len(rows)`` from now on."""
        self._state.reorder(rows)
        self._ends = self._ends[rows]

    def _step(self, tokens: Ids, write_indices: Ids, positions: NDArray[np.intp]) -> Floats:
        """Run the graph once: (R, S) tokens at ``write_indices`` (R,), logits at ``positions`` (R, P)."""
        R, S = tokens.shape
        end = int(write_indices.max(initial=0)) + S
        if end > self._limit:
            raise InputError(f"row {int(write_indices.argmax())} has {end} tokens; the context holds {self._limit}.")
        self._state.reserve(end)
        feeds = {
            self._tokens: np.ascontiguousarray(tokens, np.int64),
            WRITE_INDICES: np.ascontiguousarray(write_indices, np.int64),
            LOGITS_POSITIONS: np.ascontiguousarray(positions, np.int64),
            **self._state.feeds,
        }
        return self._backend.run(feeds, {self._logits: (R, positions.shape[1], self._vocabulary)})[self._logits]
