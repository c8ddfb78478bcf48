"""Run what is asked on each emulated processor, show the table, and write it to docs/results.

    PYTHONPATH=tests/support .venv/bin/python -m processors arm --tests runtime/test_session runtime/test_kv_cache
    PYTHONPATH=tests/support .venv/bin/python -m processors arm --parts selftest --models vit --precisions int8

A failure does not stop the rest; the exit status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from processors.cases import (
    CHECKED,
    COMMAND,
    COMMANDS,
    MODELS,
    PARTS,
    PRECISIONS,
    SELFTEST,
    TEST_TIMEOUT_S,
    TESTS,
    THREADS,
    TIMEOUTS_S,
    Case,
    Outcome,
    bundle_of,
    bundles_needed,
    parsed,
    plan,
    read_command,
    read_selftest,
    read_tests,
)
from processors.emulated import PROCESSORS, Environment, clean_variables, processors_of
from processors.prepare import (
    AT_A_TIME,
    NotReady,
    Workshop,
    alone,
    copy_checkout,
    export_bundles,
    host_processor,
    libraries_for,
    make_environments,
    pytest_arguments,
    run_tests_here,
    test_variables,
    transom_here,
    versions_in,
)
from processors.running import Done, Processes, ended_with, run_all
from processors.table import page
from transom.runtime.manifest import MANIFEST

ARCHITECTURES = {"arm": "aarch64", "x86": "x86_64"}
TITLES = {"arm": "Emulated Arm processors", "x86": "Emulated x86 processors without VNNI"}
RESULTS = "docs/results/{}-emulated.md"
FAILED, INTERRUPTED = 1, 130
SHOWN_CHARACTERS = 300  # of a failure's reason


def main() -> int:
    options = arguments().parse_args()
    repo = Path(__file__).resolve().parents[3]
    processes = Processes()
    workshop = Workshop(repo, repo / "build" / "processors", processes, say)
    try:
        with alone(workshop.build), ended_with(processes):
            return run(workshop, options)
    except NotReady as error:
        print(f"processors: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("processors: interrupted", file=sys.stderr)
        return INTERRUPTED


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="processors", description="Run Transom on emulated processors.")
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--processors", nargs="+", choices=[each.name for each in PROCESSORS], default=[])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[], help="all, if not given")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[], help="of the self-tests")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[], help="of the self-tests")
    parser.add_argument(
        "--tests",
        nargs="*",
        default=[],
        metavar="NAME",
        help="files below tests/, as runtime/test_session",
    )
    parser.add_argument("--bundles", type=Path, help="a folder of <model>-<precision>; else they are exported")
    parser.add_argument("--out", type=Path, help="the page; docs/results if all is run, else nothing is written")
    return parser


def run(workshop: Workshop, options: argparse.Namespace) -> int:
    tests = [name for name in options.tests if (workshop.repo / "tests" / f"{name}.py").is_file()]
    for name in options.tests:
        if name not in tests:
            say(f"there is no tests/{name}.py: left out")
    architecture = ARCHITECTURES[options.architecture]
    choice = {key: getattr(options, key) for key in ("processors", "parts", "models", "precisions")}
    cases = plan(architecture, tests, **choice)
    if not cases:
        raise NotReady("nothing is left to run: the options exclude each other.")
    used = [each for each in processors_of(architecture) if each.name in {case.processor for case in cases}]

    copy_checkout(workshop)
    environments = make_environments(workshop, used)
    needed = bundles_needed(cases)
    bundles = options.bundles.absolute() if options.bundles else export_bundles(workshop, needed)
    missing = {name for name in needed if not (bundles / name / MANIFEST).is_file()}
    if missing == {*needed} != set():
        raise NotReady(f"{bundles} has none of the bundles {', '.join(needed)}.")
    exported, tests_here = None, None
    files = list(dict.fromkeys(case.name for case in cases if case.part == TESTS))
    if files:
        exported, tests_here = run_tests_here(workshop, files, architecture)
        say(f"tests here: {tests_here.says} {tests_here.reason}")
    outcomes = {case: Outcome(False, "**no bundle**", "it is missing") for case in cases if bundle_of(case) in missing}
    possible = [case for case in cases if case not in outcomes]
    host = {name: answer_here(workshop, name, bundles) for name in commands_compared(possible)}

    def text() -> str:
        return page(
            TITLES[options.architecture],
            {case: outcomes[case] for case in cases if case in outcomes},
            [each.name for each in used],
            facts=facts(workshop, environments[used[0].name]),
            built_on={name: processor_of(bundles / name) for name in needed if name not in missing},
            tests_here=tests_here,
        )

    try:
        for case, outcome in run_cases(workshop, possible, environments, bundles, exported, host):
            outcomes[case] = outcome
    finally:
        print(f"\n{text()}", flush=True)
    out = options.out or (None if any(choice.values()) else workshop.repo / RESULTS.format(options.architecture))
    if out:
        out.write_text(text())
        say(f"written to {out}")
    failed = sum(not outcome.ok for outcome in (*outcomes.values(), *filter(None, [tests_here])))
    say(f"{len(outcomes)} cases, {failed} failed")
    return FAILED if failed else 0


def run_cases(
    workshop: Workshop,
    cases: Sequence[Case],
    environments: Mapping[str, Environment],
    bundles: Path,
    exported: Path | None,
    host: Mapping[str, Any],
) -> Iterator[tuple[Case, Outcome]]:
    """Run the cases, AT_A_TIME at a time, say what begins, and yield what came of each.

    What a case printed that failed is kept.
    """
    jobs: dict[Case, Callable[[], Done]] = {}
    for case in cases:
        command, variables = command_of(workshop, case, environments[case.processor], bundles, exported)
        jobs[case] = partial(workshop.run, command, case.timeout_s, variables)
    over = 0
    for case, done in run_all(jobs, AT_A_TIME, workshop.processes):
        if done is None:
            say(f"begins: {case}")
            continue
        outcome = read(case, done, environments[case.processor], host)
        over += 1
        of = f" of {outcome.allowed:g}" if outcome.ok and outcome.allowed is not None else ""
        why = f": {outcome.reason[:SHOWN_CHARACTERS]}" if outcome.reason else ""
        say(f"{over} of {len(cases)}, {done.seconds:.0f} s: {case}: {outcome.says.strip('*')}{of}{why}")
        if not outcome.ok:
            log = workshop.build / "failed" / f"{case.processor}, {case.part} {case.name}.txt"
            log.parent.mkdir(exist_ok=True)
            log.write_text(f"{done.stdout}\n{done.stderr}")
            say(f"what it printed is in {log}")
        yield case, outcome


def command_of(
    workshop: Workshop, case: Case, environment: Environment, bundles: Path, exported: Path | None
) -> tuple[list[str | Path], dict[str, str]]:
    """Return the command and the variables of a case."""
    if case.part == SELFTEST:
        command = [environment.transom, "selftest", bundles / case.name, "--threads", THREADS, "--json"]
        return command, clean_variables(workshop.build / "home")
    if case.part == COMMAND:
        words = command_words(case.name, bundles, workshop.digit)
        return [environment.transom, *words], clean_variables(workshop.build / "home")
    base = workshop.build / "temporary" / f"{case.processor}-{case.name}"
    words = pytest_arguments([case.name], base, "-o", f"timeout={TEST_TIMEOUT_S}", "--exported", exported or base)
    libraries = libraries_for(workshop, case.name, environment.processor.architecture)
    return [environment.python, *words], test_variables(workshop, *libraries)


def read(case: Case, done: Done, environment: Environment, host: Mapping[str, Any]) -> Outcome:
    if done.late:
        return Outcome(False, "**too slow**", f"it was ended after {case.timeout_s} s")
    if case.part == SELFTEST:
        return read_selftest(done.status, done.stdout, done.stderr)
    if case.part == TESTS:
        return read_tests(done.status, done.stdout)
    return read_command(
        case.name, environment.processor, done.status, done.stdout, done.stderr, host.get(case.name, {})
    )


def command_words(name: str, bundles: Path, digit: Path) -> list[str]:
    return [*(word.format(bundles=bundles, digit=digit) for word in COMMANDS[name]), "--json"]


def commands_compared(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.name for case in cases if case.part == COMMAND and case.name not in CHECKED))


def answer_here(workshop: Workshop, name: str, bundles: Path) -> Any:
    """Return what a command answers on this machine, not emulated; of a failure the error."""
    command = [transom_here(), *command_words(name, bundles, workshop.digit)]
    done = workshop.run(command, TIMEOUTS_S[COMMAND], clean_variables(workshop.build / "home"))
    return parsed(done.stdout)


def processor_of(bundle: Path) -> str:
    """Return what a quantised bundle records of the processor that built it; nothing of another one."""
    quantization = json.loads((bundle / MANIFEST).read_text("utf-8")).get("quantization") or {}
    return ", ".join(filter(None, map(quantization.get, ("processor", "instruction_set"))))


def facts(workshop: Workshop, environment: Environment) -> str:
    """Return date, emulator, libraries and this machine's processor in one line."""
    made = [line for part in ("qemu", "arm") for line in lines_of(workshop.build / part / "versions")]
    folders = (environment.folder / "lib").glob("python*/site-packages/packages.pth")
    libraries = Path(next(folders).read_text().splitlines()[-1])
    if environment.processor.architecture != "aarch64":
        made = [made[0], f"python {sys.version_info[0]}.{sys.version_info[1]}"]
    made += [f"{name} {version}" for name, version in versions_in(libraries, ("onnxruntime", "numpy")).items()]
    return f"{time.strftime('%Y-%m-%d')}; {', '.join(made)}; on {host_processor()}."


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
