"""Compare what ``transom capacity`` predicts with a real run: Poisson arrivals at three loads, in real time.

    python benchmarks/capacity_check.py BUNDLE --shape S=128 --threads 1 --limit 8                  in this process
    python benchmarks/capacity_check.py BUNDLE ... --triton 127.0.0.1:8001 --model minilm_model     through Triton
    python benchmarks/capacity_check.py BUNDLE ... --write              ... and write docs/results/capacity-check-*

Service times are measured first, as the command does, and at the end again: how far their medians moved says how quiet
the machine was. Then requests of one row are sent at 30, 60 and 80 % of what full batches allow, each at its time
whatever became of the others, through ``Service`` behind a batching queue (batching_queue.py), or over gRPC to a model
that a Triton server has loaded: `transom repository BUNDLE --out DIR --kind tensors --instances N --threads N
--max-batch LIMIT` with the same numbers, of a bundle that generates ``--kind task``. A latency is that from a request's
planned time to its answer. "Predicted" is the simulation at the rate, "replayed" one of the very arrivals that were
sent, so that the difference of these two is chance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from batching_queue import BatchingQueue, Sent, send_at

from transom.runtime import load
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.bench import Effort, example_feeds
from transom.runtime.capacity.queueing import (
    Batching,
    Times,
    most_per_s,
    poisson_arrivals,
    serve,
    service_table,
    simulate,
)
from transom.runtime.capacity.service_times import measure_service_times, work_of
from transom.runtime.host import cpu_name, instruction_set, usable_cores
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.service import Request, Service
from transom.runtime.serving.tasks import task_operation
from transom.runtime.serving.tensors import graph_operation
from transom.runtime.tasks.generator import Generator

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
LOADS = (0.3, 0.6, 0.8)
REPLAYS = 20  # of the arrivals that were sent, each with other service times
MOST_REQUESTS = 200_000  # of one load
DIFFERENT = 8  # requests, sent in turn
PATIENCE_S = 120  # for answers after the last request
WORDS = ["it", "is", "a", "truth", "universally", "acknowledged", "that", "single", "man", "good", "fortune"]
COLUMNS = (
    *("load", "requests/s", "requests", "batch, predicted / measured", "", "predicted", "replayed", "measured"),
    "measured / predicted",
)


def sizes(text: str) -> dict[str, int]:
    return {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}


def operation_and_requests(
    loaded: Any, work_sizes: Mapping[str, int], graph: str | None
) -> tuple[Operation, list[Request]]:
    """Return the operation of a graph, or of a task that generates, and requests of one row each for it."""
    if isinstance(loaded, Generator):
        operation, new = task_operation(loaded), work_sizes["new"]
        parameters = {"max_new_tokens": new, "min_new_tokens": new}
        rng = np.random.default_rng(0)
        arrays = [prompt_arrays(loaded, operation, rng, work_sizes.get("S", 1)) for _ in range(DIFFERENT)]
        return operation, [Request(each, parameters) for each in arrays]
    chosen = next(file.graph for file in loaded.manifest.graphs if graph in (None, file.graph.name))
    operation = graph_operation(loaded, chosen.name)
    feeds = example_feeds(chosen, {**work_sizes, "B": DIFFERENT})
    return operation, [Request({name: array[[row]] for name, array in feeds.items()}) for row in range(DIFFERENT)]


def prompt_arrays(loaded: Any, operation: Operation, rng: np.random.Generator, length: int) -> dict[str, Any]:
    """Return a prompt of about ``length`` tokens as the operation takes it: text, or ids."""
    names = [port.name for port in operation.inputs]
    if names == ["input_ids"]:
        return {"input_ids": np.array(loaded.random_prompts(rng, 1, length), np.int64)}
    if names != ["text"]:
        sys.exit(f"this benchmark sends texts and ids; {loaded.manifest.name} takes {', '.join(names)}.")
    words: list[str] = []
    while len(words) < length:
        word = WORDS[int(rng.integers(len(WORDS)))]
        if len(loaded.tokenizer().row(" ".join([*words, word]), truncate=True).ids) > length:
            break
        words.append(word)
    return {"text": np.array([[" ".join(words or WORDS[:1]).encode()]], object)}


Batches = list[tuple[int, float]]  # requests and seconds of each


def triton_sender(
    address: str, model: str, operation: Operation
) -> tuple[Callable[[Sent], None], Callable[[], None], Callable[[], Batches]]:
    """Return what sends a request over gRPC, what waits until all were answered, and what lists the batches since."""
    import tritonclient.grpc as grpc

    client = grpc.InferenceServerClient(address)
    if not client.is_model_ready(model):
        sys.exit(f"{address} has no model {model!r} that is ready; load it as this benchmark's --help says.")
    kinds = {
        port.name: {"bytes": "BYTES", "int64": "INT64", "float32": "FP32"}[port.dtype] for port in operation.inputs
    }
    open_requests = threading.Semaphore(0)
    count = 0

    def batches_so_far() -> dict[int, tuple[int, int]]:
        """Return, by size, how many batches the server computed, and their nanoseconds in all."""
        (stats,) = client.get_inference_statistics(model).model_stats
        return {
            int(one.batch_size): (int(one.compute_infer.count), int(one.compute_infer.ns)) for one in stats.batch_stats
        }

    before = batches_so_far()

    def answered(sent: Sent, result: Any, error: Any) -> None:
        sent.answered, sent.error = time.perf_counter(), error
        open_requests.release()

    def send(sent: Sent) -> None:
        nonlocal count
        count += 1
        inputs = []
        for name, array in sent.request.inputs.items():
            inputs.append(grpc.InferInput(name, list(array.shape), kinds[name]))
            inputs[-1].set_data_from_numpy(array)
        sent.sent = time.perf_counter()
        client.async_infer(model, inputs, partial(answered, sent), parameters=dict(sent.request.parameters) or None)

    def wait() -> None:
        nonlocal count
        deadline = time.monotonic() + PATIENCE_S
        for _ in range(count):
            if not open_requests.acquire(timeout=max(0.0, deadline - time.monotonic())):
                sys.exit(f"some requests had no answer {PATIENCE_S} s after the last was sent.")
        count = 0

    def batches() -> Batches:
        found: Batches = []
        for size, (many, ns) in batches_so_far().items():
            earlier = before.get(size, (0, 0))
            if many > earlier[0]:
                found += [(size, (ns - earlier[1]) / (many - earlier[0]) / 1e9)] * (many - earlier[0])
        return found

    return send, wait, batches


def run_load(
    rate: float, seconds: float, seed: int, requests: Sequence[Request], send: Callable[[Sent], None]
) -> list[Sent]:
    """Send requests at a rate for some seconds, in this thread."""
    count = min(MOST_REQUESTS, max(1, round(rate * seconds)))
    planned = poisson_arrivals(np.random.default_rng(seed), rate, count) / 1e3
    return send_at(planned.tolist(), requests, send)


def replayed(sent: Sequence[Sent], table: Times, batching: Batching) -> dict[str, float]:
    """Return percentiles of a simulation of the very arrivals that were sent."""
    arrivals = np.array([each.arrival for each in sent]) * 1e3
    rng = np.random.default_rng(0)
    runs = [
        serve(arrivals, table, rng.integers(0, table.shape[1], len(arrivals)), batching).latency_ms
        for _ in range(REPLAYS)
    ]
    return percentiles(np.concatenate(runs))


def percentiles(latency_ms: Times) -> dict[str, float]:
    p50, p95, p99 = np.percentile(latency_ms, [50, 95, 99]).tolist()
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def compare(
    rate: float,
    load_: float,
    sent: Sequence[Sent],
    batches: Batches,
    table: Times,
    batching: Batching,
) -> dict[str, Any]:
    """Return what was predicted and measured at one load."""
    expected = simulate(rate, table, batching)
    errors = [each.error for each in sent if each.error is not None]
    latency = np.array([each.answered - each.arrival for each in sent]) * 1e3
    took_ms = sum(seconds for _, seconds in batches) * 1e3
    return {
        "load": load_,
        "rate_per_s": rate,
        "requests": len(sent),
        "errors": len(errors),
        "first_error": str(errors[0]) if errors else None,
        "predicted": {name: getattr(expected, name) for name in ("p50_ms", "p95_ms", "p99_ms", "mean_batch", "busy")},
        "replayed": replayed(sent, table, batching),
        "measured": percentiles(latency) | {"mean_batch": len(sent) / len(batches)},
        "late_p99_ms": float(np.percentile([each.sent - each.arrival for each in sent], 99)) * 1e3,
        "batch_time_ratio": took_ms / sum(float(table[size - 1].mean()) for size, _ in batches),
    }


def table_of(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown: a line for p50 and one for p99 of each load, milliseconds."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    for each in results["loads"]:
        for name in ("p50_ms", "p99_ms"):
            predicted, again, measured = (each[kind][name] for kind in ("predicted", "replayed", "measured"))
            batch = " / ".join(f"{each[kind]['mean_batch']:.2f}" for kind in ("predicted", "measured"))
            lines.append(
                f"| {each['load']:.0%} | {each['rate_per_s']:.1f} | {each['requests']} | "
                f"{batch} | {name[:3]} | {predicted:.2f} | {again:.2f} | {measured:.2f} | "
                f"{measured / predicted:.2f} |"
            )
    return "\n".join(lines)


def page_of(results: Mapping[str, Any]) -> str:
    """Return the page of docs/results: what ran where, service times, and the table."""
    axes = ", ".join(f"{name}={size}" for name, size in results["sizes"].items())
    service = ", ".join(f"{rows}: {ms:.2f}" for rows, ms in results["service_p50_ms"].items())
    moved = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in results["service_moved"].items())
    times = ", ".join(f"at {each['load']:.0%} {each['batch_time_ratio']:.2f}" for each in results["loads"])
    late = max(each["late_p99_ms"] for each in results["loads"])
    return "\n".join(
        [
            f"{results['bundle']}, {results['work']}{', ' if axes else ''}{axes}; {results['replicas']} replica(s) of "
            f"{results['threads']} thread(s), batches of at most {results['limit']}, {results['via']}.",
            f"{results['cpu']}, `{results['instruction_set']}`, {results['cores']} cores, onnxruntime "
            f"{results['onnxruntime']}, {results['date']}; milliseconds.",
            "",
            table_of(results),
            "",
            f"Service time by batch size, p50: {service}. Measured again at the end, as a ratio: {moved}.",
            f"Time of the batches of the run, as a ratio to the service times measured before: {times}.",
            f"Requests were sent late by {late:.2f} ms at p99 at most; "
            f"{sum(each['errors'] for each in results['loads'])} failed.",
            "",
        ]
    )


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Measure service times, run the three loads, and return everything that was found."""
    bundles = [load(options.bundle, threads=options.threads) for _ in range(1 if options.triton else options.replicas)]
    first = bundles[0]
    work = work_of(first, options.shape, graph=options.graph, max_batch=options.limit, new_tokens=options.new_tokens)
    limit = max(work.calls)
    batching = Batching(options.replicas, limit, options.delay_us / 1e3 if limit > 1 else 0.0)
    effort = Effort(300, 10, options.service_seconds, say)
    measured = measure_service_times(work.calls, effort)
    table = service_table(measured, limit)
    operation, requests = operation_and_requests(first, work.sizes, options.graph)
    loads = []
    for number, load_ in enumerate(options.load):
        rate = load_ * most_per_s(table, batching)
        say(f"{load_:.0%}: {rate:.1f} requests/s for {options.seconds:g} s", 0, 1)
        if options.triton:
            send, wait, batches_since = triton_sender(options.triton, options.model, operation)
            sent = run_load(rate, options.seconds, number, requests, send)
            wait()
            batches = batches_since()
        else:
            own = [operation_and_requests(each, work.sizes, options.graph)[0] for each in bundles]
            queue = BatchingQueue([Service(each).answer for each in own], limit, batching.delay_ms / 1e3)
            try:
                sent = run_load(rate, options.seconds, number, requests, queue.send)
            finally:
                queue.close()
            batches = queue.batches
        loads.append(compare(rate, load_, sent, batches, table, batching))
    again = measure_service_times(work.calls, effort)
    for each in bundles:
        each.close()
    return {
        "bundle": Path(options.bundle).name,
        "work": work.name,
        "sizes": dict(work.sizes),
        "via": f"Triton, model {options.model}" if options.triton else "in one process",
        "replicas": options.replicas,
        "threads": options.threads,
        "limit": limit,
        "delay_us": options.delay_us,
        "service_p50_ms": {rows: float(np.median(times)) for rows, times in measured.items()},
        "service_moved": {rows: float(np.median(again[rows]) / np.median(times)) for rows, times in measured.items()},
        "loads": loads,
        "cpu": cpu_name(),
        "instruction_set": instruction_set(),
        "cores": usable_cores(),
        "onnxruntime": str(onnxruntime().__version__),
        "date": date.today().isoformat(),
    }


