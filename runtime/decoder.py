"""Run a decoder graph over its state, a KV cache or a recurrent one: prefill of prompts, decode steps of one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, Backend, bound_run
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
        self._most_logits = min(limit, most_logits or limit)
        # Tokens read, per row. Plain ints: behind a large graph numpy's code is out of the processor's caches, and
        # adding 1 to an array takes 35 us.
        self._ends = [0] * rows
        self._room = 0  # tokens of a row that there is memory for, and that the limit allows
        self._steps: BoundSteps | None = None  # over the state's tensors as they are now
        self._reused = False

    def reuse_logits(self) -> None:
        """Let ``decode_step`` return an array that the next one overwrites: for a caller that is done with it then."""
        self._reused = True

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
        start = np.array(self._ends)
        last = np.empty((R, self._vocabulary), np.float32)
        if S == 1 or not self._cached:  # a recurrent graph reads one token of each row
            for column in tokens.T:
                last = self.decode_step(column)
            return last
        for first in range(0, S, CHUNK):
            chunk = tokens[:, first : first + CHUNK]
            place = np.clip(lengths - 1 - first, 0, chunk.shape[1] - 1)
            logits = self._step(chunk, start + first, place[:, None])[:, 0]
            if CHUNK >= S:
                last = logits
                break
            here = (lengths - 1) // CHUNK == first // CHUNK
            last[here] = logits[here]
        self._ends = (start + lengths).tolist()
        return last

    def forward_logits(self, tokens: Ids) -> Floats:
        """Append tokens (R, S) and return the logits of every one: (R, S, V)."""
        if not self._cached:
            steps = np.empty((*tokens.shape, self._vocabulary), np.float32)
            for place, column in enumerate(tokens.T):
                steps[:, place] = self.decode_step(column)
            return steps
        parts = []
        for first in range(0, tokens.shape[1], self._most_logits):
            chunk = tokens[:, first : first + self._most_logits]
            positions = np.tile(np.arange(chunk.shape[1]), (self.rows, 1))
            parts.append(self._step(chunk, np.array(self._ends), positions))
            self._ends = [end + chunk.shape[1] for end in self._ends]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def decode_step(self, tokens: Ids) -> Floats:
        """Append one token to each row, (R,), and return the logits (R, V) of the next one."""
        ends = [end + 1 for end in self._ends]
        longest = max(ends)
        if longest > self._room:
            self._make_room(longest, self._ends)
        steps = self._steps
        if steps is None:
            values = self._values(tokens[:, None], np.array(self._ends), np.zeros((len(tokens), 1), np.intp))
            steps = self._steps = BoundSteps(self._backend, self._state, values, self._vocabulary)
        self._write_values(steps.values, tokens)
        logits = steps.run(reused=self._reused)
        self._ends = ends
        return logits

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Replace row i by what row ``rows[i]`` was; there are ``len(rows)`` from now on."""
        if len(rows) != self.rows:
            self._steps = None  # before there are other tensors, which then need not fit into memory beside these
        self._state.reserve(max(self._ends))  # as far as steps wrote
        self._state.reorder(rows, np.array(self._ends))
        self._ends = [self._ends[row] for row in rows.tolist()]
        if self._steps is not None and self._steps.revision != self._state.revision:
            self._steps = None

    def _values(self, tokens: Ids, write_indices: Ids, positions: NDArray[np.intp]) -> dict[str, Ids]:
        """Return what a run of the graph reads beside the state, int64: tokens (R, S), and their positions."""
        values = {self._tokens: np.ascontiguousarray(tokens, np.int64)}
        if self._cached:
            values[WRITE_INDICES] = np.ascontiguousarray(write_indices, np.int64)
            values[LOGITS_POSITIONS] = np.ascontiguousarray(positions, np.int64)
        return values

    def _write_values(self, values: dict[str, Ids], tokens: Ids) -> None:
        """Write ``_values`` of a step of tokens (R,) into those of another."""
        values[self._tokens][:, 0] = tokens
        if self._cached:
            write_indices = values[WRITE_INDICES]
            for row, end in enumerate(self._ends):
                write_indices[row] = end

    def _step(self, tokens: Ids, write_indices: Ids, positions: NDArray[np.intp]) -> Floats:
        """Run the graph once: (R, S) tokens at ``write_indices`` (R,), logits at ``positions`` (R, P)."""
        R, S = tokens.shape
        ends = write_indices.tolist()
        self._make_room(max(ends) + S, ends)
        values = self._values(tokens, write_indices, positions)
        shapes = {self._logits: (R, positions.shape[1], self._vocabulary)}
        return self._backend.run({**values, **self._state.feeds}, shapes)[self._logits]

    def _make_room(self, end: int, ends: list[int]) -> None:
        """Make room for ``end`` tokens in every row, which now have ``ends``. Raises InputError beyond the limit."""
        if end > self._limit:
            raise InputError(f"row {ends.index(max(ends))} has {end} tokens; the context holds {self._limit}.")
        self._state.reserve(max(self._ends))  # as far as steps wrote
        if end > self._state.capacity:
            self._steps = None  # as in reorder
        self._state.reserve(end)
        self._room = min(self._limit, self._state.capacity)


class BoundSteps:
    """Runs of one token per row over arrays that are bound once: those of a state, and ``values`` written between runs.

    ``revision`` is the state's then.
    """

    def __init__(self, backend: Backend, state: DecoderState, values: Mapping[str, Ids], vocabulary: int) -> None:
        """Bind copies of ``values``, which are those of a first step."""
        self.revision = state.revision
        self.values = {name: value.copy() for name, value in values.items()}
        self._logits = backend.graph.outputs[0].name
        shapes = {self._logits: (len(next(iter(values.values()))), 1, vocabulary)}
        self._run = bound_run(backend, {**self.values, **state.feeds}, shapes)
        self._reused: Floats | None = None  # the logits of runs that are reused, (R, 1, V), and their view (R, V)
        self._view: Floats = np.empty((0, 0), np.float32)

    def run(self, *, reused: bool) -> Floats:
        """Run the graph once; return the logits (R, V), if ``reused`` in an array that the next run may write again."""
        logits = self._run.run(reused=reused)[self._logits]
        if not reused:
            return logits[:, 0]
        if logits is not self._reused:
            self._reused, self._view = logits, logits[:, 0]
        return self._view
