"""The options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `transom export` made.", show_default=False)
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="cpu; cuda: ONNX Runtime on the GPU; tensorrt: an engine that `transom build` made; auto: the fastest of "
        "these that is there. A device that is absent is an error.",
        autocompletion=lambda: ["cpu", "cuda", "tensorrt", "auto"],
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="CPU threads per call.", show_default="one per core"),
]
Source = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="The checkpoint to compare with.", show_default="the one it was exported from"),
]
CalibratedOn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="What a quantised bundle was calibrated on: its accuracy is measured on the part held out of it.",
        show_default="known of reference models",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]


def sizes(text: str, option: str) -> dict[str, int]:
    """``B=1,S=128`` -> {"B": 1, "S": 128}; a wrong call where it is anything else."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise typer.BadParameter(f"{option} is {text!r}; expected AXIS=SIZE, such as S=128 or B=1,S=128.")
        if name in found:
            raise typer.BadParameter(f"{option} is {text!r}; axis {name} is given twice.")
        found[name] = int(size)
    return found
