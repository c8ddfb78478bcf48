"""``transom report``: what an export made, on one page that a browser opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transom.cli.extras import export_extra
from transom.cli.options import BundlePath
from transom.cli.show import printable
from transom.runtime.errors import ExportError


def report(
    bundle: BundlePath,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Source texts whose alignment is drawn (translation).", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Where to write it.", show_default="BUNDLE's name with .html beside it"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is at --out.")] = False,
) -> None:
    """Write the report of a bundle: its figures, parity case by case, and a picture.

    For a translation the picture is the attention of each output token over the source. One HTML
    file, which needs no network.
    """
    named = bundle if bundle.name not in ("", "..") else bundle.resolve()
    target = out or named.with_name(f"{named.name}.html")
    if target.exists() and not force:
        raise ExportError(f"--out {target} exists; give another file, or --force to replace it.")
    with export_extra():
        from transom.export.report.write import write_report

        write_report(bundle, texts or [], target)
    print(printable(f"written to {target}"))
