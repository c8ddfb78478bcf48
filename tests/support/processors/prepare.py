"""Make what the cases need on this machine: the emulators, environments, bundles, and what the tests export."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processors.cases import DIGIT, Outcome, last_line, read_tests
from processors.emulated import Environment, Processor, clean_variables, make_environment
from processors.running import Done, Processes
from processors.without_torch import libraries_of

PACKAGES = ("models", "runtime", "calib", "export", "cli")  # of transom
TOOLS = ("pytest", "pytest-timeout", "hypothesis")  # what the tests need beside the runtime's dependencies
ONNX = ("onnx", "onnx-ir", "ml-dtypes")  # in a folder apart: only files of tests that import onnx themselves see it
EXACT = ("onnxruntime", "onnx")  # whose numbers are compared: the version that is installed here
EXPORT_TIMEOUT_S = 3600
AT_A_TIME = 2  # processes: emulated ones are slow, and memory is not endless
SEVEN = ("01111110", "01111110", "00000110", "00001100", "00011000", "00011000", "00110000", "00110000")  # 8x8 pixels
METADATA = "Metadata-Version: 2.1\nName: transom\nVersion: {}\n"

Say = Callable[[str], None]


class NotReady(Exception):
    """Something that the run needs is missing; the message says what."""


@dataclass(frozen=True)
class Workshop:
    """The folders of a run: ``repo`` is the checkout; everything is made below ``build``."""

    repo: Path
    build: Path
    processes: Processes
    say: Say

    @property
    def copy(self) -> Path:
        """Holds the checkout's packages and tests as they were when the run began."""
        return self.build / "copy"

    @property
    def digit(self) -> Path:
        return self.build / DIGIT

    def run(
        self,
        command: Sequence[str | Path],
        timeout_s: float,
        variables: dict[str, str] | None = None,
        shown: bool = False,
    ) -> Done:
        return self.processes.run(command, folder=self.copy, variables=variables, timeout_s=timeout_s, shown=shown)


@contextmanager
def alone(build: Path) -> Iterator[None]:
    """Hold the folder: two runs would replace each other's copies."""
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NotReady(f"another run uses {build}; wait for its end.") from None
        yield


def make_environments(workshop: Workshop, processors: Sequence[Processor]) -> dict[str, Environment]:
    """Make the emulators and a Python for each of the processors, all of one architecture; keys are their names."""
    architecture = processors[0].architecture
    arm = workshop.build / "arm"
    sysroot(workshop, "qemu", workshop.build / "qemu")
    if architecture == "aarch64":
        sysroot(workshop, "arm", arm)
        runtime, onnx = requirements(workshop.repo, TOOLS, dependencies=True), requirements(workshop.repo, ONNX)
        sysroot(workshop, "wheels", workshop.build / "wheels", arm, sys.executable, *runtime)
        sysroot(workshop, "wheels", workshop.build / "onnx", arm, sys.executable, *onnx)
        root, libraries = arm / "root", workshop.build / "wheels" / "site"
        (python,) = (root / "usr" / "bin").glob("python3.[0-9]*[0-9]")
    else:
        root, libraries = None, Path(importlib.metadata.distribution("onnxruntime").locate_file(""))
        python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return {
        each.name: make_environment(
            each,
            workshop.build / "environments" / each.name,
            qemu=workshop.build / "qemu" / f"qemu-{architecture}",
            root=root,
            python=python,
            packages=(workshop.copy / "packages", libraries),
        )
        for each in processors
    }


def sysroot(workshop: Workshop, part: str, *arguments: str | Path) -> None:
    done = workshop.run([Path(__file__).with_name("sysroot.sh"), part, *arguments], EXPORT_TIMEOUT_S, shown=True)
    if done.status:
        raise NotReady(done.stderr.strip().removeprefix("sysroot.sh: ") or f"sysroot.sh ended with {done.status}")


