"""Read the folder of a bundle, trusting nothing in it.

docs/bundle_format.md is the specification. The order of checks: bundle.json is a regular file of sane
size, parses, has a format version we know, has every field well-formed, names only files inside the
folder; then its own hash; then each file's size and SHA-256. Only then is anything else parsed.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transom.runtime.errors import BundleError
from transom.runtime.json_reader import parse_json
from transom.runtime.manifest import FORMAT, FORMAT_VERSION, MANIFEST, File, manifest_from_json
from transom.runtime.text.tokenizer import TextTokenizer, export_again
from transom.runtime.text.tokenizer_spec import TokenizerSpec

MAX_MANIFEST_BYTES = 16 << 20  # labels of a 100,000-way classifier are 3 MB


class Bundle:
    """A bundle's folder, its manifest checked and every file's size and hash compared.

    Raises BundleError from the constructor when anything is missing, changed, or outside the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = manifest_from_json(read_manifest(self.folder))
            for name, file in self.manifest.files.items():
                check_file(self.folder, name, file)
        except OSError as error:
            raise BundleError(f"{error.filename or folder} cannot be read: {error.strerror}. Check it.") from None

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, hashed as they were read, so that they are the ones that were checked."""
        file = self.manifest.files.get(name)
        if file is None:
            raise BundleError(f"{self.folder / MANIFEST} does not list {name!r} under files; export the bundle again.")
        data = regular_file(self.folder, name).read_bytes()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise changed(self.folder, name)
        return data

    def open_tokenizer(
        self, spec: TokenizerSpec, max_tokens: int, wider: Callable[[int], str] = export_again
    ) -> TextTokenizer:
        """Open the tokenizer that ``spec`` describes, with the limits of ``TextTokenizer``."""
        return TextTokenizer(self.read(spec.file), spec, max_tokens, wider)


def read_manifest(folder: Path) -> Any:
    """Parse the bundle.json of a folder and check its format version, nothing else."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder; expected a bundle that `transom export` made.")
    path = regular_file(folder, MANIFEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} are read; it is no file of Transom."
        )
    return versioned(path.read_bytes(), str(path))


def versioned(data: bytes, path: str) -> dict[str, Any]:
    """Parse the bytes of a bundle.json and check its format version, nothing else."""
    value = parse_json(data, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f'{path} does not say "format": "{FORMAT}"; the folder is no bundle of Transom.')
    version = value.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise BundleError(
            f"{path} has format version {version!r:.60}, this Transom reads version {FORMAT_VERSION}. "
            "Upgrade with `pip install --upgrade transom`, or export the bundle again."
        )
    return value


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of a file that exists, is a regular file, and lies in the folder when links are followed."""
    path = folder / name
    if not path.exists():
        reason = "it is no bundle, or an incomplete one" if name == MANIFEST else "the bundle is incomplete"
        raise BundleError(f"{folder} has no {name}; {reason}. Copy or export it again.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leaves the bundle; a bundle must hold its own files.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise BundleError(f"{path} is no regular file; the bundle is damaged, copy it again.")
    return path


def check_file(folder: Path, name: str, file: File) -> None:
    """Compare a file's size, then its SHA-256, with what bundle.json says."""
    path = regular_file(folder, name)
    if path.stat().st_size != file.size:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, bundle.json says {file.size}; it is truncated or changed. "
            "Copy the bundle again."
        )
    with path.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
            raise changed(folder, name)


def changed(folder: Path, name: str) -> BundleError:
    return BundleError(f"{folder / name} does not have the SHA-256 that bundle.json says; copy the bundle again.")
