"""The checkpoint of a bundle, opened once more: to be held against it again, or to find where the two part."""

from __future__ import annotations

from transom.export.checkpoint import LoadedCheckpoint, load_checkpoint
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError
from transom.runtime.manifest import Manifest


def reload_checkpoint(bundle: Bundle, source: str | None = None) -> LoadedCheckpoint:
    """What ``bundle`` was made from, with its bounds. ``source`` says where that lies now, if it moved.

    Raises CheckpointError where it is gone, or is another.
    """
    manifest = bundle.manifest
    loaded = load_checkpoint(
        source or str(manifest.source.get("checkpoint")),
        task=manifest.task,
        max_sizes={name: axis.max for name, axis in manifest.axes.items()},
        image_size=image_size_of(manifest),
        ignore_unused=True,
    )
    if loaded.checkpoint.sha256() != manifest.source.get("sha256"):
        raise CheckpointError(
            f"{loaded.checkpoint.folder} is not the checkpoint that {bundle.folder} was made from: its hash differs. "
            "Give the right one with --source, or export again."
        )
    return loaded


def image_size_of(manifest: Manifest) -> tuple[int, int] | None:
    """(height, width) in pixels that the bundle was exported for; None where it sees no images."""
    for file in manifest.graphs:
        for tensor in file.graph.inputs:
            if tensor.name == "pixel_values":
                return int(tensor.shape[2]), int(tensor.shape[3])
    return None
