"""How the tests of the command line call it, and read what it printed.

In-process through typer's CliRunner; real processes only where signals, pipes and imports are the subject.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from transom.cli.main import app
from transom.runtime.bundle import MANIFEST, manifest_sha256

ANSI = "\x1b"


def transom(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="transom")


def document(result: Result) -> Any:
    """Stdout as the one JSON document it must be: no NaN, nothing before or after."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(result.stdout, parse_constant=refuse)


def error_line(result: Result, status: int = 1) -> str:
    """The one line on stderr of a command that failed with nothing on stdout."""
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "transom.cli.main", *map(str, arguments)]


def process(folder: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A real process, run away from the repository's root, where the rooms could be imported bare."""
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=240, encoding="utf-8", **options
    )


def changed_bundle(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose bundle.json was changed, and signed again."""
    copy = folder / "changed"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest)
    manifest["manifest_sha256"] = manifest_sha256(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy
