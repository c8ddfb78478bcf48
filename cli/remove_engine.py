"""``transom remove-engine``: remove engines from a bundle."""

from __future__ import annotations

from transom.cli.options import BundlePath, Json, Target
from transom.cli.output import print_json, printable
from transom.runtime.format import bytes_text


def remove_engine(
    bundle: BundlePath,
    target: Target,
    as_json: Json = False,
) -> None:
    """Remove the engines for a target from a bundle.

    bundle.json is replaced first, then the files are deleted: interrupted at any moment, the bundle still loads, and
    the same command finishes the work. The rest of the bundle stays as it is; `transom build` makes an engine again.
    """
    from transom.export.engine.remove import remove_engines
    from transom.runtime.bundle import Bundle

    gone = remove_engines(Bundle(bundle), list(dict.fromkeys(target)))
    if as_json:
        print_json({"bundle": bundle, "targets": list(dict.fromkeys(target)), "removed": gone})
        return
    for name, size in gone.items():
        print(printable(f"removed {name}, {bytes_text(size)}"))
