"""Measure embeddings per second through Triton Inference Server beside the bare runtime, interleaved in one run.

    python benchmarks/triton_serving.py bundles/minilm                        gRPC and HTTP beside the runtime
    python benchmarks/triton_serving.py bundles/minilm --sweep                instances, threads, batch sizes, delays
    python benchmarks/triton_serving.py bundles/minilm --sweep --write        ... and renew the page of results

Run it in the environment that `make serving-env` makes for Triton. 16 callers ask for one text of 128 tokens at a time,
again and again: threads that call ``embed`` of one loaded bundle, and threads that ask the server of
examples/triton_server.py, all on this machine, so that clients take their share of its cores. Sides take turns in an
order that changes with each round; the ratio within a round is what counts. Ends with status 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import numpy as np

from serving_engines import bytes_of
from transom.export.triton.repository import Options, write_repository
from transom.runtime import load
from transom.runtime.host import processor, usable_cores
from transom.runtime.serving.service import Request
from triton_requests import LIBRARIES, PROTOCOLS, Triton, running, tensors

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "triton_serving.md"
TOKENS = 128
WORDS = ("people", "city", "house", "water", "number", "world", "place", "small", "again", "under", "never", "great")
Call = Callable[[], Any]
Side = Callable[[], Any]  # a context of a caller: gives the call that it repeats


@dataclass(frozen=True, order=True)
class Config:
    """How a model is served."""

    instances: int
    threads: int
    max_batch: int
    delay_us: int

    @property
    def name(self) -> str:
        return f"i{self.instances}_t{self.threads}_b{self.max_batch}_d{self.delay_us}"


@dataclass(frozen=True)
class Round:
    """What one side did in one round."""

    per_second: float
    p50_ms: float
    p99_ms: float


def text_of(bundle: Any) -> str:
    """Return a text of TOKENS tokens."""
    for count in range(TOKENS):
        text = " ".join(WORDS[number % len(WORDS)] for number in range(count))
        (row,) = bundle.tokenizer().encode([text or "a"], truncate=False).rows
        if len(row.ids) == TOKENS:
            return text
    raise SystemExit(f"no text of {TOKENS} tokens was found")


def measured(side: Side, callers: int, seconds: float) -> Round:
    """Let callers repeat their calls for some seconds, each from its own thread."""
    latencies: list[list[float]] = [[] for _ in range(callers)]
    ready, begin = threading.Barrier(callers + 1), threading.Event()
    ends: list[float] = []

    def caller(number: int) -> None:
        with side() as call:
            call()
            ready.wait()
            begin.wait()
            until = time.perf_counter() + seconds
            while (started := time.perf_counter()) < until:
                call()
                latencies[number].append(time.perf_counter() - started)
            ends.append(time.perf_counter())

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    begin.set()
    for thread in threads:
        thread.join()
    every = [latency for each in latencies for latency in each]
    p50, p99 = np.percentile(every, [50, 99]) * 1000
    return Round(len(every) / (max(ends) - started), float(p50), float(p99))


def bare(bundle: Any, text: str) -> Side:
    """Return the side of threads that call the runtime."""

    @contextmanager
    def side() -> Iterator[Call]:
        yield lambda: bundle.embed([text])

    return side


def served(triton: Triton, protocol: str, model: str, text: str) -> Side:
    """Return the side of threads that ask the server, each with a client of its own that stays connected."""
    request = Request({"text": bytes_of([text])})

    @contextmanager
    def side() -> Iterator[Call]:
        library = LIBRARIES[protocol]
        with library.InferenceServerClient(triton.addresses[protocol]) as client:
            yield lambda: client.infer(model, tensors(library, request)).as_numpy("embedding")

    return side


def alternated(sides: Mapping[str, Side], rounds: int, callers: int, seconds: float) -> dict[str, list[Round]]:
    """Measure every side in every round, in another order each time."""
    found: dict[str, list[Round]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        shift = number * max(1, len(names) // rounds) % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(measured(sides[name], callers, seconds))
            print(f"round {number + 1}: {name:24s} {found[name][-1].per_second:7.1f} a second", flush=True)
    return found


def table(found: Mapping[str, Sequence[Round]], reference: str) -> list[str]:
    """Return the lines of a table: medians over rounds, and the median of the ratios within a round."""
    lines = [
        "| side | requests/s | ratio | ratios of rounds | p50 ms | p99 ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rounds in found.items():
        ratios = [one.per_second / other.per_second for one, other in zip(rounds, found[reference], strict=True)]
        rate, p50, p99 = (statistics.median(getattr(each, key) for each in rounds) for key in Round.__annotations__)
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {name} | {rate:.1f} | {statistics.median(ratios):.2f} | {span} | {p50:.0f} | {p99:.0f} |")
    return lines


def sweep_of(cores: int) -> list[Config]:
    """Return the configurations of a sweep: instances and threads that use the cores or half of them."""
    pools = sorted({(1, 1), (1, cores), (cores, 1)})
    batching = [(1, 0), (4, 0), (8, 0), (8, 1000), (8, 5000), (16, 0), (32, 0)]
    return [Config(*pool, *batch) for pool, batch in product(pools, batching)]


def write_models(folder: Path, bundle: Path, configs: Sequence[Config]) -> list[Path]:
    """Write a repository for each configuration, with one model of its name."""
    for config in configs:
        write_repository(
            folder / config.name,
            [bundle],
            Options(
                kinds=("task",),
                instances=config.instances,
                threads=config.threads,
                max_batch=config.max_batch,
                queue_delay_us=config.delay_us,
            ),
            name=config.name,
        )
    return [folder / config.name for config in configs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding bundle with a tokenizer")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep-rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each side in a round")
    parser.add_argument("--config", default="2,1,8,0", help="INSTANCES,THREADS,MAX-BATCH,DELAY-US (%(default)s)")
    parser.add_argument("--sweep", action="store_true", help="measure other configurations, over gRPC")
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.name}")
    options = parser.parse_args()
    config = Config(*map(int, options.config.split(",")))
    configs = sorted({config, *(sweep_of(usable_cores()) if options.sweep else ())})
    versions = ", ".join(f"{name} {version(name)}" for name in ("nvidia-pytriton", "tritonclient", "onnxruntime"))
    load_before = os.getloadavg()[0]  # of others: they take their share of every side
    print(f"on {processor()}, {usable_cores()} cores, load {load_before:.1f} before; {versions}", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        repositories = write_models(folder, options.bundle, configs)
        triton = stack.enter_context(running(*repositories, log=folder / "server.log"))
        pools = sorted({1, usable_cores()})
        bundles = {threads: stack.enter_context(load(options.bundle, threads=threads)) for threads in pools}
        text = text_of(bundles[1])
        runtime = {f"runtime, {threads} threads": bare(bundle, text) for threads, bundle in bundles.items()}
        through = {f"Triton, {protocol}": served(triton, protocol, config.name, text) for protocol in PROTOCOLS}
        found = alternated({**runtime, **through}, options.rounds, options.callers, options.seconds)
        best = max(runtime, key=lambda name: statistics.median(each.per_second for each in found[name]))
        lines = table(found, best)
        swept: list[str] = []
        if options.sweep:
            sides = {each.name: served(triton, "grpc", each.name, text) for each in configs}
            rounds = alternated({best: runtime[best], **sides}, options.sweep_rounds, options.callers, options.seconds)
            swept = table(rounds, best)
        with runtime[best]() as one, through["Triton, grpc"]() as two, through["Triton, http"]() as three:
            answers = [np.asarray(call()) for call in (one, two, three)]
    print("\n".join([*lines, "", *swept]))
    if options.write:
        PAGE.write_text(page(options, config, versions, load_before, lines, swept))
    return 0 if all(np.array_equal(answers[0], other) for other in answers[1:]) else 1


def page(
    options: Any, config: Config, versions: str, load_before: float, lines: Sequence[str], swept: Sequence[str]
) -> str:
    """Return the page of results."""
    head = f"""# Embeddings through Triton

`benchmarks/triton_serving.py`, {time.strftime("%Y-%m-%d")}, {processor()}, {usable_cores()} cores, which server,
clients and runtime share, and other processes too: the load average before the run was {load_before:.1f}.
{versions}.
{options.callers} callers, each asking for one text of {TOKENS} tokens at a time. Ratios are those of requests a second
within a round, beside the runtime's better side; medians of {options.rounds} rounds.

The model served: {config.instances} instances, {config.threads} thread(s) each, batches of at most \
{config.max_batch}, queue delay {config.delay_us} µs.
"""
    other = (
        "\n## Other configurations, over gRPC\n\n"
        "`i` instances, `t` threads of each, `b` largest batch, `d` queue delay in microseconds; "
        f"{options.sweep_rounds} rounds.\n\n"
    )
    return head + "\n" + "\n".join(lines) + "\n" + (other + "\n".join(swept) + "\n" if swept else "")


if __name__ == "__main__":
    sys.exit(main())
