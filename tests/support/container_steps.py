"""Read the container files of examples/containers, and make environments by their steps where no container is built.

`python -m container_steps build/serving ray kserve` makes build/serving/ray and build/serving/kserve: a Python of the
version of FROM, what COPY brings, what RUN installs, then what the tests need beside it. PIP_ARGS of the environment
has more arguments for pip, as the build argument of a container has. `make wheel` must have run before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from paths import REPO

CONTAINERS = REPO / "examples" / "containers"
INSTRUCTIONS = ("FROM", "ARG", "COPY", "RUN", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD")
PIP = "pip install --no-cache-dir $PIP_ARGS "  # how every RUN begins
TESTS = ("pytest>=8", "pytest-timeout>=2.3")
CLIENTS = {"triton": ("tritonclient[http,grpc]>=2.50",), "ray": (), "kserve": ()}  # kserve brings its own
STAMP = ".transom-serving"
ROOT = "container"  # in an environment: what is / in a container


@dataclass(frozen=True)
class Step:
    """One instruction of a container file, and the text behind it."""

    instruction: str
    text: str

    def copied(self) -> tuple[list[str], str]:
        """Return the sources and the destination of a COPY."""
        *sources, destination = self.text.split()
        return sources, destination


def container_file(engine: str) -> Path:
    return CONTAINERS / f"{engine}.Containerfile"


def engines() -> list[str]:
    return sorted(path.stem for path in CONTAINERS.glob("*.Containerfile"))


def steps_of(text: str) -> list[Step]:
    """Return the steps of a container file; ValueError for an instruction that is not among INSTRUCTIONS."""
    steps = []
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction not in INSTRUCTIONS:
            raise ValueError(f"{instruction!r} is no instruction that is known here: {', '.join(INSTRUCTIONS)}")
        steps.append(Step(instruction, rest.strip()))
    return steps


def python_of(steps: Sequence[Step]) -> str:
    """Return the version of Python that FROM names, such as 3.11."""
    (image,) = (step.text for step in steps if step.instruction == "FROM")
    found = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    if found is None:
        raise ValueError(f"FROM {image}: expected python:VERSION-slim")
    return found[1]


def commands(steps: Sequence[Step]) -> Iterator[str]:
    """Yield the commands of RUN for files that COPY brought into the folder ROOT; ValueError for one not of pip's."""
    folders = [step.copied()[1] for step in steps if step.instruction == "COPY"]
    for step in steps:
        if step.instruction == "RUN":
            if not step.text.startswith(PIP):
                raise ValueError(f"RUN {step.text}: expected {PIP}...")
            text = step.text
            for folder in folders:
                text = text.replace(f" {folder}", f" {ROOT}{folder}")
            yield text


def copy_all(steps: Sequence[Step], root: Path) -> None:
    """Copy what COPY names below ``root``; FileNotFoundError for a source that is not there."""
    for step in steps:
        if step.instruction == "COPY":
            sources, destination = step.copied()
            folder = root / destination.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            for source in sources:
                found = sorted(REPO.glob(source))
                if not found:
                    raise FileNotFoundError(f"COPY {source}: there is no such file; `make wheel` makes the wheel")
                for path in found:
                    shutil.copy(path, folder)


def recipe(engine: str) -> str:
    """Return a hash of what an environment depends on, but for the wheel."""
    files = [container_file(engine), REPO / "pyproject.toml", Path(__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def make_environment(engine: str, folder: Path) -> None:
    """Make ``folder`` the environment of an engine; where it is already, install the wheel of now into it."""
    folder = Path(os.path.abspath(folder))
    steps = steps_of(container_file(engine).read_text("utf-8"))
    stamp, wanted = folder / STAMP, {"recipe": recipe(engine), "folder": str(folder)}
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        (wheel,) = (REPO / "dist").glob("transom-*.whl")
        run(folder, "python", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--force-reinstall", str(wheel))
        return
    version = python_of(steps)
    base = sys.executable if version == "{}.{}".format(*sys.version_info) else shutil.which(f"python{version}")
    if base is None:
        sys.exit(f"container_steps: no python{version} here, which {container_file(engine).name} starts from.")
    folder.mkdir(parents=True, exist_ok=True)
    run(folder, base, "-m", "venv", "--clear", str(folder))
    copy_all(steps, folder / ROOT)
    for command in commands(steps):
        run(folder, "sh", "-ec", command)
    needs = " ".join(f"'{need}'" for need in (*TESTS, *CLIENTS[engine]))
    run(folder, "sh", "-ec", f"pip install $PIP_ARGS {needs}")
    stamp.write_text(json.dumps(wanted))


def run(folder: Path, *command: str) -> None:
    """Run a command in an environment, its own pip and python first; ends the process where it fails."""
    print("+", command[-1] if command[0] == "sh" else " ".join(command), flush=True)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    environment = {"PIP_ARGS": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ, "PATH": path}
    done = subprocess.run(
        [shutil.which(command[0], path=path) or command[0], *command[1:]], cwd=folder, env=environment
    )
    if done.returncode:
        sys.exit(f"container_steps: {command[0]} ended with {done.returncode}; {folder} is not finished.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what gets one folder for each engine")
    parser.add_argument("engines", nargs="*", help=f"of {', '.join(engines())}; default: all")
    options = parser.parse_args()
    unknown = sorted(set(options.engines) - set(engines()))
    if unknown:
        parser.error(f"there is no container file for {unknown[0]!r}; there are {', '.join(engines())}")
    for engine in options.engines or engines():
        print(f"== {engine}", flush=True)
        make_environment(engine, options.folder / engine)


if __name__ == "__main__":
    main()
