"""Measure what exports cost: CPU seconds and peak memory, of one installation of Transom or several beside each other.

    python benchmarks/export_cost.py --work DIR                                   this checkout's own `transom`
    python benchmarks/export_cost.py --work DIR --side today=OLD/.venv/bin/transom --side ours=.venv/bin/transom

Models of published size with random weights (MiniLM: the real ones), each exported by a process of its own whose user
and system time and peak resident memory the kernel counts. CPU seconds hardly depend on what else the machine does,
elapsed time does. DIR keeps checkpoints and calibration data; DIR/export_cost.json grows with every export, and what is
in it is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from full_size_models import MODELS, photographs, random_checkpoint

from transom.export.datasets import wordnet_pairs
from transom.runtime.host import processor

IMAGES, TEXTS = 27, 2000


@dataclass(frozen=True)
class Case:
    """An export: the checkpoint, a key of MODELS or a reference model's name; precision; calibration data; options."""

    source: str
    precision: str = "fp32"
    data: Callable[[Path], Path] | None = None
    options: tuple[str, ...] = ()


def samples_of(model: str) -> Callable[[Path], Path]:
    """Return a writer of the model's 16 samples."""

    def write(folder: Path) -> Path:
        path = folder / f"{model}.npz"
        np.savez(path, **MODELS[model][2]())
        return path

    return write


def photographs_27(folder: Path) -> Path:
    path = folder / f"photographs-{IMAGES}.npz"
    pixels = photographs()["pixel_values"]
    mirrored = np.concatenate([pixels, pixels[..., ::-1]])
    np.savez(path, pixel_values=mirrored[:IMAGES])
    return path


def texts_2000(folder: Path) -> Path:
    path = folder / f"texts-{TEXTS}.txt"
    texts = [" ".join(text.split()) for pair in wordnet_pairs() for text in pair]
    path.write_text("\n".join(texts[:TEXTS]) + "\n")
    return path


CASES = {
    "bert-fp32": Case("bert"),
    "gpt-fp32": Case("gpt"),
    "bert-int8": Case("bert", "int8", samples_of("bert")),
    "bert-int8-no-gate": Case("bert", "int8", samples_of("bert"), ("--no-gate",)),
    "vit-int8": Case("vit", "int8", samples_of("vit")),
    "vit-int8-no-gate": Case("vit", "int8", samples_of("vit"), ("--no-gate",)),
    "gpt-int8": Case("gpt", "int8", samples_of("gpt")),
    "gpt-int8-no-gate": Case("gpt", "int8", samples_of("gpt"), ("--no-gate",)),
    "vit-int8-27": Case("vit", "int8", photographs_27),
    "minilm-int8-2000": Case("minilm", "int8", texts_2000),
}


def checkpoint_of(source: str, work: Path) -> str:
    """Return SOURCE of an export: the folder of a random model, or a reference model's name."""
    return source if source not in MODELS else str(random_checkpoint(source, work))


def measure(transom: Path, case: Case, work: Path) -> dict[str, Any]:
    """Export in a process of its own; return CPU seconds, elapsed seconds, peak MiB and the exit status."""
    out = work / "measured-bundle"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(transom), "export", checkpoint_of(case.source, work), "--out", str(out)]
    command += ["--precision", case.precision, *case.options]
    if case.data is not None:
        command += ["--calibration-data", str(case.data(work))]
    started = time.perf_counter()
    with (work / "export.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    return {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
        "bundle_mib": round(size / 2**20, 1),
        "exit": process.returncode,
    }


def table(found: dict[str, Any], sides: list[str]) -> str:
    """Return a Markdown table: a row per export, a column per side, and each side's ratios to the first."""
    lines = ["| export | " + " | ".join(f"{side}: CPU s, peak MiB" for side in sides) + " | CPU | peak |"]
    lines.append("|---" * (len(sides) + 3) + "|")
    for name, by_side in found.items():
        if not all(side in by_side for side in sides):
            continue
        rows = [by_side[side] for side in sides]
        cells = [f"{r['cpu_seconds']:.0f}, {r['peak_mib']}" + (" (failed)" if r["exit"] else "") for r in rows]
        first, last = rows[0], rows[-1]
        ratios = [f"{last[key] / first[key]:.2f}" for key in ("cpu_seconds", "peak_mib")]
        lines.append(f"| {name} | {' | '.join([*cells, *ratios])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--side", action="append", metavar="NAME=TRANSOM", help="an installation's `transom`")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    sides = dict(side.split("=", 1) for side in options.side or [f"ours={Path(sys.executable).parent / 'transom'}"])
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "export_cost.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"processor": processor(), "cases": {}}
    found = known["cases"]
    for name in options.cases:
        for side, transom in sides.items():
            if side in found.setdefault(name, {}):
                continue
            found[name][side] = measure(Path(transom), CASES[name], options.work)
            print(name, side, found[name][side], flush=True)
            path.write_text(json.dumps(known, indent=1) + "\n")
    print(f"on {known['processor']}\n\n{table(found, list(sides))}")


if __name__ == "__main__":
    main()
