"""Write bundles as models of a repository of Triton Inference Server.

    NAME/config.pbtxt   the configuration
    NAME/1/model.py     the runtime's model for Triton's Python backend
    NAME/1/bundle/      the bundle, copied
    NAME/1/model.onnx   of --kind onnx in place of the two above, beside its weights

Models of one bundle share its files by hard links, where the file system has them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.export.bundle_writer import make_parents, manifest_of, put_in_place
from transom.export.staging import PARTIAL, remove_stale, staging_dir
from transom.export.triton.config import CONFIG
from transom.export.triton.models import BUNDLE, ONNX, Model, Models, Options, models_of
from transom.runtime.atomic_write import replacing, write_bytes
from transom.runtime.bundle import Bundle, changed, regular_file
from transom.runtime.errors import ExportError
from transom.runtime.manifest import MANIFEST, Manifest

__all__ = ["Options", "Written", "write_repository"]

VERSION = "1"
MODEL_PY = '''"""Serve the bundle beside this file; `transom repository` wrote it."""

from transom.runtime.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Written:
    """A model in the repository: its folder, its bundle's folder, and the size of its files in bytes."""

    model: Model
    folder: Path
    bundle: Path
    size: int

    def to_json(self) -> dict[str, Any]:
        config = self.model.config
        tensors = {
            side: [
                {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "optional": tensor.optional}
                for tensor in given
            ]
            for side, given in (("inputs", config.inputs), ("outputs", config.outputs))
        }
        return {
            "name": self.model.name,
            "kind": self.model.kind,
            "graph": self.model.graph,
            "bundle": self.bundle,
            "folder": self.folder,
            "bytes": self.size,
            "max_batch_size": config.max_batch_size,
            **tensors,
            "parameters": list(self.model.parameters),
        }


@dataclass(frozen=True)
class Source:
    """A bundle, the bytes of its bundle.json, and the models that it gives."""

    bundle: Bundle
    described: bytes
    models: list[Model]


def write_repository(
    out: Path,
    folders: Sequence[Path],
    options: Options | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    tell: Callable[[str], None] = lambda step: None,
) -> list[Written]:
    """Write the models of bundles into the repository ``out``; return them in the order of ``folders``.

    A bundle's models are named after its folder, or ``name``. Each appears when it is complete, and a new repository
    when all are; ``force`` replaces those that are there.

    Raises BundleError for a bundle that is damaged, ExportError for names that are taken, twice there, or that no URL
    allows, for a bundle without a model of the kinds, and for a disk that is full or not writable.
    """
    options = options or Options()
    sources = [source_of(folder, stem, options, tell) for folder, stem in stems(folders, name).items()]
    models = [model.name for source in sources for model in source.models]
    require_free(out, models, force=force)
    written: list[Written] = []
    with staged_repository(out, models, force=force) as partial:
        for source in sources:
            tell(f"writing the models of {source.bundle.folder}")
            there: dict[str, Path] = {}
            for model in source.models:
                size = write_model(partial / model.name, model, source, there)
                written.append(Written(model, out / model.name, source.bundle.folder, size))
    return written


def stems(folders: Sequence[Path], name: str | None) -> dict[Path, str]:
    """Return what the models of each bundle are named after.

    Raises ExportError for two bundles of one name, and for a ``name`` of several.
    """
    if name is not None and len(folders) > 1:
        raise ExportError(f"--name is {name!r:.60}, and {len(folders)} bundles were given; expected one. Leave it out.")
    found: dict[str, Path] = {}
    for folder in folders:
        stem = name if name is not None else Path(os.path.abspath(folder)).name  # of a link: its own
        if stem in found:
            raise ExportError(
                f"{found[stem]} and {folder} are both called {stem!r:.60}, and so would their models be. Write one of "
                "them by itself, with --name."
            )
        found[stem] = folder
    return {folder: stem for stem, folder in found.items()}


def source_of(folder: Path, stem: str, options: Options, tell: Callable[[str], None]) -> Source:
    """Read a bundle and find its models."""
    tell(f"reading {folder}")
    bundle = Bundle(folder)
    described = regular_file(folder, MANIFEST).read_bytes()
    if manifest_of(described) != bundle.manifest:
        raise changed(folder, MANIFEST)
    sha256 = hashlib.sha256(described).hexdigest()
    return Source(bundle, described, models_of(Models(bundle, stem, options, sha256, served_files(bundle.manifest))))


