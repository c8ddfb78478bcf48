"""A bundle in words and as JSON, from its manifest alone: what inspect, export and table share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.cli.show import folder_bytes

if TYPE_CHECKING:
    from transom.runtime.bundle import Manifest
    from transom.runtime.spec import Tensor

GPU_FORMATS = ("fp16", "bf16")
GPU_NOTE = "GPU format: on a CPU it proves the graph, not the speed"


def manifest_json(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data, with where the bundle lies and what it takes on disk."""
    return {
        "bundle": str(path),
        "name": manifest.name,
        "family": manifest.family,
        "task": manifest.task,
        "precision": manifest.precision,
        "size_bytes": folder_bytes(path),
        "axes": {name: vars(axis) for name, axis in manifest.axes.items()},
        "graphs": [
            {
                "name": file.graph.name,
                "files": file.files,
                "weights": file.weights,
                "inputs": [vars(tensor) for tensor in file.graph.inputs],
                "outputs": [vars(tensor) for tensor in file.graph.outputs],
            }
            for file in manifest.graphs
        ],
        "labels": manifest.labels,
        "config": manifest.config,
        "options": manifest.options,
        "preprocess": manifest.preprocess,
        "files": {name: vars(file) for name, file in manifest.files.items()},
        "parity": manifest.parity,
        "score": manifest.score,
        "source": manifest.source,
        "tools": manifest.tools,
    }


def precision_text(precision: str) -> str:
    return f"{precision} (GPU format)" if precision in GPU_FORMATS else precision


def tensor_text(tensor: Tensor) -> str:
    """``input_ids int64 (B, S), values below 30522``."""
    text = f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"
    if tensor.below is not None:
        text += f", values below {tensor.below}"
    if tensor.default is not None:
        text += f", {tensor.default} if left out"
    return text


def parity_text(parity: Mapping[str, Any]) -> str:
    """The worst error that the export measured, against what its precision allows."""
    worst, tolerance = worst_error(parity), parity.get("tolerance")
    return "not recorded" if worst is None else f"{worst:.2e} of {tolerance:g} allowed"


def worst_error(parity: Mapping[str, Any]) -> float | None:
    """The largest error of the export's parity run, on the scale of its tolerance."""
    worst = parity.get("worst")
    error = worst.get("error") if isinstance(worst, Mapping) else None
    return error if isinstance(error, float) and isinstance(parity.get("tolerance"), float) else None


def score_value(score: Mapping[str, Any] | None, side: str) -> str:
    """``0.9889``, the task score of one side, "pytorch" or "bundle"; a dash where there is none."""
    return "–" if score is None else f"{score[side]['value']:.4f}"


def score_data(score: Mapping[str, Any]) -> str:
    """``top-1 accuracy on the held-out digits, n = 360``; says so where lower is better."""
    name = f"{score['name']} (lower is better)" if score.get("lower_is_better") else score["name"]
    return f"{name} on {score['data']}, n = {score['n']}"


def score_line(score: Mapping[str, Any]) -> str:
    """What was scored, and both sides: with how many they had right, or with the interval where none are counted."""
    sides = (f"{score_value(score, side)} ({score_detail(score[side])})" for side in ("bundle", "pytorch"))
    return f"{score_data(score)}: {', in PyTorch '.join(sides)}"


def score_detail(figures: Mapping[str, Any]) -> str:
    """``535`` right answers, or ``1.5012 to 1.5833`` for a rate."""
    if "correct" in figures:
        return str(figures["correct"])
    return " to ".join(f"{end:.4f}" for end in figures["interval"])


EXAMPLE_INPUTS = {  # (family, task) -> what to type after `transom run BUNDLE`
    ("bert", "feature-extraction"): "'A sentence.' 'Another one.'",
    ("bert", "fill-mask"): "'The capital of France is [MASK].'",
    ("bert", "text-classification"): "'What a lovely day.'",
    ("bert", "token-classification"): "'Ada Lovelace lived in London.'",
    ("bert", "question-answering"): "'Who wrote it?' 'Ada Lovelace wrote it in 1843.'",
    ("bert", "next-sentence-prediction"): "'It began to rain.' 'She opened her umbrella.'",
    ("vit", "image-classification"): "photo.png",
    ("vit", "feature-extraction"): "photo.png",
}


def next_commands(path: Path, manifest: Manifest) -> list[str]:
    """What to try with a bundle, ready to be pasted into a shell."""
    bundle = shlex.quote(str(path))
    inputs = EXAMPLE_INPUTS.get((manifest.family, manifest.task), "inputs.npz")
    return [f"transom run {bundle} {inputs}", f"transom selftest {bundle}", f"transom bench {bundle}"]
