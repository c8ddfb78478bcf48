"""Make checkpoints of published size with random weights, inputs, and PyTorch's FP32 outputs, once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from full_size_models import DATA, EOS, MODELS, photographs

from bench.paths import Paths
from bench.session import Arrays
from bench.workloads import Workload

SEED = 0


def make_checkpoint(model: str, paths: Paths) -> bool:
    """Write a checkpoint and its calibration data; return False for a checkpoint that is there."""
    folder, samples = paths.checkpoint(model), MODELS[model][2]()
    if not same_arrays(paths.calibration(model), samples):
        write_arrays(paths.calibration(model), samples)
    if folder.exists():
        return False
    import torch
    import transformers

    partial = folder.with_name("checkpoint.partial")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(SEED)
    MODELS[model][1](transformers).eval().save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an .npz whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def same_arrays(path: Path, arrays: Arrays) -> bool:
    """Return whether an .npz is there and holds these arrays."""
    known = dict(np.load(path)) if path.exists() else {}
    return known.keys() == arrays.keys() and all(np.array_equal(known[name], arrays[name]) for name in arrays)


def inputs_of(workload: Workload) -> Arrays:
    """Return the inputs by transformers' names: real prose as bytes, or a crop of a photograph."""
    if workload.model == "vit" or workload.part == "image":
        return {"pixel_values": photographs()["pixel_values"][: workload.B]}
    prose = np.frombuffer((DATA / "austen_heldout.txt").read_bytes(), np.uint8).astype(np.int64)
    ids = prose[: workload.B * workload.S].reshape(workload.B, workload.S).copy()
    if workload.part == "text":
        ids[:, -1] = EOS
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def references(workloads: list[Workload], paths: Paths) -> Iterator[str]:
    """Write inputs and PyTorch's FP32 outputs of those workloads that lack them; yield the names of what was made."""
    from bench.peers import pytorch

    for workload in workloads:
        target = paths.reference(workload.name)
        made = inputs_of(workload)
        path = paths.inputs(workload.name)
        if same_arrays(path, made) and target.exists():
            continue
        target.unlink(missing_ok=True)
        write_arrays(path, made)
        session = pytorch.open_session("fp32", workload, made, paths)
        write_arrays(target, session.outputs())
        session.close()
        yield workload.name


def checkpoint_key(model: str, paths: Paths) -> str:
    """Return a hash of a checkpoint's data, sizes, settings and first weights, which change with the seed."""
    found = hashlib.sha256(paths.calibration(model).read_bytes())
    for file in sorted(paths.checkpoint(model).iterdir()):
        with file.open("rb") as opened:
            found.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(1 << 20))
    return found.hexdigest()[:16]
