"""Run a decoder graph over its state, a KV cache or a recurrent one: prefill of prompts, decode steps of one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, Backend, BoundRun, bound_run
from transom.runtime.decoder_state import DecoderState, new_decoder_state
from transom.runtime.errors import BundleError, InputError
from transom.runtime.feeds import LOGITS_POSITIONS, WRITE_INDICES
from transom.runtime.graph_spec import CACHE, Axis, Graph, cache_inputs, token_input

CHUNK = 256  # tokens of a prompt read at once: the scores inside attention grow with chunk times capacity

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


def context_length(graph: Graph, axes: Mapping[str, Axis], options: Mapping[str, Any]) -> int:
    """Return how many tokens a row of a decoder graph may have.

    Its cache's and its prompts' bounds; a recurrent state has none, and bundle.json's ``options`` have
    ``max_target_positions``. Raises BundleError where they do not.
    """
    if cache_inputs(graph):
        return min(axes[CACHE].max, axes[str(token_input(graph).shape[1])].max)
    found = options.get("max_target_positions")
    if type(found) is not int or found < 1:
        raise BundleError(
            f"bundle.json: options.max_target_positions is {repr(found)[:60]}, expected a positive integer. Export the "
            "bundle again."
        )
    return found


class Decoder:
    """R rows in one decoder graph, each at its own position.

    ``limit`` is the most tokens a row may have. ``encoder_outputs`` is what the graph reads beside tokens and
    state, one row of each array per row: the encoder's keys and values, and its mask. ``most_logits``
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
        self._cached = bool(cache_inputs(graph))
        self._chunk = CHUNK if self._cached else 1  # a recurrent graph reads one token of each row
        self._most_logits = min(limit, most_logits or limit) if self._cached else 1
        self._ends: Ids = np.zeros(rows, np.int64)  # tokens read, per row
        self._bound = BoundSteps(backend)

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
        Into a recurrent state padding would go for good: InputError for rows of different lengths.
        """
        R, S = tokens.shape
        lengths = np.full(R, S) if lengths is None else lengths
        if not self._cached and np.any(lengths != S):
            raise InputError(
                f"rows of {int(lengths.min())} and {int(lengths.max())} tokens are to go into one recurrent state; "
                "expected rows of one length. Give each length a call of its own."
            )
        start = self._ends
        if S == 1:
            return self.decode_step(tokens[:, 0])
        last = np.empty((R, self._vocabulary), np.float32)
        for first in range(0, S, self._chunk):
            chunk = tokens[:, first : first + self._chunk]
            place = np.clip(lengths - 1 - first, 0, chunk.shape[1] - 1)
            logits = self._step(chunk, start + first, place[:, None])[:, 0]
            if self._chunk >= S:
                last = logits
                break
            here = (lengths - 1) // self._chunk == first // self._chunk
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
        logits = self._step(tokens[:, None], self._ends, np.zeros((len(tokens), 1), np.intp))
        self._ends = self._ends + 1
        return logits[:, 0]

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Replace row i by what row ``rows[i]`` was; there are ``len(rows)`` from now on."""
        if len(rows) != self.rows:
            self._bound.release()
        self._state.reorder(rows, self._ends)
        self._ends = self._ends[rows]

    def _values(self, tokens: Ids, write_indices: Ids, positions: NDArray[np.intp]) -> dict[str, Ids]:
        """Return what a run of the graph reads beside the state, int64: tokens (R, S), and their positions."""
        values = {self._tokens: np.ascontiguousarray(tokens, np.int64)}
        if self._cached:
            values[WRITE_INDICES] = np.ascontiguousarray(write_indices, np.int64)
            values[LOGITS_POSITIONS] = np.ascontiguousarray(positions, np.int64)
        return values

    def _step(self, tokens: Ids, write_indices: Ids, positions: NDArray[np.intp]) -> Floats:
        """Run the graph once: (R, S) tokens at ``write_indices`` (R,), logits at ``positions`` (R, P)."""
        R, S = tokens.shape
        end = int(write_indices.max(initial=0)) + S
        if end > self._limit:
            raise InputError(f"row {int(write_indices.argmax())} has {end} tokens; the context holds {self._limit}.")
        if end > self._state.capacity:
            self._bound.release()
        self._state.reserve(end)
        values = self._values(tokens, write_indices, positions)
        shapes = {self._logits: (R, positions.shape[1], self._vocabulary)}
        if S == 1:
            return self._bound.run(self._state, values, shapes)[self._logits]
        return self._backend.run({**values, **self._state.feeds}, shapes)[self._logits]


class BoundSteps:
    """Runs of one token per row: the tensors of a state are bound once, until it has others."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._run: BoundRun | None = None
        self._revision = -1  # of the state that is bound
        self._values: dict[str, Ids] = {}

    def run(
        self, state: DecoderState, values: Mapping[str, Ids], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Array]:
        """Run the graph over ``state`` and ``values``, whose shapes go with the state's rows; fresh arrays."""
        if self._run is None or self._revision != state.revision:
            self.release()
            self._values = {name: value.copy() for name, value in values.items()}
            self._run = bound_run(self._backend, {**self._values, **state.feeds}, shapes)
            self._revision = state.revision
        else:
            for name, value in values.items():
                self._values[name][...] = value
        return self._run.run()

    def release(self) -> None:
        """Let go of the state's tensors, so that others need not fit into memory beside them."""
        self._run = None
