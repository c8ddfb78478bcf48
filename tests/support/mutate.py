"""Break each guard of tests/guards/ on purpose, and show which test notices.

    PYTHONPATH=tests/support .venv/bin/python -m mutate
    PYTHONPATH=tests/support .venv/bin/python -m mutate --only hash --workers 1

A guard is a piece of source text and what replaces it. Each is put into a copy of the tree, and of the tests that it
names one has to fail. All of them have to pass before, with nothing broken. Exit status 1 where a guard is not noticed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

REPOSITORY = Path(__file__).resolve().parents[2]
GUARDS = Path(__file__).resolve().parents[1] / "guards"
WORK = REPOSITORY / "build" / "mutate"
PACKAGES = ("models", "export", "runtime", "calib", "cli")
COPIED = (*PACKAGES, "tests", "docs", "examples", "benchmarks", "findings", ".ci")
PRELOADED = ["pytest", "numpy", "torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "typer", "safetensors.numpy"]
TIMEOUT_S = 600  # of one guard's tests: what hangs did not notice
FIELDS = {"name", "file", "code", "broken", "tests"}
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S.*?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Guard:
    """``code`` occurs once in ``file``; with ``broken`` in its place one of ``tests``, files or node ids, fails."""

    name: str
    file: str
    code: str
    broken: str
    tests: tuple[str, ...]
    subject: str


@dataclass(frozen=True)
class Outcome:
    """Which test noticed that ``guard`` was broken; None and ``why`` where none did."""

    guard: Guard
    test: str | None
    why: str = ""


def read_guards(folder: Path = GUARDS) -> list[Guard]:
    """Read every guard of a folder's TOML files. Raises ValueError for an entry that is not complete."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("guard", []):
            if entry.keys() != FIELDS or not entry["tests"]:
                raise ValueError(f"{path}: {entry.get('name', entry)} has {sorted(entry)}; expected {sorted(FIELDS)}")
            found.append(Guard(**{**entry, "tests": tuple(entry["tests"])}, subject=path.stem))
    return found


def problem_of(guard: Guard, root: Path = REPOSITORY) -> str | None:
    """Return why a guard cannot be broken as it says; None where it can."""
    path = root / guard.file
    if not path.is_file():
        return f"{guard.file} is not there"
    count = path.read_text(encoding="utf-8").count(guard.code)
    if count != 1 or guard.code == guard.broken:
        return f"its code is {count} times in {guard.file}; expected once, and another text in its place"
    missing = [test for test in guard.tests if not (root / test.partition("::")[0]).is_file()]
    return f"{missing[0]} is not there" if missing else None


def make_tree(folder: Path) -> Path:
    """Copy the repository's sources to ``folder``, with the packages linked below build/typing/transom."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    packages = folder / "build" / "typing" / "transom"
    packages.mkdir(parents=True)
    for package in PACKAGES:
        (packages / package).symlink_to(Path("../../..") / package)
    return folder


@contextmanager
def broken(guard: Guard, tree: Path) -> Iterator[None]:
    """Put a guard's replacement into a tree for as long as this lasts."""
    path = tree / guard.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(guard.code, guard.broken), encoding="utf-8")
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)  # within one second, of equal size, it looks current
    try:
        yield
    finally:
        path.write_text(whole, encoding="utf-8")
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


