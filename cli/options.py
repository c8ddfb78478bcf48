"""Define the options that several commands share, and parse their values."""

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
        "these that works here. Any other that is absent is an error.",
        autocompletion=lambda: ["cpu", "cuda", "tensorrt", "auto"],
    ),
]
Target = Annotated[
    list[str],
    typer.Option(
        metavar="TARGET",
        autocompletion=lambda: target_names(),
        help="The GPU: rtx-sm75, rtx-sm80, rtx-sm86, rtx-sm89, rtx-sm120 or rtx-sm121, built on any machine; or "
        "tensorrt, built on the machine with the GPU. Repeatable.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="CPU threads per call.", show_default="one per core"),
]
Kernels = Annotated[
    str,
    typer.Option(
        metavar="KERNELS",
        help="What runs on the CPU: native, the kernels of this package; onnxruntime; or auto, the native ones for the "
        "graphs that have a list of operators, where they run here.",
        autocompletion=lambda: ["auto", "native", "onnxruntime"],
    ),
]
Source = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="The checkpoint to compare with.", show_default="the one it was exported from"),
]
CalibratedOn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="The calibration data of a quantised bundle: accuracy is measured on the part that was held out.",
        show_default="that of the reference model",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]


def sizes(text: str, option: str) -> dict[str, int]:
    """Parse ``B=1,S=128`` into {"B": 1, "S": 128}; BadParameter for anything else."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise typer.BadParameter(f"{option} is {text!r}; expected AXIS=SIZE, such as S=128 or B=1,S=128.")
        if name in found:
            raise typer.BadParameter(f"{option} is {text!r}; axis {name} is given twice.")
        found[name] = int(size)
    return found


def target_names() -> list[str]:
    """Return the names of the engines' targets, for shell completion."""
    from transom.export.engine.targets import TARGETS

    return list(TARGETS)