def served_files(manifest: Manifest) -> dict[str, str]:
    """Return the files of a model around the runtime, and which of the bundle each is."""
    return {f"{VERSION}/{BUNDLE}/{name}": name for name in (*manifest.files, MANIFEST)}


def require_free(out: Path, models: Sequence[str], *, force: bool) -> None:
    """Raise ExportError where models cannot be put into ``out``: two of one name, or a place that is taken."""
    twice = next((model for place, model in enumerate(models) if model in models[:place]), None)
    if twice is not None:
        raise ExportError(f"two models would be called {twice!r}; give one of their bundles another --name.")
    if not out.name or out.name == "..":
        raise ExportError(f"--out is {str(out)!r}; expected the path of a folder, such as models.")
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise ExportError(f"--out {out} is no folder; give that of a model repository, or a new one.")
        for folder in (out, *out.resolve().parents):
            if (folder / MANIFEST).exists():
                where = "a bundle" if folder == out else f"in the bundle {folder}"
                raise ExportError(f"--out {out} is {where}; give the folder of a model repository, or a new one.")
        for model in models:
            folder = out / model
            if not os.path.lexists(folder):
                continue
            if not force:
                raise ExportError(f"{folder} exists; give --force to replace it, or another --name or --out.")
            if folder.is_symlink() or not folder.is_dir() or not (folder / CONFIG).is_file():
                raise ExportError(f"{folder} exists and is no model; --force replaces only models. Move it away.")
    except OSError as error:  # a name too long, a folder that may not be searched
        raise cannot_write(out, error) from None


@contextlib.contextmanager
def staged_repository(out: Path, models: Sequence[str], *, force: bool) -> Iterator[Path]:
    """Yield a folder for ``models``, which go to ``out`` when the block succeeds and are removed when it does not.

    Raises ExportError for a disk that is full or not writable.
    """
    created: list[Path] = []
    try:
        created = make_parents(out.parent)
        beside = staging_place(out)
        remove_stale(beside)
        if out.exists():
            remove_stale(out)  # a model that was moved aside goes back
        with staging_dir(beside, PARTIAL) as partial:
            partial.chmod(0o755)
            yield partial
            require_free(out, models, force=force)  # another process may have put something there in the meantime
            if out.exists():
                for model in models:
                    put_in_place(partial / model, out / model)
            else:
                partial.rename(out)
        created = []
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        with contextlib.suppress(OSError):  # not empty: another process uses it by now
            for parent in created:
                parent.rmdir()


def staging_place(out: Path) -> Path:
    """Return where models are made: beside ``out``, which a server may watch; in it where it is another file system."""
    if not out.exists() or (out.stat().st_dev == out.parent.stat().st_dev and os.access(out.parent, os.W_OK | os.X_OK)):
        return out.parent
    return out


def write_model(folder: Path, model: Model, source: Source, there: dict[str, Path]) -> int:
    """Write a model; return the size of its files in bytes. ``there`` has copies of the bundle's files, by name."""
    write_new(folder / CONFIG, model.config.text().encode())
    if model.kind != ONNX:
        write_new(folder / VERSION / "model.py", MODEL_PY.encode())
    for place, name in model.files.items():
        if name in there:
            link_or_copy(there[name], folder / place)
            continue
        if name == MANIFEST:
            write_new(folder / place, source.described)
        else:
            copy_checked(source.bundle, name, folder / place)
        there[name] = folder / place
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_new(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


def copy_checked(bundle: Bundle, name: str, target: Path) -> None:
    """Copy a file of a bundle; BundleError where what was copied does not have its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with regular_file(bundle.folder, name).open("rb") as source, replacing(target) as copy:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != bundle.manifest.files[name].sha256:
        raise changed(bundle.folder, name)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as opened, replacing(target) as copy:
            shutil.copyfileobj(opened, copy, CHUNK)


def cannot_write(out: Path, error: OSError) -> ExportError:
    """Return the error for a disk that is full or not writable."""
    return ExportError(
        f"cannot write into {out}: {error.strerror or error}. Check the folder, its permissions and space, and write "
        "again; every model that is there is complete."
    )
