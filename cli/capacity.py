"""``transom capacity``: from requests per second to replicas, with service times measured on this machine."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from transom.cli.options import BundlePath, Device, Json, Threads, sizes
from transom.cli.output import print_fields, print_json, print_table
from transom.cli.progress import progress
from transom.runtime.format import milliseconds, sizes_text

if TYPE_CHECKING:
    from transom.runtime.capacity.plan import Alternative, CapacityReport

UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def capacity(
    bundle: BundlePath,
    rate: Annotated[
        float,
        typer.Option(metavar="N", help="Requests per second, of one row each, to be answered.", show_default=False),
    ],
    p99: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="The time, such as 50ms or 1.5s, in which 99 of 100 requests are answered, waiting included.",
            show_default=False,
        ),
    ],
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="S=128", help="Sizes of the axes, the rows B apart.", show_default="what the bundle is tuned for"
        ),
    ] = None,
    graph: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The graph to measure, where there are several.", show_default="the first"),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="New tokens of each row, where the bundle generates.",
            show_default="64, if they fit",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Largest batch to consider.", show_default="the bundle's own limit"),
    ] = None,
    queue_delay: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long a batch waits for more requests, such as 500us.",
            show_default="none, or one that saves a replica",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Timed calls per batch size, at most.")] = 300,
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Time per batch size after which no further call is made.")
    ] = 5.0,
    busy_replicas: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Other replicas at work here while it is measured, as they will be in service."
        ),
    ] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find how many replicas answer a rate of requests in time.

    A replica is one process that has the bundle loaded and answers one batch at a time, with --threads
    cores: a model instance of Triton, an actor of Ray, a pod. As a rule many replicas of one thread carry
    more requests, and few of many threads answer each sooner: compare --threads 1 and 2.

    \b
    1. The service time of batches of 1, 2, 4, ... rows is measured here.
       encoder    one call of the graph, as `transom bench` times it. Reading
                  text or images is not in it.
       generator  a whole generation of --new-tokens: the prompts are read
                  together, every step makes a token for each row, and the
                  batch ends with its longest answer. So give the length of
                  long answers, not of usual ones. Beams are the checkpoint's
                  own. A new request waits for the end of the batch before it.
    2. A queue is simulated: requests of one row arrive independently of each
       other (Poisson); a free replica takes what waits, at most the batch
       limit, and needs a service time drawn from the measured ones. This is
       Triton's dynamic batching.
    3. Printed are, for each batch limit, the fewest replicas that keep --p99,
       one less and one more, and then the fewest of all. "busy" is the part of
       the time that a replica works, "batch" how many requests share one, and
       "most/s" the rate from which on the queue only grows. Callers that come
       in bursts need more replicas. The network is not in it.

    Measure on a machine that is otherwise idle. Replicas that share one share its memory and caches, too:
    with --busy-replicas 3 the times are those of one of four that are all at work.
    """
    check_number(rate, "--rate")
    target_ms = time_ms(p99, "--p99")
    delay_ms = None if queue_delay is None else time_ms(queue_delay, "--queue-delay", zero=True)
    asked = sizes(shape, "--shape") if shape else {}
    with progress(quiet=as_json) as report:
        from transom.runtime.capacity import plan as runtime

        found = runtime.capacity(
            bundle,
            rate,
            target_ms,
            asked,
            graph=graph,
            max_batch=max_batch,
            new_tokens=new_tokens,
            queue_delay_ms=delay_ms,
            runs=runs,
            seconds=seconds,
            device=device,
            threads=threads,
            busy_replicas=busy_replicas,
            progress=report,
        )
    if as_json:
        print_json(document(str(bundle), found))
        return
    print_service_times(found)
    print()
    print_alternatives(found)
    print()
    print_fields(answer_lines(str(bundle), found))


def check_number(rate: float, option: str) -> None:
    """Raise BadParameter for a rate that is no number above zero."""
    if not (math.isfinite(rate) and rate > 0):
        raise typer.BadParameter(f"{option} is {rate:g}; expected requests per second, above 0, such as 200.")


def time_ms(text: str, option: str, *, zero: bool = False) -> float:
    """Parse ``50ms``, ``0.05s`` or ``500us`` into milliseconds; BadParameter for anything else, 0 unless allowed."""
    word = text.strip()
    unit = next((unit for unit in UNITS_MS if word.endswith(unit)), None)  # "s" last: the others end in it
    try:
        value = float(word.removesuffix(unit)) * UNITS_MS[unit] if unit else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        wanted = "0ms, 500us or 2ms" if zero else "50ms, 1.5s or 800us"
        raise typer.BadParameter(f"{option} is {text!r}; expected a time with its unit, such as {wanted}.")
    return value


def print_service_times(found: CapacityReport) -> None:
    """Print the measured service times, one line per batch size."""
    at = f", {sizes_text(found.sizes)}" if found.sizes else ""
    beside = f", {counted(found.busy_replicas, 'other replica')} at work" if found.busy_replicas else ""
    print(f"service time of the {found.work}{at}, {threads_text(found)} on {found.device}{beside}")
    columns = ("batch", "runs", "p50 ms", "p95 ms", "p99 ms", "most ms", "rows/s")
    rows = [
        [
            str(one.batch),
            str(one.runs),
            *(f"{ms:.3f}" for ms in (one.p50_ms, one.p95_ms, one.p99_ms, one.most_ms)),
            f"{one.rows_per_s:.1f}",
        ]
        for one in found.service
    ]
    print_table(columns, rows, right=columns)


