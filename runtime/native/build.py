"""Compile the native library: at installation, by ``make native``, and for tests.

setup.py loads this file by its path before the package is installed, so it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / "src"
LIBRARY = "libtransom_kernels.so"  # on macOS too: ctypes does not mind the suffix
SYSTEMS = ("Linux", "Darwin")  # with pthreads
COMPILERS = ("cc", "gcc", "clang")
# No fused multiply-add but where a kernel writes one: the same sums whatever the compiler and its flags.
FLAGS = ("-std=gnu17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-pthread", "-Wno-psabi")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
TIMEOUT_S = 900  # of one file; some seconds where nothing else runs


class BuildError(Exception):
    """The library cannot be compiled here; the message says why and what to install."""


def compiler() -> list[str]:
    """Return the command of the C compiler: CC of the environment, else the first of COMPILERS.

    Raises BuildError where there is none.
    """
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    missing = f"CC names {named[0]!r}, which is not there" if named else f"none of {', '.join(COMPILERS)} is there"
    raise BuildError(f"no C compiler: {missing}. Install one (Debian: apt install gcc), then run `make native`")


def hash_of_sources(folder: Path = SOURCES) -> str | None:
    """Return the SHA-256 of all sources and their names; None where there are none."""
    files = sorted(path for path in folder.rglob("*.[ch]"))
    if not files:
        return None
    found = hashlib.sha256()
    for path in files:
        text = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(text)}\n".encode() + text)
    return found.hexdigest()


def compile_library(target: Path, *, flags: Sequence[str] = (), sources: Path = SOURCES) -> None:
    """Compile all C files of ``sources`` into the shared library ``target``, which is replaced when it is whole.

    Raises BuildError where there is no compiler, the system has no pthreads, or the compiler fails.
    """
    if platform.system() not in SYSTEMS:
        raise BuildError(f"the kernels compile on {' and '.join(SYSTEMS)}; this is {platform.system()}")
    command = [*compiler(), *FLAGS, *flags]
    named = f'-DTRANSOM_SOURCES="{hash_of_sources(sources)}"'
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".native-") as made:
        folder = Path(made)
        files = sorted(sources.glob("*.c"))
        objects = [folder / f"{path.stem}.o" for path in files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pairs = zip(files, objects, strict=True)
            compiled = [pool.submit(run, [*command, named, "-c", str(path), "-o", str(out)]) for path, out in pairs]
            for each in compiled:
                each.result()
        run([*command, "-shared", *map(str, objects), "-lm", "-o", str(folder / LIBRARY)])
        (folder / LIBRARY).replace(target)


def run(command: Sequence[str]) -> None:
    """Run a compiler; raises BuildError with what it said where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C compiler did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"the C compiler failed: {shlex.join(command)}\n{done.stderr.strip()}")


def main() -> None:
    """Compile the library in place, or with the given flags to a path: ``build.py [PATH [FLAG...]]``."""
    target, flags = (Path(sys.argv[1]), sys.argv[2:]) if len(sys.argv) > 1 else (FOLDER / LIBRARY, [])
    try:
        compile_library(target, flags=[*WARNINGS, *flags])
    except BuildError as error:
        sys.exit(f"{target.name} was not built: {error}")
    print(target)


if __name__ == "__main__":
    main()
