"""Find the files of ONNX graphs, by the standard library alone."""

from __future__ import annotations

import json
from pathlib import Path

from bench.paths import Paths


def canonical_graphs(model: str, paths: Paths) -> dict[str, Path]:
    """Return the canonical graphs of this project's FP32 bundle by name."""
    folder = paths.bundle("transom", model, "fp32")
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    return {graph["name"]: folder / graph["files"]["default"] for graph in manifest["graphs"]}


def canonical(model: str, part: str, paths: Paths) -> Path:
    """Return the only graph, or CLIP's tower of ``part``."""
    found = canonical_graphs(model, paths)
    if len(found) == 1:
        return next(iter(found.values()))
    return next(path for name, path in found.items() if part in name or (part == "image" and "vision" in name))


def plain_gpt(paths: Paths) -> Path:
    return paths.peer("handlaid") / "gpt-plain" / "gpt.onnx"


def fused_gpt(variant: str, paths: Paths) -> Path:
    return paths.peer("handlaid") / f"gpt-{variant}" / "gpt.onnx"
