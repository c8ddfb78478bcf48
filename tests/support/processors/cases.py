"""Choose what is run on which emulated processor, and read what came of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from processors.emulated import Processor, processors_of

SELFTEST, TESTS, COMMAND = PARTS = ("selftest", "tests", "command")
SMALL = ("vit", "clip", "gpt", "transformer", "bert")
LARGE = "minilm"  # takes minutes where the others take seconds: on one processor alone
LARGE_ON = "cortex-a76"
TESTS_ON = ("cortex-a76", "Haswell", "Nehalem")  # the others run tests where they are asked for by name
MODELS = (*SMALL, LARGE)
PRECISIONS = ("fp32", "fp16", "int8", "int4")
TIMEOUTS_S = {SELFTEST: 1800, TESTS: 5400, COMMAND: 900}
LARGE_TIMEOUT_S = 7200
TEST_TIMEOUT_S = 1800  # of one test, which pytest-timeout allows 900 s here
THREADS = "1"  # two emulated processes share two cores
IN_BUNDLES = "{bundles}/"
DIGIT, TEXT, PROMPT, DATE = "digit.png", "The capital of France is [MASK].", "It is a truth", "3 May 1979"

# What the command line is asked, by name; {bundles} is the folder of bundles, {digit} an image. Every one answers in
# JSON, which is compared with what the same command gives on the host; CHECKED are those that describe the machine.
COMMANDS: dict[str, tuple[str, ...]] = {
    "doctor": ("doctor",),
    "inspect vit-int8": ("inspect", "{bundles}/vit-int8"),
    "run bert-fp32, a text": ("run", "{bundles}/bert-fp32", TEXT),
    "run vit-fp32, an image": ("run", "{bundles}/vit-fp32", "{digit}"),
    "run clip-fp32, an image": ("run", "{bundles}/clip-fp32", "{digit}", "--label", "seven", "--label", "nine"),
    "run gpt-fp32, a prompt": ("run", "{bundles}/gpt-fp32", PROMPT, "--max-new-tokens", "12"),
    "run transformer-fp32, a date": ("run", "{bundles}/transformer-fp32", DATE, "--num-beams", "2"),
    "bench vit-int8": ("bench", "{bundles}/vit-int8", "--runs", "3", "--warmup", "1"),
    "selftest vit-int8": ("selftest", "{bundles}/vit-int8"),
}
CHECKED = ("doctor", "bench vit-int8", "selftest vit-int8")
CLOSE = 1e-4  # of FP32 answers on two processors, relative to the larger one or to 1


@dataclass(frozen=True)
class Case:
    """One process on one processor: the self-test of a bundle, a file of tests, or a command, by ``name``."""

    processor: str
    part: str
    name: str
    timeout_s: int

    def __str__(self) -> str:
        return f"{self.processor}, {'transom' if self.part == COMMAND else self.part} {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case. ``says`` fits a table's cell; ``reason`` is a failure's line.

    ``allowed`` and ``side`` are those of a self-test: what the error may be, and what it is compared with.
    """

    ok: bool
    says: str
    reason: str = ""
    allowed: float | None = None
    side: str | None = None


def plan(
    architecture: str,
    tests: Sequence[str],
    *,
    processors: Collection[str] = (),
    parts: Collection[str] = (),
    models: Collection[str] = (),
    precisions: Collection[str] = (),
) -> list[Case]:
    """Return every case of an architecture, ``tests`` as files' names; an empty choice chooses all.

    The quick ones come first, so that what is broken shows early; the large model comes last.
    """
    chosen = [each for each in processors_of(architecture) if not processors or each.name in processors]
    cases = []
    if not parts or COMMAND in parts:
        names = list(COMMANDS) if architecture == "aarch64" else ["doctor"]
        cases += [Case(each.name, COMMAND, name, TIMEOUTS_S[COMMAND]) for name in names for each in chosen]
    bundles = [] if parts and SELFTEST not in parts else list(bundles_of(architecture))
    bundles = [(m, p) for m, p in bundles if (not models or m in models) and (not precisions or p in precisions)]
    cases += [
        Case(each.name, SELFTEST, f"{model}-{precision}", TIMEOUTS_S[SELFTEST])
        for model, precision in bundles
        for each in chosen
        if model != LARGE
    ]
    if not parts or TESTS in parts:
        tested = [each for each in chosen if processors or each.name in TESTS_ON]
        cases += [Case(each.name, TESTS, name, TIMEOUTS_S[TESTS]) for name in tests for each in tested]
    cases += [
        Case(each.name, SELFTEST, f"{model}-{precision}", LARGE_TIMEOUT_S)
        for model, precision in bundles
        for each in chosen
        if model == LARGE and each.name == LARGE_ON
    ]
    return cases


def bundles_of(architecture: str) -> Iterator[tuple[str, str]]:
    """Yield (model, precision) of the bundles that are self-tested; on x86 those whose products are integers."""
    if architecture == "aarch64":
        yield from ((model, precision) for model in MODELS for precision in PRECISIONS)
    else:
        yield from ((model, "int8") for model in SMALL)
        yield "gpt", "int4"


