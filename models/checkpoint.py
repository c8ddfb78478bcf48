"""Open a checkpoint: a reference model's name, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transom.models.json_files import read_object
from transom.models.pooling import sentence_modules, sentence_pooling
from transom.models.provenance import licence, revision
from transom.runtime.errors import CheckpointError, one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
HUB_FILES = ["*.json", "*vocab.txt", "*merges.txt", "*.spm", "*.safetensors"]  # never the pickles
HUB_FILES += ["README.md", "LICENSE*", "LICENCE*", "COPYING*"]  # which say what may be done with them
log = logging.getLogger("transom")
_aside: list[tempfile.TemporaryDirectory[str]] = []  # the one folder of downloads that no cache can keep
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened but not loaded."""

    name: str  # what the bundle is called
    source: str  # what the user may hand to `transom verify --source` again
    folder: Path  # of config.json, the weights and the tokenizer
    config_json: Mapping[str, Any]  # parsed
    weight_files: tuple[Path, ...]
    pooling: Mapping[str, Any]  # of sentence-transformers; empty elsewhere
    licence: Mapping[str, str] = field(default_factory=dict)  # as ``transom.models.provenance`` reads it
    revision: str | None = None  # the commit of the hub's repository, where the folder says it

    def sha256(self) -> str:
        """Hash config.json, the pooling and the weights, from which the graphs are made."""
        digest = hashlib.sha256(repr(sorted(self.pooling.items())).encode())
        for path in (self.folder / "config.json", *self.weight_files):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for block in blocks(path):
                digest.update(block)
        return digest.hexdigest()


def blocks(path: Path, size: int = 1 << 22) -> Iterator[bytes]:
    """Yield a file in blocks of ``size`` bytes."""
    with path.open("rb") as file:
        while block := file.read(size):
            yield block


def open_checkpoint(source: str, references: Mapping[str, Callable[[], Path]]) -> Checkpoint:
    """Find SOURCE and read its config.json; weights are located, not read.

    ``references`` are the reference models by name, each a function that finds and checks its folder.

    Raises CheckpointError when nothing is found, config.json is missing or damaged, the weights are
    pickled or missing, or a sharded index names a file outside the folder.
    """
    root, name, recorded = locate(source, references)
    transformer = next((where for kind, where in sentence_modules(root) if kind == "transformer"), root)
    config = transformer / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{transformer} has no config.json; SOURCE must be a Hugging Face checkpoint folder.")
    config_json, weights = read_object(config), find_weights(transformer)
    return Checkpoint(
        name=name,
        source=recorded,
        folder=transformer,
        config_json=config_json,
        weight_files=weights,
        pooling=sentence_pooling(root),
        licence=licence(root),
        revision=revision(root, config_json, (config, *weights)),
    )


def locate(source: str, references: Mapping[str, Callable[[], Path]]) -> tuple[Path, str, str]:
    """Return the folder of SOURCE, the name its bundle gets, and SOURCE as recorded in the bundle."""
    if source in references:
        return references[source](), source, source
    try:
        folder = Path(source).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown ~user, a NUL
        raise CheckpointError(f"{source[:200]!r} cannot be a path: {error}. Check it.") from None
    if is_folder:
        return folder, folder.resolve().name, str(folder.resolve())
    if exists:
        raise CheckpointError(f"{source} is a file; SOURCE must be the checkpoint's folder, the one with config.json.")
    if not HUB_ID.fullmatch(source) or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source!r} is neither a folder nor a hub id (organisation/model[@revision]) nor one of our reference "
            f"models ({', '.join(references)}). Check the path."
        )
    return download(source), source.partition("@")[0].rsplit("/", 1)[-1], source


def download(source: str) -> Path:
    """Fetch a hub id through huggingface_hub, which honours HF_HUB_OFFLINE, HF_ENDPOINT and its cache.

    Where that cache cannot be written, what it holds is read, and what it lacks goes to a folder that lives as long as
    this process.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    repository, _, revision = source.partition("@")
    try:
        why = cannot_write(Path(HF_HUB_CACHE))
        folder = snapshot(repository, revision) if why is None else snapshot_aside(repository, revision, why)
        if not any(folder.rglob("*.safetensors")) and not HF_HUB_OFFLINE:
            refuse_pickles(source, HfApi(token=token()).list_repo_files(repository, revision=revision or None))
        return folder
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types for "not there"
        raise CheckpointError(
            f"{source!r} is no folder here and the hub did not give it ({type(error).__name__}: {one_line(error)}). "
            "Check the name and the connection, or download it and pass the folder."
        ) from None


def snapshot(repository: str, revision: str, **options: Any) -> Path:
    """Download the files of a revision that Transom reads; return their folder."""
    from huggingface_hub import snapshot_download

    options |= {"revision": revision or None, "allow_patterns": HUB_FILES, "token": token()}
    return Path(snapshot_download(repository, **options))


def token() -> bool | None:
    """Return None, so that the client looks for a token itself; False where its file cannot be read."""
    from huggingface_hub import get_token

    try:
        get_token()
    except OSError:
        return False
    return None


def snapshot_aside(repository: str, revision: str, reason: str) -> Path:
    """Return the snapshot in a cache that cannot be written, or download one to a folder of this process."""
    with contextlib.suppress(Exception):  # not there, in one of the client's many ways
        return snapshot(repository, revision, local_files_only=True)
    if not _aside:
        _aside.append(tempfile.TemporaryDirectory(prefix="transom-hub-"))
        log.warning(
            "what the hub gives is not kept: %s. It is downloaded to %s and goes with this process. Set HF_HOME to a "
            "folder that can be written.",
            reason,
            _aside[0].name,
        )
    return snapshot(repository, revision, cache_dir=_aside[0].name)


def cannot_write(folder: Path) -> str | None:
    """Return why nothing can be written into ``folder``, which is made where it is missing; None where it can."""
    if not folder.is_absolute():  # "~" stays what it is where there is no home
        return f"there is no home folder, so that the hub's cache would be {folder} below the current one"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder} cannot be made: {error.strerror or error}"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Return model.safetensors, or the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise CheckpointError(missing_weights(folder))
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download the checkpoint again.")
    shards = sorted({str(name) for name in weight_map.values()})
    strangers = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if strangers:
        raise CheckpointError(f"{index} names {strangers[0]!r}; a shard must be a .safetensors file beside it.")
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(shards)} shards, missing here: {', '.join(absent)}. Download the checkpoint again."
        )
    return tuple(folder / name for name in shards)


def missing_weights(folder: Path) -> str:
    """Return the message for a folder without safetensors; raise CheckpointError for pickled weights."""
    refuse_pickles(str(folder), [path.name for path in folder.iterdir()])
    return f"{folder} has no model.safetensors and no model.safetensors.index.json; download the weights."


def refuse_pickles(source: str, names: Iterable[str]) -> None:
    """Raise CheckpointError if there are pickled weights among the files ``names``, where there are no others."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(
            f"{source} has its weights only as {', '.join(pickles[:3])}, a format that can run code when it is opened, "
            'so Transom never opens it. Convert it where you trust it: python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{source}').save_pretrained('{Path(source).name}-safe')\" "
            "(with the class that config.json's architectures names, in a version of transformers that has it: 4 for "
            "vit-hybrid), then export that folder."
        )
