"""Write bundles: a staging folder beside the target, one rename, nothing left behind on failure."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.staging import OLD, PARTIAL, remove_stale, staging_dir
from transom.export.stored_files import FolderFiles, StoredFile
from transom.runtime.atomic_write import write_bytes
from transom.runtime.backends.base import Read, ReadInPieces
from transom.runtime.bundle import Bundle, BundleReader, read_manifest, versioned
from transom.runtime.errors import ExportError
from transom.runtime.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    manifest_from_json,
    manifest_sha256,
)
from transom.runtime.text.tokenizer import TextTokenizer, export_again
from transom.runtime.text.tokenizer_spec import TokenizerSpec

if TYPE_CHECKING:
    from transom.export.variants import Variants


class StagedBundle(Bundle):
    """A bundle before its bundle.json is written: a manifest in memory, and ``read``, which returns a file's bytes.

    Nothing is hashed when it is read, for the bytes are this process' own, and ``tokenizers``, by file name, are not
    parsed again. ``folder`` names the bundle in messages.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        read: Read,
        tokenizers: Mapping[str, TextTokenizer],
    ) -> None:
        self.folder, self.manifest, self._read, self._tokenizers = folder, manifest, read, tokenizers

    @classmethod
    def of_variants(
        cls,
        fields: Mapping[str, Any],
        variants: Variants,
        files: Mapping[str, bytes],
        tokenizers: Mapping[str, TextTokenizer],
    ) -> StagedBundle:
        """Make a bundle of ``variants`` and the ``files`` beside them that is never written as one."""
        entries = {name: entry_of(data) for name, data in {**variants.files, **files}.items()}
        entries |= {name: file.entry() for name, file in variants.stored.items()}
        manifest = manifest_of(manifest_bytes(fields, entries))
        return cls(Path(manifest.name), manifest, variants, tokenizers)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return self._read(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file, in pieces where it lies in a folder."""
        if isinstance(self._read, ReadInPieces):
            yield from self._read.pieces(name)
        else:
            yield memoryview(self._read(name))

    def leased(self, name: str) -> None:
        """Lease nothing: ``pieces`` are not hashed either."""

    def reader(self) -> BundleReader:
        """Return what opens graphs: none of its files is held between two of them."""
        return StagedReader(self)

    def open_tokenizer(
        self, spec: TokenizerSpec, max_tokens: int, wider: Callable[[int], str] = export_again
    ) -> TextTokenizer:
        """Return the tokenizer that is open already, with the limits that are asked for."""
        return self._tokenizers[spec.file].with_limits(spec, max_tokens, wider)


class StagedReader(BundleReader):
    """Reads a staged bundle's files anew for each graph, for they need not be hashed."""

    def __init__(self, bundle: StagedBundle) -> None:
        super().__init__(bundle)
        self._staged = bundle

    def __call__(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return self._staged.read(name)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self._staged.size(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in order, each piece valid until the next."""
        return self._staged.pieces(name)


class BundleWriter:
    """Writes a bundle's files with ``add``, each hashed once, and bundle.json over all of them with ``describe``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, data: bytes) -> None:
        """Write a file and record its size and SHA-256."""
        write_bytes(self.folder / name, data)
        self._files[name] = entry_of(data)

    def adopt(self, file: StoredFile) -> None:
        """Record a file that was written into the folder and hashed as it was."""
        self._files[file.path.name] = file.entry()

    def manifest(self, fields: Mapping[str, Any]) -> Manifest:
        """Return the manifest of ``fields`` and the files so far, as a reader sees it, without writing it."""
        return manifest_of(manifest_bytes(fields, self._files))

    def staged(self, fields: Mapping[str, Any], tokenizers: Mapping[str, TextTokenizer]) -> StagedBundle:
        """Return the bundle of ``fields`` and the files so far, without writing bundle.json."""

        return StagedBundle(self.folder, self.manifest(fields), FolderFiles(self.folder), tokenizers)

    def describe(self, fields: Mapping[str, Any]) -> None:
        """Write bundle.json: ``fields`` with the format, the files and the hash over itself."""
        write_bytes(self.folder / MANIFEST, manifest_bytes(fields, self._files))


def add_to_bundle(folder: Path, added: Mapping[str, bytes], fields: Mapping[str, Any] | None = None) -> None:
    """Add files to a finished bundle, replacing those of their names, and ``fields`` to its bundle.json.

    The files first, bundle.json last: a reader sees the old bundle, one without the files, or the new one. Raises
    ExportError for a disk that is full or not writable.
    """
    manifest = read_manifest(folder)
    files = {known: entry for known, entry in manifest["files"].items() if known not in added}
    try:
        if len(files) < len(manifest["files"]):  # never a moment in which the old hash meets the new bytes
            write_manifest(folder, without_engines_of(added, manifest) | {"files": files})
        for name, data in added.items():
            parent = (folder / name).parent
            parent.mkdir(exist_ok=True)
            if not parent.resolve().is_relative_to(folder.resolve()):
                raise ExportError(f"{parent} is a link that leaves the bundle; nothing is written there. Remove it.")
            write_bytes(folder / name, data)
        entries = {name: entry_of(data) for name, data in added.items()}
        write_manifest(folder, manifest | dict(fields or {}) | {"files": {**files, **entries}})
    except OSError as error:
        raise ExportError(
            f"cannot write into {folder}: {error.strerror or error}. Check the folder, its permissions and space."
        ) from error


def without_engines_of(plans: Collection[str], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bundle.json without the engines that ``plans`` belong to: it would name files that are missing."""
    left = {
        target: engine
        for target, engine in manifest.get("engines", {}).items()
        if not {*engine["plans"].values()} & {*plans}
    }
    return {**manifest, **({"engines": left} if "engines" in manifest else {})}


def entry_of(data: bytes) -> dict[str, Any]:
    """Return size in bytes and SHA-256 in hex of a file, as bundle.json records them."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write bundle.json of ``fields`` and the hash over itself."""
    write_bytes(folder / MANIFEST, encoded(fields))


def manifest_bytes(fields: Mapping[str, Any], files: Mapping[str, Any]) -> bytes:
    """Return bundle.json of ``fields`` and ``files`` with the format and the hash over itself."""
    return encoded({"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "files": files})


def encoded(fields: Mapping[str, Any]) -> bytes:
    """Return ``fields`` as JSON with the hash over itself."""
    manifest = {key: value for key, value in fields.items() if key != "manifest_sha256"}
    manifest["manifest_sha256"] = manifest_sha256(manifest)
    return json.dumps(manifest, indent=1, allow_nan=False).encode() + b"\n"


def manifest_of(data: bytes) -> Manifest:
    """Parse the bytes of a bundle.json as a reader does. Raises BundleError for fields that a reader would refuse."""
    return manifest_from_json(versioned(data, MANIFEST))


@contextmanager
def new_bundle(out: Path, *, force: bool) -> Iterator[BundleWriter]:
    """Yield a writer whose folder becomes ``out`` when the block succeeds, and is removed when it does not.

    An existing ``out`` is refused without ``force`` and replaced, only at the very end, with it.
    Raises ExportError for that, and for a disk that is full or not writable.
    """
    check_out(out, force=force)
    created: list[Path] = []
    try:
        created = make_parents(out.parent)
        with staging_dir(out.parent, PARTIAL) as partial:
            partial.chmod(0o755)
            yield BundleWriter(partial)
            check_out(out, force=force)  # another process may have put something there in the meantime
            put_in_place(partial, out)
        created = []
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        with contextlib.suppress(OSError):  # not empty: another process uses it by now
            for parent in created:
                parent.rmdir()


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an ``--out`` that exists, before any work is done; remove stale staging folders beside it."""
    if not out.name or out.name in (".", ".."):
        raise ExportError(f"--out is {str(out)!r}; expected the path of a new folder, such as bundles/model.")
    remove_stale(out.parent)
    try:
        if not out.exists() and not out.is_symlink():
            return
    except OSError as error:  # a name too long, a folder that may not be searched
        raise cannot_write(out, error) from None
    if not force:
        raise ExportError(f"--out {out} exists; give another folder, or --force to replace it.")
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ExportError(f"--out {out} exists and is no bundle; --force replaces only bundles. Give another folder.")


def make_parents(folder: Path) -> list[Path]:
    """Create missing parents; return those created, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def put_in_place(partial: Path, out: Path) -> None:
    """Rename the finished folder to ``out``; a bundle already there is moved aside first, then removed.

    Killed between the two renames, the old bundle stays in the staging folder until the next export puts it back.
    """
    if not out.exists():
        partial.rename(out)
        return
    with staging_dir(out.parent, OLD) as aside:
        out.rename(aside / out.name)
        partial.rename(out)


def cannot_write(out: Path, error: OSError) -> ExportError:
    """Return the error for a disk that is full or not writable."""
    reason = error.strerror or str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some space" if full else "Check the folder and its permissions"
    return ExportError(f"cannot write {out}: {reason}. Nothing was left there. {remedy} and export again.")