def say(what: str, done: int, total: int) -> None:
    if done == 0:
        print(f"{what} ...", file=sys.stderr, flush=True)


def write(results: Mapping[str, Any]) -> Path:
    """Write the figures and their page to docs/results, in files named by bundle, server and processor."""
    words = ["capacity-check", results["bundle"], *(["triton"] * results["via"].startswith("Triton")), results["cpu"]]
    stem = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    (RESULTS / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = RESULTS / f"{stem}.md"
    page.write_text(f"# Predicted and measured latency\n\n{page_of(results)}", encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--shape", type=sizes, default={}, metavar="S=128", help="sizes of the axes, the rows apart")
    parser.add_argument("--graph", help="the graph, where there are several")
    parser.add_argument("--new-tokens", type=int, help="of each row, where the bundle generates")
    parser.add_argument("--limit", type=int, metavar="N", help="requests in a batch at most; the bundle's own limit")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="of this bundle; each needs its cores")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each replica")
    parser.add_argument("--delay-us", type=int, default=0, metavar="N", help="microseconds that a batch waits for more")
    parser.add_argument("--load", type=float, nargs="+", default=LOADS, help="parts of what full batches allow")
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--service-seconds", type=float, default=5, help="of each batch size, before and after")
    parser.add_argument("--triton", metavar="HOST:PORT", help="gRPC of a Triton server that has loaded --model")
    parser.add_argument("--model", help="its name there")
    parser.add_argument("--write", action="store_true", help="write the page and the figures into docs/results")
    options = parser.parse_args()
    if bool(options.triton) != bool(options.model):
        parser.error("--triton and --model belong together")
    results = check(options)
    print(page_of(results))
    if options.write:
        print(f"wrote {write(results)}")


if __name__ == "__main__":
    main()
