"""What both sides of a parity run are put through: the same inputs, in the same order, whoever computes.

An encoder runs over a grid of shapes. A decoder reads prompts of every kind, chunk by chunk and token by
token, so that each case depends on the cache that those before it left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transom.export.parity.compare import grid
from transom.export.parity.inputs import ParityInputs, single_rows
from transom.runtime.backends.base import Array
from transom.runtime.errors import ExportError
from transom.runtime.feeds import is_decoder
from transom.runtime.graph_spec import Graph
from transom.runtime.greedy_check import forced_logits
from transom.runtime.kv_cache import STEP
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator, Row

FORCED_STEPS = 64  # tokens fed one by one
LONG_CHUNK = 300  # tokens, all with logits: of a vocabulary of 50,000, 60 MB on each side


@dataclass(frozen=True)
class Run:
    """One execution: ``sizes`` name it, ``graph`` and ``feeds`` say what counts, ``outputs`` are compared."""

    sizes: Mapping[str, int]
    graph: Graph
    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Scenario:
    """Prompts that are read at once, then chunks of tokens (R, n)."""

    prompts: list[Row]
    chunks: list[NDArray[np.int64]]

    @property
    def steps(self) -> int:
        return 1 + len(self.chunks)


class ParityCases:
    """Every case for one bundle, known before anything runs."""

    def __init__(self, bundle: LoadedBundle, samples: Mapping[str, ParityInputs]) -> None:
        axes = bundle.manifest.axes
        self._samples = samples
        self._grids: dict[str, list[dict[str, int]]] = {}
        for file in bundle.manifest.graphs:
            if not is_decoder(file.graph):
                named = {size for tensor in file.graph.inputs for size in tensor.shape if isinstance(size, str)}
                self._grids[file.graph.name] = grid({name: axis for name, axis in axes.items() if name in named})
        self._scenarios = scenarios(bundle, samples["decoder"]) if isinstance(bundle, Generator) else []
        reached = {*self._grids, *(["decoder"] if self._scenarios else [])}
        missed = [file.graph.name for file in bundle.manifest.graphs if file.graph.name not in reached]
        if missed:
            raise ExportError(
                f"no case runs the graph {missed[0]!r} of this {bundle.manifest.family}; expected some for each graph. "
                "Only generators may have a graph that writes caches, called 'decoder'."
            )

    @property
    def greedy_prompts(self) -> list[Row]:
        """What whole generations are compared on: the prompts of the longest row of steps."""
        return self._scenarios[-1].prompts

    @property
    def greedy_tokens(self) -> int:
        """How many tokens of them; each is followed by one that is fed."""
        return len(self._scenarios[-1].chunks)

    def __len__(self) -> int:
        return sum(map(len, self._grids.values())) + sum(scenario.steps for scenario in self._scenarios)

    def runs(self, bundle: LoadedBundle, *, by_row: bool = False) -> Iterator[Run]:
        """Put ``bundle`` through all of them; ``by_row`` runs a batch of an encoder row by row, to save memory."""
        for name, shapes in self._grids.items():
            graph = bundle.backend(name).graph
            for sizes in shapes:
                feeds = self._samples[name].feeds(sizes)
                yield Run(sizes, graph, feeds, run_rows(bundle, feeds) if by_row else bundle.run(feeds))
        if isinstance(bundle, Generator):
            graph = bundle.backend("decoder").graph
            for scenario in self._scenarios:
                read = max(map(len, scenario.prompts))
                logits = forced_logits(bundle, scenario.prompts, scenario.chunks)
                for step, found in enumerate(logits):
                    new = read if step == 0 else found.shape[1]
                    sizes = {"B": len(scenario.prompts), "prompt": read, "chunk": step, "tokens": new}
                    yield Run(sizes, graph, {}, {graph.outputs[0].name: found})


def run_rows(bundle: LoadedBundle, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A batch row by row: where rows cannot touch each other, this takes a fraction of the memory."""
    rows = [bundle.run(row) for row in single_rows(feeds)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def scenarios(bundle: Generator, samples: ParityInputs) -> list[Scenario]:
    """Prompts from one token to the longest, in one row to as many as may be, then chunks up to the context's end."""
    shares = bundle.decoder_length([0, 0]) == 2  # the context with what is generated: no encoder reads the prompts
    context = bundle.context
    longest = min(bundle.max_size("S"), context) if shares else bundle.max_size("S")
    prompt_below, token_below = (
        t.exclusive_max or 1 for t in (bundle.prompt_tokens(), bundle.backend("decoder").graph.inputs[0])
    )

    def scenario(lengths: Sequence[int], chunks: Sequence[int]) -> Scenario:
        lengths = [max(1, min(length, longest)) for length in lengths[: bundle.max_size("B")]]
        left = context - (max(lengths) if shares else 1)
        kept = []
        for chunk in chunks:
            chunk = min(chunk, left)
            if chunk > 0:
                kept.append(samples.ids((len(lengths), chunk), token_below))
            left -= chunk
        return Scenario([samples.ids((1, length), prompt_below)[0].tolist() for length in lengths], kept)

    forced = min(FORCED_STEPS, context - 1)
    before = min(max(STEP - forced // 2, 1), context - forced)  # so that the steps cross a growth of the buffers
    return [
        scenario([1], [1]),
        scenario([context - 3 if shares else longest], [1, 1, 1]),
        scenario([67 - 7 * row for row in range(bundle.max_size("B"))], [1, 1, 1]),
        scenario([5, 2], [5, 1, 7, 3]),
        scenario([7], [LONG_CHUNK]),
        scenario([before, before // 2], [1] * forced),
    ]