def requirements(repo: Path, names: Collection[str], *, dependencies: bool = False) -> list[str]:
    """Return what pip gets for Arm: the extras of pyproject.toml with these names, and the runtime's dependencies."""
    project = tomllib.loads((repo / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra if name_of(each) in names]
    wanted = dict.fromkeys((*(project["dependencies"] if dependencies else ()), *extras))
    return [f"{name_of(each)}=={version_here(name_of(each))}" if name_of(each) in EXACT else each for each in wanted]


def name_of(requirement: str) -> str:
    """``numpy`` of ``numpy>=1.26``."""
    return re.split(r"[^-\w.]", requirement, maxsplit=1)[0]


def version_here(name: str) -> str:
    return importlib.metadata.version(name)


def versions_in(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the versions of distributions that are installed in a folder."""
    found = importlib.metadata.distributions(path=[str(folder)])
    known = {each.metadata["Name"].lower(): each.version for each in found}
    return {name: known[name] for name in names if name in known}


def copy_checkout(workshop: Workshop) -> None:
    """Copy the checkout's packages, as transom.*, and its tests: what others change meanwhile changes no result."""
    shutil.rmtree(workshop.copy, ignore_errors=True)
    packages = workshop.copy / "packages"
    caches = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(workshop.repo / name, packages / "transom" / name, ignore=caches)
    project = tomllib.loads((workshop.repo / "pyproject.toml").read_text("utf-8"))["project"]
    metadata = packages / f"transom-{project['version']}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(METADATA.format(project["version"]))
    shutil.copytree(workshop.repo / "tests", workshop.copy / "tests", ignore=caches)
    shutil.copy(workshop.repo / "pyproject.toml", workshop.copy)
    for name in ("temporary", "failed", "home"):
        shutil.rmtree(workshop.build / name, ignore_errors=True)
        (workshop.build / name).mkdir()
    draw_seven(workshop.digit)


def draw_seven(path: Path) -> None:
    from PIL import Image

    image = Image.new("L", (8, 8))
    image.putdata([255 * int(pixel) for row in SEVEN for pixel in row])
    image.save(path)


def sources_hash(workshop: Workshop, *, tests: bool = False) -> str:
    """Return a hash of the packages that export, of the tests if asked, and of the library that computes."""
    digest = hashlib.sha256(version_here("onnxruntime").encode())
    folders = [workshop.copy / "packages" / "transom" / name for name in PACKAGES if name != "cli"]
    folders += [workshop.copy / "tests"] if tests else []
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(workshop.copy)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def export_bundles(workshop: Workshop, names: Sequence[str]) -> Path:
    """Export the bundles that are missing or of other sources, one after the other; return their folder.

    One that cannot be exported is not there afterwards.
    """
    folder, sources = workshop.build / "bundles", sources_hash(workshop)
    folder.mkdir(exist_ok=True)
    stale = [name for name in names if not is_of(folder / f"{name}.sources", sources)]
    for place, name in enumerate(stale, 1):
        workshop.say(f"exporting {name} ({place} of {len(stale)})")
        model, _, precision = name.rpartition("-")
        options = ["--precision", precision, "--out", folder / name, "--force"]
        done = workshop.run([transom_here(), "export", model, *options], EXPORT_TIMEOUT_S)
        if done.status:
            workshop.say(f"{name} cannot be exported: {last_line(done.stderr) or f'status {done.status}'}")
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / f"{name}.sources").write_text(sources)
    return folder


def is_of(stamp: Path, sources: str) -> bool:
    return stamp.exists() and stamp.read_text() == sources


def transom_here() -> Path:
    return Path(sys.executable).with_name("transom")


def run_tests_here(workshop: Workshop, names: Sequence[str], architecture: str) -> tuple[Path, Outcome]:
    """Run the files of tests here, where torch is; return the folder of what their fixtures exported.

    A run of equal sources is not repeated.
    """
    base = workshop.build / "exported" / architecture
    stamp = base.with_suffix(".sources")
    base.parent.mkdir(exist_ok=True)
    sources = hashlib.sha256(f"{sources_hash(workshop, tests=True)} {' '.join(names)}".encode()).hexdigest()
    if stamp.exists() and stamp.read_text().startswith(sources):
        return base / "shared", Outcome(True, stamp.read_text().split(" ", 1)[1])
    workshop.say(f"running {len(names)} files of tests here, which exports the bundles that they share")
    stamp.unlink(missing_ok=True)
    parallel = ("-n", str(AT_A_TIME), "--dist", "loadfile")
    command = [sys.executable, *pytest_arguments(names, base, *parallel)]
    done = workshop.run(command, EXPORT_TIMEOUT_S, test_variables(workshop))
    outcome = read_tests(done.status, done.stdout)
    if outcome.ok:
        stamp.write_text(f"{sources} {outcome.says}")
    return base / "shared", outcome


def pytest_arguments(names: Sequence[str], base: Path, *options: str | Path) -> list[str]:
    """Return pytest's command line behind Python's; ``base`` is the folder for what the tests write."""
    files = [f"tests/{name}.py" for name in names]
    plugins = ["-p", "processors.without_torch", "-p", "no:cacheprovider"]
    return ["-P", "-m", "pytest", *plugins, "-q", f"--basetemp={base}", *map(str, options), *files]


def test_variables(workshop: Workshop, *libraries: Path) -> dict[str, str]:
    """Return the variables of a process that runs tests: they import tests/support, and ask for the checkout."""
    path = os.pathsep.join(map(str, (workshop.copy / "tests" / "support", *libraries)))
    return {**clean_variables(workshop.build / "home"), "PYTHONPATH": path, "TRANSOM_REPO": str(workshop.repo)}


def libraries_for(workshop: Workshop, name: str, architecture: str) -> list[Path]:
    """Return where a file of tests finds onnx on Arm; on x86 it is where the other libraries are."""
    source = (workshop.copy / "tests" / f"{name}.py").read_text("utf-8")
    needs = "onnx" in libraries_of(source) and architecture == "aarch64"
    return [workshop.build / "onnx" / "site"] if needs else []


def host_processor() -> str:
    """Return this machine's processor as its kernel calls it."""
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else "unknown"
