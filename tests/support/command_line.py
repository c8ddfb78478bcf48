"""How the tests of the command line call it, and read what it printed.

In-process through typer's CliRunner; real processes only where signals, pipes and imports are the subject.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from time_limits import PATIENCE_S
from transom.cli.main import app
from transom.runtime.manifest import MANIFEST, manifest_sha256
from transom.runtime.probe import probe

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
    """A real process, run away from the repository's root, where the packages could be imported bare."""
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, encoding="utf-8", **options
    )


QUANTIZATION: dict[str, Any] = {  # what bundle.json says of an INT8 export; the graph "model" has four linear layers
    "activations": {"model": "static"},
    "method": "mse",
    "weight_bits": 7,  # exact on every processor
    "block_size": None,
    "also": [],
    "elsewhere": {"cpu": "fp32", "default": "fp16"},
    "data": {"name": "digits", "samples": 400, "sha256": "0" * 64},
    "instruction_set": "avx512_vnni",
    "ranges": "ranges.json",
    "smoothing": {"model/layer_norm": 0.5},
    "layers": [
        {"name": f"layer.{i}", "graph": "model", "sensitivity": 0.01 * i, "kept": i == 3, "why": "0.02 lost" * (i == 3)}
        for i in range(4)
    ],
    "curve": [
        {"quantized": 0, "layers": 4, "relative_error": 0.0, "score": 0.99},
        {"quantized": 2, "layers": 4, "relative_error": 0.01, "score": 0.985},
        {"quantized": 4, "layers": 4, "relative_error": 0.04, "score": 0.97},
    ],
    "gate": {
        variant: {
            "measure": "top-1 accuracy",
            "allowed": 0.013,
            "found": 0.005,
            "n": 540,
            "interval": [-0.001, 0.012],
            "holds": True,
            "repeated": None,
            "score": {"name": "top-1 accuracy", "fp32": {"value": 0.99}, "int8": {"value": 0.985}},
            "agreement": {"n": 540, "correct": 538, "value": 0.9963, "interval": [0.9866, 0.999]},
            "relative_error": {"output": "logits", "value": 0.02, "n": 540, "interval": [0.01, 0.03]},
        }
        for variant in ("default", "cpu")
    },
}


def as_quantized(words: dict[str, Any], mode: str = "static", bits: int = 7) -> None:
    """What ``words``, a bundle.json, would say were its graphs quantised."""
    modes = {graph["name"]: mode for graph in words["graphs"]}
    words["precision"] = "int8"
    words["parity"]["tolerance"] = 0.5
    words["parity"]["worst"]["error"] = 0.25  # at the export; twice that is allowed from then on
    words["quantization"] = {**copy.deepcopy(QUANTIZATION), "activations": modes, "weight_bits": bits}


def changed_bundle(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose bundle.json was changed, and signed again."""
    copy = folder / "changed"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest)
    manifest["manifest_sha256"] = manifest_sha256(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def probe_here(name: str, question: Sequence[str], timeout_s: float | None = None) -> dict[str, Any]:
    """``examine.run_probe`` in this process, where libraries are emulated."""
    return probe(question)
