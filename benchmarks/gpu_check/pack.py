"""The pack that a machine with a GPU is given: the wheel, kernels as PTX, and a manifest with every file's hash.

    build/gpu-check/manifest.json, transom-*.whl, kernels/*.json

Only the standard library: a pack is compared with its manifest before anything in it is imported or parsed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST, KERNELS = "manifest.json", "kernels"
BUILD = "make gpu-check-build"
PLUGINS = "transom/export/plugins"  # in the wheel; what decides which PTX a case has lies there


class CheckError(Exception):
    """What stands in the way of the check: received, expected, what to do."""


@dataclass(frozen=True)
class Pack:
    """A pack whose files are those of its manifest; ``sms`` are the compute capabilities with kernels."""

    folder: Path
    key: str
    wheel: Path
    sms: tuple[int, ...]
    versions: Mapping[str, str]

    @property
    def kernels(self) -> Path:
        return self.folder / KERNELS

    def sm_for(self, capability: int, gpu: str) -> int:
        """Return the compute capability of the pack whose PTX this GPU runs: its own, else the last below SM90.

        From SM90 on PTX is architecture-specific. Raises CheckError where there is none.
        """
        known = [sm for sm in self.sms if sm == capability or sm <= min(capability, 89)]
        if not known:
            held = ", ".join(f"SM{sm}" for sm in self.sms)
            raise CheckError(
                f"{gpu} is SM{capability}, and {self.folder} has kernels for {held}; expected some that run on it. "
                f'Where Triton is: `{BUILD} GPU_SMS="{capability}"`, and carry {self.folder} here.'
            )
        return capability if capability in known else max(known)


def write_manifest(folder: Path, sms: tuple[int, ...], versions: Mapping[str, str]) -> None:
    """Write the manifest of all that lies in ``folder``, last and at once."""
    files = {path.relative_to(folder).as_posix(): describe(path) for path in sorted(folder.rglob("*")) if kept(path)}
    about = {"format": FORMAT, "sms": list(sms), "versions": dict(versions), "files": files}
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


def kept(path: Path) -> bool:
    return path.is_file() and path.name != MANIFEST and not path.name.startswith(".")


def describe(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_pack(folder: Path) -> Pack:
    """Return the pack in ``folder``, every file compared with the manifest.

    Raises CheckError for a pack that is absent, of another format, incomplete or damaged.
    """
    manifest = folder / MANIFEST
    again = f"Run `{BUILD}` where Triton is, and carry {folder} here as a whole."
    if not manifest.is_file():
        raise CheckError(f"there is no {manifest}; expected the wheel and the kernels, compiled beforehand. {again}")
    try:
        text = manifest.read_text(encoding="utf-8")
        about = json.loads(text)
        if about["format"] != FORMAT:
            raise CheckError(f"{manifest} is of format {about['format']!r:.20}; expected {FORMAT}. {again}")
        files, sms = dict(about["files"]), tuple(int(sm) for sm in about["sms"])
        versions = {str(name): str(version) for name, version in about["versions"].items()}
        wrong = [why for name, entry in files.items() if (why := problem(folder, name, dict(entry)))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckError(
            f"{manifest} cannot be read ({error!r:.100}); expected what the build wrote. {again}"
        ) from None
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckError(f"the pack is damaged: {'; '.join(wrong[:3])}{more}; expected its manifest's files. {again}")
    wheels = [folder / name for name in files if name.endswith(".whl")]
    if len(wheels) != 1 or not sms:
        raise CheckError(f"{manifest} names {len(wheels)} wheels and {len(sms)} SMs; expected a wheel, an SM. {again}")
    return Pack(folder, hashlib.sha256(text.encode()).hexdigest()[:16], wheels[0], sms, versions)


def problem(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """Return how a file differs from the manifest, or None."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name} leaves the folder"
    if not path.is_file():
        return f"{name} is missing"
    found = describe(path)
    if found["size"] != entry["size"]:
        return f"{name} has {found['size']} bytes, not {entry['size']}"
    return None if found["sha256"] == entry["sha256"] else f"{name} has another SHA-256"


def unpack_wheel(pack: Pack, site: Path, repository: Path) -> None:
    """Unpack the wheel into ``site``, as an installation without dependencies does.

    Raises CheckError where the kernels' sources in the working tree are not the wheel's: the pack is of another state.
    """
    with zipfile.ZipFile(pack.wheel) as wheel:
        wheel.extractall(site)
    packed = sorted((site / PLUGINS).glob("*.py"))
    here = repository / "export" / "plugins"
    other = [path.name for path in packed if here.is_dir() and not same(path, here / path.name)]
    if other or not packed:
        raise CheckError(
            f"{pack.wheel.name} has another {', '.join(other) or 'package'} than this working tree; expected a pack of "
            f"this state. Run `{BUILD}` again."
        )


def same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def write_beside(path: Path, text: str) -> None:
    """Replace a file's text at once: a run that is cut off leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
