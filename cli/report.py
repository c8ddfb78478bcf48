"""``transom report``: write one HTML page about a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transom.cli.extras import export_extra
from transom.cli.options import BundlePath
from transom.cli.output import printable
from transom.runtime.errors import ExportError


def report(
    bundle: BundlePath,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Inputs of the figure: texts, or image files where the model takes images. Built-in examples where "
            "none is given.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="A text that CLIP compares the images with, or a question that Flamingo answers about them; once for "
            "each.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Where to write it.", show_default="BUNDLE's name with .html beside it"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is at --out.")] = False,
) -> None:
    """Write the report of a bundle: parity element by element, score, size, latency, operators, and a figure.

    The figure is computed by the bundle's own graph: which tokens attend to which (BERT), the source
    positions that each output attends to (translation), the surprisal of each token (GPT), the parts of an
    image that the result depends on (ViT), what a token sees through windows and their shift (Swin), what each
    latent reads (Perceiver), what each word of a caption attends to (Show, Attend and Tell), where each word of a
    question and its answer looks (Flamingo), which text fits which image (CLIP). The report is one HTML file that
    needs no network. Latency is measured on this machine, for a few seconds.
    """
    named = bundle if bundle.name not in ("", "..") else bundle.resolve()
    target = out or named.with_name(f"{named.name}.html")
    check_target(target, force=force)
    with export_extra():
        from transom.export.report.report import write_report

        write_report(bundle, inputs or [], target, prompts or [])
    print(printable(f"written to {target}"))


def check_target(target: Path, *, force: bool) -> None:
    """Raise ExportError where the file exists or cannot be written, before any work is done."""
    try:
        exists, folder = target.exists(), target.is_dir()
        special = target.is_symlink() or (exists and not folder and not target.is_file())
    except OSError as error:  # a name too long, a folder that may not be searched
        raise ExportError(f"cannot write {target}: {error.strerror}. Give another file with --out.") from None
    if special:  # replacing it would take a device or a link away
        raise ExportError(f"--out {target} is a link or no regular file; give another file.")
    if folder:
        raise ExportError(f"--out {target} is a folder; give the name of a file, such as report.html.")
    if exists and not force:
        raise ExportError(f"--out {target} exists; give another file, or --force to replace it.")