def run_pytest(tree: str, shared: str, tests: Sequence[str], log: str) -> None:
    """Run tests of a tree in this process, which exists for that alone; ends it with pytest's status."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    packages = str(Path(tree, "build", "typing"))
    sys.path.insert(0, packages)
    os.environ |= {
        "PYTHONPATH": packages,
        "OMP_NUM_THREADS": "1",
        "TRANSOM_REPO": tree,
        "TRANSOM_TEST_SHARED": shared,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    import pytest

    ignored = "ignore::pytest.PytestAssertRewriteWarning"  # of what was loaded before pytest came
    arguments = ["-x", "-q", "-rfE", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", ignored, *tests]
    sys.exit(int(pytest.main(arguments)))


class Runner:
    """Runs tests in processes that have the large libraries already; ``shared`` keeps what tests make once."""

    def __init__(self, work: Path) -> None:
        self._work, self._shared = work, work / "shared"
        shutil.rmtree(self._shared, ignore_errors=True)
        self._shared.mkdir(parents=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(self, tree: Path, tests: Sequence[str], timeout_s: float | None = TIMEOUT_S) -> tuple[int | None, str]:
        """pytest's status, None where it had to be stopped, and what it printed."""
        log = self._work / f"{tree.name}.log"
        arguments = (str(tree), str(self._shared), list(tests), str(log))
        process = self._context.Process(target=run_pytest, args=arguments)
        process.start()
        process.join(timeout_s)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
        process.close()
        return status, log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""

    def outcome(self, guard: Guard, tree: Path) -> Outcome:
        """Break a guard in a tree and see which test notices."""
        with broken(guard, tree):
            status, output = self.run(tree, guard.tests)
        found = FAILED.search(output)
        if status == 1 and found:
            return Outcome(guard, found[1])
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "nothing was printed")
        why = {None: f"stopped after {TIMEOUT_S} s", 0: "every test passed", 2: f"the tests do not load: {last}"}
        return Outcome(guard, None, why.get(status, f"status {status}: {last}"))


def main() -> int:
    """Break every guard, print which test notices each, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="guards whose name, file or subject has this in it")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="guards broken at the same time")
    parser.add_argument("--guards", type=Path, default=GUARDS, metavar="FOLDER", help="where the TOML files are")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="where trees are copied to")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the list as a Markdown table, too")
    options = parser.parse_args()
    guards = [
        guard for guard in read_guards(options.guards) if options.only in f"{guard.subject} {guard.file} {guard.name}"
    ]
    if not guards:
        print(f"mutate: no guard has {options.only!r} in its name, file or subject", file=sys.stderr)
        return 2
    problems = [(guard, problem) for guard in guards if (problem := problem_of(guard)) is not None]
    for guard, problem in problems:
        print(f"mutate: {guard.subject}: {guard.name}: {problem}", file=sys.stderr)
    if problems:
        return 2
    runner = Runner(options.work)
    trees: Queue[Path] = Queue()
    for number in range(max(1, options.workers)):
        trees.put(make_tree(options.work / f"tree{number}"))
    tests = sorted({test for guard in guards for test in guard.tests})
    print(f"{len(guards)} guards; first their tests with nothing broken", flush=True)
    status, output = runner.run(trees.queue[0], tests, timeout_s=None)
    if status != 0:
        print(output, file=sys.stderr)
        print("mutate: these tests fail with nothing broken", file=sys.stderr)
        return 1

    def judge(guard: Guard) -> Outcome:
        tree = trees.get()
        try:
            outcome = runner.outcome(guard, tree)
        finally:
            trees.put(tree)
        mark, said = ("noticed", outcome.test) if outcome.test else ("NOT NOTICED", outcome.why)
        print(f"{mark:11}  {guard.subject}: {guard.name}  <-  {said}", flush=True)
        return outcome

    with ThreadPoolExecutor(max(1, options.workers)) as pool:
        outcomes = list(pool.map(judge, guards))
    missed = [outcome for outcome in outcomes if outcome.test is None]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} broken guards were noticed")
    if options.out is not None:
        options.out.write_text(page(outcomes), encoding="utf-8")
    return 1 if missed else 0


def page(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown, one table for each subject."""
    lines = [
        "# Guards, broken one by one",
        "",
        "Written by `make mutate`: what was broken, and the first test that failed.",
    ]
    for subject in dict.fromkeys(outcome.guard.subject for outcome in outcomes):
        lines += ["", f"## {subject}", "", "| guard | file | noticed by |", "| --- | --- | --- |"]
        for outcome in outcomes:
            if outcome.guard.subject == subject:
                said = f"`{outcome.test.removeprefix('tests/')}`" if outcome.test else f"**nothing: {outcome.why}**"
                lines.append(f"| {outcome.guard.name} | `{outcome.guard.file}` | {said} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
