"""``transom remove-engine``: take engines out of a bundle again."""

from __future__ import annotations

from typing import Annotated

import typer

from transom.cli.build import target_names
from transom.cli.options import BundlePath, Json
from transom.cli.output import print_json, printable
from transom.runtime.format import bytes_text


def remove_engine(
    bundle: BundlePath,
    target: Annotated[
        list[str],
        typer.Option(
            metavar="TARGET",
            autocompletion=lambda: target_names(),
            help="What the engine was built for, such as rtx-sm89. Repeatable.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Remove the engines for a target from a bundle.

    bundle.json is replaced first, then the files go: interrupted at any moment, the bundle loads, and the same command
    finishes. The rest of the bundle stays as it is; `transom build` makes an engine again.
    """
    from transom.export.engine.remove import remove_engines
    from transom.runtime.bundle import Bundle

    gone = remove_engines(Bundle(bundle), list(dict.fromkeys(target)))
    if as_json:
        print_json({"bundle": bundle, "targets": list(dict.fromkeys(target)), "removed": gone})
        return
    for name, size in gone.items():
        print(printable(f"removed {name}, {bytes_text(size)}"))