def print_alternatives(found: CapacityReport) -> None:
    """Print batch limits and numbers of replicas, what they are expected to do, and which keep the p99."""
    print(f"{found.rate_per_s:g} requests/s, p99 within {milliseconds(found.p99_ms)}")
    columns = ("batch limit", "replicas", "delay ms", "busy", "batch", "p50 ms", "p95 ms", "p99 ms", "most/s", "keeps")
    delayed = any(one.expected.batching.delay_ms for one in found.plan.alternatives)
    shown = [name for name in columns if delayed or name != "delay ms"]
    rows = []
    for one in found.plan.alternatives:
        expected = one.expected
        cells = {
            "batch limit": str(expected.batching.limit),
            "replicas": str(expected.batching.replicas),
            "delay ms": f"{expected.batching.delay_ms:g}",
            "busy": f"{expected.busy:.0%}",
            "batch": f"{expected.mean_batch:.2f}",
            "p50 ms": f"{expected.p50_ms:.2f}",
            "p95 ms": f"{expected.p95_ms:.2f}",
            "p99 ms": f"{expected.p99_ms:.2f}",
            "most/s": f"{one.most_per_s:.0f}",
            "keeps": ("yes" if one.keeps else "no") + (" <" if one is found.plan.answer else ""),
        }
        rows.append([cells[name] for name in shown])
    print_table(shown, rows, right=[name for name in shown if name != "keeps"])


def answer_lines(bundle: str, found: CapacityReport) -> Iterator[tuple[str, str]]:
    """Yield the answer, what a replica is and how many fit here, how to serve it, and what was measured on."""
    answer = found.plan.answer
    batching, expected = answer.expected.batching, answer.expected
    batches = f"batches of at most {batching.limit}" if batching.limit > 1 else "one row at a time"
    delay = f" after {milliseconds(batching.delay_ms)} in the queue at most" if batching.delay_ms else ""
    yield "answer", f"{counted(batching.replicas, 'replica')}, {batches}{delay}"
    yield (
        "expected",
        f"p50 {milliseconds(expected.p50_ms)}, p99 {milliseconds(expected.p99_ms)} "
        f"({milliseconds(expected.p99_lowest_ms)} to {milliseconds(expected.p99_highest_ms)} in simulated runs), "
        f"{expected.busy:.0%} busy",
    )
    yield "replica", f"one process with the bundle loaded, {threads_text(found)}"
    yield "machines", machines_text(found)
    if found.note:
        yield "note", found.note
    yield "serve", serve_command(bundle, found)
    yield "cpu", f"{found.cpu}, {found.instruction_set}"
    yield "onnxruntime", found.onnxruntime


def machines_text(found: CapacityReport) -> str:
    """Return how many replicas this machine has cores for, and how many such machines the answer takes."""
    cores, here = counted(found.cores, "core"), found.replicas_here
    if here is None:
        return "replicas on one GPU share it: measure with --busy-replicas"
    if here == 0:
        return f"this one has {cores}, fewer than the threads of a replica: give --threads {found.cores} at most"
    return f"this one, {cores}, holds {here}; the answer takes {counted(machines(found) or 1, 'machine')} like it"


def machines(found: CapacityReport) -> int | None:
    """Return how many machines like this one the answer takes; None where no replica fits, or that is not known."""
    return (
        math.ceil(found.plan.answer.expected.batching.replicas / found.replicas_here) if found.replicas_here else None
    )


def threads_text(found: CapacityReport) -> str:
    return "a thread per core" if found.threads is None else counted(found.threads, "thread")


def counted(number: int, noun: str) -> str:
    """Return ``1 thread``, ``2 threads``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def serve_command(bundle: str, found: CapacityReport) -> str:
    """Return the command that makes a Triton repository with the answer: as many replicas as this machine holds."""
    batching = found.plan.answer.expected.batching
    instances = min(batching.replicas, found.replicas_here or batching.replicas)
    words = ["transom repository", shlex.quote(bundle), "--out models", f"--instances {instances}"]
    words += [f"--threads {found.threads}"] if found.threads else []
    words += [f"--max-batch {batching.limit}"]
    words += [f"--queue-delay {round(batching.delay_ms * 1e3)}"] if batching.delay_ms else []
    return " ".join(words)


def document(bundle: str, found: CapacityReport) -> dict[str, object]:
    """Return the answer, the alternatives and the service times as the one JSON document of ``--json``."""
    return {
        "bundle": bundle,
        **{name: value for name, value in vars(found).items() if name not in ("plan", "service")},
        "machines": machines(found),
        "service": [vars(one) for one in found.service],
        "answer": entry(found.plan.answer),
        "alternatives": [entry(one) for one in found.plan.alternatives],
    }


def entry(alternative: Alternative) -> dict[str, object]:
    """Return an alternative as one flat JSON object."""
    expected = {name: value for name, value in vars(alternative.expected).items() if name != "batching"}
    batching = vars(alternative.expected.batching)
    return {**batching, **expected, "most_per_s": alternative.most_per_s, "keeps": alternative.keeps}
