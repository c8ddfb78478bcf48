"""Bundles of an earlier version with a list of operators added to each graph that has one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from paths import REPO
from transom.export.native.lowering import lower
from transom.runtime.bundle import Bundle
from transom.runtime.manifest import MANIFEST, manifest_sha256
from transom.runtime.native.operator_list import list_to_json

EARLIER = REPO / "tests" / "bundles" / "0.1.0"


def with_lists(name: str, target: Path) -> Path:
    """Copy a bundle of EARLIER and lower its graphs; weights that lay inside of a model lie beside it too."""
    shutil.copytree(EARLIER / name, target)
    words = json.loads((target / MANIFEST).read_text())
    for file, entry in zip(Bundle(target).manifest.graphs, words["graphs"], strict=True):
        lowered = lower(ir.load(target / file.files["default"]), file.graph)
        weights = file.weights or f"{file.graph.name}.weights"
        data = bytearray((target / weights).read_bytes() if file.weights else b"")
        offsets = {}
        for tensor, weight in lowered.weights.items():
            data += bytes(-len(data) % 64)
            offsets[tensor] = len(data)
            data += np.ascontiguousarray(weight.tensor.numpy()).tobytes()
        (target / weights).write_bytes(data)
        listed = f"{file.graph.name}.operators.json"
        (target / listed).write_text(json.dumps(list_to_json(lowered.placed(weights, offsets))))
        entry["files"]["native"], entry["weights"] = listed, weights
        for each in (weights, listed):
            words["files"][each] = {}
    sign(target, words)
    return target


def sign(folder: Path, words: dict[str, Any]) -> None:
    """Write a manifest with the sizes and hashes of the files as they are."""
    for name in words["files"]:
        data = (folder / name).read_bytes()
        words["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    words.pop("manifest_sha256", None)
    (folder / MANIFEST).write_text(json.dumps({**words, "manifest_sha256": manifest_sha256(words)}))


def change_list(folder: Path, graph: str, change: Callable[[Any], None]) -> None:
    """Change the list of a graph, and sign the bundle as an attacker would."""
    path = folder / f"{graph}.operators.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    sign(folder, json.loads((folder / MANIFEST).read_text()))
