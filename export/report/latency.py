"""How long a call took on the machine that made the report."""

from __future__ import annotations

from transom.export.report.drawing.markup import numeric, section, table, words
from transom.export.report.drawing.numbers import milliseconds, short, sizes_text
from transom.runtime.bench import BenchReport, Timing

RUNS, WARMUP, SECONDS = 60, 3, 1.5  # per graph: enough for a look, not for a comparison


def usual(report: BenchReport) -> Timing:
    """The time that a user feels: of what generates, of one more token."""
    return next((timing for timing in report.timings if timing.name == "decode"), report.timings[0])


def one(timing: Timing) -> str:
    """What one time is of: a token, where text is generated, or a call of a graph."""
    return "one token" if timing.name == "decode" else f"one call of {words(timing.name, 60)}"


def latency_section(report: BenchReport) -> str:
    """A row of times per graph, and from the median to the 95th percentile as a line."""
    threads = f"{report.threads} threads" if report.threads else "one thread per core"
    rows = [
        [
            one(timing),
            sizes_text(timing.sizes),
            *(milliseconds(value) for value in (timing.p50_ms, timing.p95_ms, timing.p99_ms)),
            f"{short(timing.items_per_s, 3)} {words(timing.items)}/s",
            str(timing.runs),
        ]
        for timing in report.timings
    ]
    head = ("what", "at", "p50", "p95", "p99", "throughput", "runs")
    return section(
        "Latency",
        f"<p>Measured when this page was made, on {words(report.cpu)} ({report.instruction_set}): {report.cores} cores "
        f"usable, {threads}, ONNX Runtime {words(report.onnxruntime)}, device {words(report.device)}. Loading took "
        f"{report.load_s:.2f} s. "
        '<span class="soft">A short look, checks and copies included, while the machine may have been busy; '
        "<code>transom bench</code> measures properly.</span></p>",
        table(head, rows, numeric(2, 3, 4, 5, 6)),
    )
