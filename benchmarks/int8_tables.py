"""Format the tables of docs/int8.md from the --json files of int8_accuracy.py and int8_peers.py.

    python benchmarks/int8_tables.py ACCURACY.json PEERS.json

One column per model: score and relative error of every way and every peer, then size and speed of ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from earlier_figures import figures_with

MODELS = ("vit", "bert", "minilm", "clip", "gpt", "transformer")
MIB = 2**20

Rows = list[dict[str, Any]]


def accuracy(row: dict[str, Any]) -> str:
    return "fails" if row["failure"] else f"{row['score']:.4f} / {row['relative_error']:.4f}"


def size(row: dict[str, Any]) -> str:
    return "fails" if row["failure"] else f"{row['size'] / MIB:.2f}"


def speed(row: dict[str, Any]) -> str:
    return "fails" if row["failure"] else f"{row['speed']:.2f}"


def table(title: str, rows: Rows, cell: Callable[[dict[str, Any]], str], mark: str = "") -> list[str]:
    """Return lines of Markdown: a row per config, in order of first appearance; a dash where a model has none.

    What all models' rows of a way have in common but for its method ("SmoothQuant + entropy") stands in one row.
    """
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        who = "SmoothQuant + best" if row["who"].startswith("SmoothQuant + ") else row["who"]
        found.setdefault(who, {})[row["model"]] = cell(row)
    lines = [f"| {title} | {' | '.join(MODELS)} |", f"|{' --- |' * (len(MODELS) + 1)}"] if title else []
    return lines + [
        f"| {mark}{who}{mark} | {' | '.join(cells.get(model, '–') for model in MODELS)} |"
        for who, cells in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("accuracy", type=figures_with("rows"), help="what int8_accuracy.py wrote")
    parser.add_argument("peers", type=figures_with("rows"), help="what int8_peers.py wrote")
    arguments = parser.parse_args()
    ours = arguments.accuracy["rows"]
    peers = [row for row in arguments.peers["rows"] if row["who"] != "FP32"]
    print("\n".join([*table("score / relative error", ours, accuracy), *table("", peers, accuracy, mark="*")]))
    print("\n".join(["", *table("MiB of the CPU's graph and weights", ours, size)]))
    print("\n".join(["", *table("times as fast as FP32", ours, speed)]))


if __name__ == "__main__":
    main()
