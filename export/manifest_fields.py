"""Fields of bundle.json that an export knows before anything is compared: model, graphs, processors, source, tools."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from transom.export.checkpoint import LoadedCheckpoint
from transom.export.parity.compare import TOLERANCES
from transom.export.variants import Variants
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.manifest_graphs import BOTH, axis_to_json, graph_to_json

TOOLS = (
    "transom",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tokenizers",
    "sentencepiece",
    "pillow",
    "numpy",
)


def version_of(tool: str) -> str:
    """Return a tool's installed version; ONNX Runtime's from the library, whose distribution has several names."""
    return str(onnxruntime().__version__) if tool == "onnxruntime" else version(tool)


def manifest_fields(
    loaded: LoadedCheckpoint, precision: str, variants: Variants, made_for: str = BOTH
) -> dict[str, Any]:
    """Return the fields of bundle.json that are known before anything is compared."""
    optional = {
        "tokenizer": loaded.tokenizer.spec.to_json() if loaded.tokenizer else None,
        "target_tokenizer": loaded.target_tokenizer.spec.to_json() if loaded.target_tokenizer else None,
        "preprocess": loaded.preprocess.to_json() if loaded.preprocess else None,
        "generation": loaded.generation.to_json() if loaded.generation else None,
    }
    return {
        "name": loaded.checkpoint.name,
        "family": loaded.family.name,
        "task": loaded.task,
        "precision": precision,
        **({"for": made_for} if made_for != BOTH else {}),
        "config": asdict(loaded.config),
        "axes": {name: axis_to_json(axis) for name, axis in loaded.axes.items()},
        "graphs": [graph_to_json(graph) for graph in variants.graphs],
        **({"native": {name: dict(entry) for name, entry in variants.native.items()}} if variants.native else {}),
        "labels": list(loaded.labels),
        "options": dict(loaded.options),
        **{key: value for key, value in optional.items() if value is not None},
        "source": {
            "checkpoint": loaded.checkpoint.source,
            "sha256": loaded.sha256,
            "weights_left_out": sorted(loaded.left_out)[:100],
            **({"licence": dict(loaded.checkpoint.licence)} if loaded.checkpoint.licence else {}),
            **({"revision": loaded.checkpoint.revision} if loaded.checkpoint.revision else {}),
        },
        "tools": {tool: version_of(tool) for tool in TOOLS},
        "parity": {"tolerance": TOLERANCES[precision]},
    }
