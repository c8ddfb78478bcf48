"""``transom report``: what an export made, on one page that a browser opens."""

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
            help="What the picture is drawn of: texts, or image files for ViT and CLIP. Examples where none is given.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="A text that CLIP holds the images against; once for each text.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Where to write it.", show_default="BUNDLE's name with .html beside it"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is at --out.")] = False,
) -> None:
    """Write the report of a bundle: parity element by element, score, size, latency, operators, and a picture.

    The picture is drawn from the bundle's own graph: which token looks at which (BERT), which source
    position each output attends to (translation), how surprising each token was (GPT), where in an
    image the answer comes from (ViT), which text fits which image (CLIP). One HTML file, which needs
    no network. Latency is measured on this machine, for a few seconds.
    """
    named = bundle if bundle.name not in ("", "..") else bundle.resolve()
    target = out or named.with_name(f"{named.name}.html")
    check_target(target, force=force)
    with export_extra():
        from transom.export.report.write import write_report

        write_report(bundle, inputs or [], target, prompts or [])
    print(printable(f"written to {target}"))


def check_target(target: Path, *, force: bool) -> None:
    """Raise ExportError where there is something already, or nothing can be, before any work is done."""
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
