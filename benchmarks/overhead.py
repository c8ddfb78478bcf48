"""Measure what Transom's Python costs beside the graphs: between decode steps, and in a run of an encoder.

    python benchmarks/overhead.py --decoder BUNDLE --encoder BUNDLE
    python benchmarks/overhead.py --decoder BUNDLE --encoder BUNDLE --side today=OLD/.venv/bin/python --side ours=PYTHON

Each side, an installation's interpreter, measures in processes of its own, which alternate; figures are medians over
the rounds of medians within one. Graphs run on one thread and times are CPU times of that thread, which other work on
the machine changes little.

A decode step: from the end of one run of the graph to the begin of the next, apart what reads all logits (the search
for NaN, arg-max, log-softmax, top-k) and what copies rows of the cache. A run: `run` less a session's run over inputs
and outputs that were bound once. Import: `import transom.runtime` in a fresh interpreter, elapsed time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

PROMPT, NEW = 16, 100  # tokens: past 128 a cache grows, which is a step of another kind
CALLS, REPEATS = 300, 9
IMPORT = "import time; t = time.perf_counter(); import transom.runtime; print((time.perf_counter() - t) * 1e6)"
# What reads all logits, and what copies rows of a cache, by the names that versions have given them: module or class of
# transom.runtime, and its callables. Those that an installation lacks are left out.
READS_LOGITS = (
    ("generation.sampling", "check_logits"),
    ("generation.beam_search", "check_logits log_softmax log_normalisers"),
    ("generation.beam_search:BeamHypotheses", "candidates candidates_of_logits"),
    ("generate.search", "check_finite"),
    ("generate.beams", "check_finite log_softmax"),
    ("generate.beams:Search", "candidates"),
)
COPIES_ROWS = (("kv_cache:KVCache", "reorder"), ("decoder.cache:KVCache", "select"))


class Clock:
    """CPU time of this thread that marked calls took since the last ``take``, in seconds."""

    def __init__(self) -> None:
        self.spent = 0.0

    def marked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments, **keywords)
            finally:
                self.spent += time.thread_time() - started

        return timed

    def mark(self, places: tuple[tuple[str, str], ...]) -> None:
        for place, names in places:
            module, _, kind = place.partition(":")
            with suppress(ModuleNotFoundError):
                found = import_module(f"transom.runtime.{module}")
                owner = getattr(found, kind) if kind else found
                for name in filter(lambda name: hasattr(owner, name), names.split()):
                    setattr(owner, name, self.marked(getattr(owner, name)))

    def take(self) -> float:
        spent, self.spent = self.spent, 0.0
        return spent


class TimedSession:
    """An ONNX Runtime session that notes the CPU time between its runs and what of it was spent in marked calls."""

    def __init__(self, session: Any, clocks: dict[str, Clock]) -> None:
        self._session, self._clocks = session, clocks
        self._ended: float | None = None
        self.gaps: list[dict[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        started = time.thread_time()
        parts = {name: clock.take() for name, clock in self._clocks.items()}
        if self._ended is not None:
            self.gaps.append({"all": started - self._ended, **parts})
        self._session.run_with_iobinding(binding)
        self._ended = time.thread_time()


def microseconds(call: Callable[[], Any]) -> float:
    """Return the median CPU time of a call, over repeats of CALLS of them."""
    found = []
    for _ in range(REPEATS):
        started = time.thread_time()
        for _ in range(CALLS):
            call()
        found.append((time.thread_time() - started) / CALLS * 1e6)
    return statistics.median(found)


def decode(folder: str) -> dict[str, float]:
    """Return microseconds of a step by its part, greedy and of four beams."""
    import numpy as np

    from transom.runtime import load

    logits, rows = Clock(), Clock()
    logits.mark(READS_LOGITS)
    rows.mark(COPIES_ROWS)
    found: dict[str, float] = {}
    with load(folder, threads=1) as bundle:
        backend = bundle.backend("decoder")
        session = backend._session = TimedSession(backend._session, {"logits": logits, "rows": rows})
        vocabulary = int(backend.graph.outputs[0].shape[2])
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, bundle.vocabulary, PROMPT).tolist()
        for name, beams in (("greedy", 1), ("beams", 4)):
            inline = unmarked_reads(rng.normal(size=(beams, vocabulary)).astype(np.float32), beams)
            for _ in range(2):  # the first warms up
                session.gaps.clear()
                bundle.generate(prompt, max_new_tokens=NEW, min_new_tokens=0, eos_token_id=None, num_beams=beams)
            steps = session.gaps[len(session.gaps) // 5 :]  # the first are those of prefill, and of beams that fork
            parts = {part: statistics.median(gap[part] for gap in steps) * 1e6 for part in ("all", "logits", "rows")}
            read = parts["logits"] + inline
            python = statistics.median(gap["all"] - gap["logits"] - gap["rows"] for gap in steps) * 1e6 - inline
            found |= {name: python, f"{name}, reading logits": read, f"{name}, rows of the cache": parts["rows"]}
    return found


def unmarked_reads(logits: Any, beams: int) -> float:
    """Return microseconds of what reads all logits outside marked functions."""
    if beams == 1:
        return microseconds(lambda: logits.argmax(axis=1))
    try:
        from transom.runtime.numeric import log_normalisers  # noqa: F401  of versions whose beams take the maxima apart
    except ImportError:
        return 0.0
    return microseconds(lambda: logits.max(axis=1))


def encode(folder: str) -> dict[str, float]:
    """Return microseconds of a run beyond a session's run over memory that was bound once, one row and two."""
    import numpy as np

    from transom.runtime import load

    found = {}
    with load(folder, threads=1) as bundle:
        backend = bundle._backends[0]
        tensors = {tensor.name: tensor for tensor in backend.graph.inputs}
        ones = np.ones((1, min(16, bundle.max_size("S"))), np.int64)
        feeds = {name: ones if name != "token_type_ids" else ones * 0 for name in tensors}
        binding = backend._session.io_binding()
        outputs = bundle.run(feeds)
        for bind, arrays in ((binding.bind_input, feeds), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        differences = []
        for _ in range(5):
            bound = microseconds(lambda: backend._session.run_with_iobinding(binding))
            differences.append(microseconds(lambda: bundle.run(feeds)) - bound)
        found["run"] = statistics.median(differences)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", required=True, help="a bundle that generates from token ids, such as GPT-2's")
    parser.add_argument("--encoder", required=True, help="a small bundle of a BERT")
    parser.add_argument("--side", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # one side's process
    options = parser.parse_args()
    if options.measure:
        print(json.dumps({**decode(options.decoder), **encode(options.encoder)}))
        return
    sides = dict(side.split("=", 1) for side in options.side) or {"ours": sys.executable}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    command = [str(Path(__file__)), "--measure", "--decoder", options.decoder, "--encoder", options.encoder]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # a side is as installed

    def printed(*command: str) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout

    for _ in range(options.rounds):
        for name, python in sides.items():
            measured = json.loads(printed(python, *command))
            measured["import transom.runtime"] = statistics.median(float(printed(python, "-c", IMPORT)) for _ in "abc")
            found[name].append(measured)
    print(f"| microseconds, {processor()} | {' | '.join(sides)} |\n|---|{'---|' * len(sides)}")
    for part in found[next(iter(sides))][0]:
        cells = [f"{statistics.median(each[part] for each in found[name]):.0f}" for name in sides]
        print(f"| {part} | {' | '.join(cells)} |")


def processor() -> str:
    from transom.runtime.host import processor

    return str(processor())


if __name__ == "__main__":
    main()
