"""Remove the engines for some targets from a bundle."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from transom.export.bundle_writer import write_manifest
from transom.export.engine.build import FOLDER
from transom.runtime.bundle import Bundle, read_manifest
from transom.runtime.errors import ExportError


def remove_engines(bundle: Bundle, targets: Sequence[str]) -> dict[str, int]:
    """Remove the engines for ``targets``; return the removed files with their sizes in bytes.

    bundle.json is replaced first, so that it never names a missing file; an interruption leaves a file that it does not
    name, and the next call removes it. Raises ExportError for a target that the bundle has no engine for, before
    anything is removed, and for a folder that cannot be written.
    """
    folder, manifest = bundle.folder, read_manifest(bundle.folder)
    engines, files = manifest.get("engines", {}), manifest["files"]
    left = {target: engine for target, engine in engines.items() if target not in targets}
    kept = {plan for engine in left.values() for plan in engine["plans"].values()}
    plans = {plan for target in targets if target in engines for plan in engines[target]["plans"].values()} - kept
    strays = {target: stray_plans(folder, target, files) for target in targets}
    for target in targets:
        if target not in engines and not strays[target]:
            there = ", ".join(engines) or "none"
            raise ExportError(f"{folder} has no engine for {target!r:.60}; it has {there}. Nothing was removed.")
    gone = {name: (folder / name).stat().st_size for name in sorted(plans.union(*strays.values()))}
    try:
        if plans:
            rest = {name: entry for name, entry in files.items() if name not in plans}
            fields = {key: value for key, value in manifest.items() if key != "engines"}
            write_manifest(folder, {**fields, **({"engines": left} if left else {}), "files": rest})
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        if not os.listdir(folder / FOLDER):
            (folder / FOLDER).rmdir()
    except OSError as error:
        raise ExportError(
            f"cannot remove engines from {folder}: {error.strerror or error}. Check the folder and its permissions, "
            "and run the command again."
        ) from error
    return gone


def stray_plans(folder: Path, target: str, files: Collection[str]) -> list[str]:
    """Return the plans of ``target`` in the bundle's folder that bundle.json does not name."""
    if not (folder / FOLDER).is_dir() or not (folder / FOLDER).resolve().is_relative_to(folder.resolve()):
        return []
    return [
        name
        for path in (folder / FOLDER).iterdir()
        if path.name.endswith(".plan") and path.name.split(".")[0] == target and not path.is_dir()
        if (name := f"{FOLDER}/{path.name}") not in files
    ]