def bundle_of(case: Case) -> str | None:
    """Return the name of the bundle that a case reads."""
    if case.part == COMMAND:
        return next((word[len(IN_BUNDLES) :] for word in COMMANDS[case.name] if word.startswith(IN_BUNDLES)), None)
    return case.name if case.part == SELFTEST else None


def bundles_needed(cases: Sequence[Case]) -> list[str]:
    """Return the names of the bundles that the cases read, each once, in their order."""
    return list(dict.fromkeys(name for name in map(bundle_of, cases) if name))


ERROR = re.compile(r"\(error ([-+.\w]+)\)")
ALLOWED = re.compile(r"\ballows (\d\S*\d|\d)|(\d\S*) is allowed")


def read_selftest(status: int, stdout: str, stderr: str) -> Outcome:
    """Read ``transom selftest --json``: the worst error of what is allowed; a failure's are in its message."""
    told = parsed(stdout)
    if status == 0 and "worst" in told:
        return Outcome(True, scientific(told["worst"]["error"]), "", float(told["tolerance"]), told["side"])
    message = str(told.get("error", {}).get("message", "")) or last_line(stderr) or f"ended with status {status}"
    error, allowed = ERROR.search(message), ALLOWED.search(message)
    side = "pytorch" if "from PyTorch" in message else "bundle" if "when it was built" in message else None
    return Outcome(
        False,
        f"**{scientific(float(error[1]))}**" if error else "**failed**",
        message,
        float(allowed[1] or allowed[2]) if allowed else None,
        side,
    )


def read_tests(status: int, stdout: str) -> Outcome:
    """Read pytest's last line: ``29 passed, 2 deselected in 160.79s``. No test at all is a failure, too."""
    line = last_line(stdout)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", line)}
    if status == 0 and counts.get("passed"):
        skipped = f", {counts['skipped']} skipped" if "skipped" in counts else ""
        return Outcome(True, f"{counts['passed']}{skipped}")
    wrong = counts.get("failed", 0) + counts.get("error", 0)
    first = next((text for text in stdout.splitlines() if text.startswith(("FAILED", "ERROR", "E  "))), line)
    says = f"**{wrong} failed**" if wrong else "**none ran**"
    return Outcome(False, says, first or f"ended with status {status}")


def read_command(name: str, processor: Processor, status: int, stdout: str, stderr: str, host: Any) -> Outcome:
    """Read a command's JSON: compared with the host's, or checked for what the processor must have."""
    told = parsed(stdout)
    if status != 0 or not told:
        message = str(told.get("error", {}).get("message", "")) or last_line(stderr) or f"ended with status {status}"
        return Outcome(False, "**failed**", message)
    problem = check(name, processor, told) if name in CHECKED else difference(told, host)
    return Outcome(not problem, "ok" if not problem else "**differs**", problem)


def check(name: str, processor: Processor, told: Mapping[str, Any]) -> str:
    """Return what is wrong with the answer of a command that describes the machine, or nothing."""
    if name == "doctor":
        seen = {*told["cpu"]["instructions"]}
        if told["cpu"]["architecture"] != processor.architecture:
            return f"the architecture is {told['cpu']['architecture']}, expected {processor.architecture}"
        if not processor.seen <= seen or processor.unseen & seen:
            return f"instructions are {' '.join(sorted(seen)) or 'none'}, expected {' '.join(sorted(processor.seen))}"
        return "; ".join(told["problems"])
    if name.startswith("bench"):
        times = [timing["p50_ms"] for timing in told["timings"]]
        return "" if times and all(0 < ms < math.inf for ms in times) else f"times are {times} ms"
    return "" if told["worst"]["error"] <= told["tolerance"] else f"the error is {told['worst']['error']:.2e}"


def difference(ours: Any, theirs: Any, where: str = "") -> str:
    """Return the first place where two JSON documents differ, or nothing; numbers may by CLOSE, paths of bundles do."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        pairs = [(f"{where}.{key}", ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{where}[{place}]", *both) for place, both in enumerate(zip(ours, theirs, strict=True))]
    elif isinstance(ours, float) and isinstance(theirs, float):
        pairs = []
        if not abs(ours - theirs) <= CLOSE * max(1.0, abs(theirs)):
            return f"{where.lstrip('.')} is {ours!r}, on the host {theirs!r}"
    else:
        return "" if ours == theirs else f"{where.lstrip('.')} is {ours!r}, on the host {theirs!r}"
    return next(filter(None, (difference(mine, other, place) for place, mine, other in pairs)), "")


def parsed(stdout: str) -> dict[str, Any]:
    """Return the JSON object on stdout; an empty one where there is none."""
    try:
        told = json.loads(stdout)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def scientific(number: float) -> str:
    """``1.2e-2``; 0 as it is."""
    return "0" if number == 0 else re.sub(r"e([-+])0?", r"e\1", f"{number:.1e}").replace("e+", "e")
