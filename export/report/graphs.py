"""Draw what a bundle's files hold: their sizes and weights, and the operators of its graphs in three stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
from markupsafe import Markup

from transom.export.bundle_graphs import onnx_files, operator_counts
from transom.export.report.rendering import render
from transom.runtime.backends.ort import PROVIDERS, SLOW_FUSIONS, session_entries
from transom.runtime.backends.ort_library import FATAL, onnxruntime
from transom.runtime.bundle import Bundle
from transom.runtime.format import at, natural, object_of
from transom.runtime.golden import GOLDEN
from transom.runtime.manifest_graphs import GraphFile

DEVICE = "cpu"
MOST_FILES, MOST_OPERATORS = 50, 60  # rows of the tables
INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)


# Operators


def operators_section(bundle: Bundle, models: Mapping[str, ir.Model]) -> Markup:
    """Draw a table for each graph: operators as exported, as shipped, and as ONNX Runtime executes them."""
    graphs = []
    for file in bundle.manifest.graphs:
        exported = at(bundle.manifest.operators, file.graph.name)
        shipped = operator_counts(models[file.file_for(DEVICE)])
        kernels = kernels_of(at(bundle.manifest.native, file.graph.name))
        table = operator_table(exported, shipped, executed_operators(bundle, file))
        graphs.append({"name": file.graph.name, **kernels, **table})
    return render("operators", graphs=graphs)


def kernels_of(entry: Any) -> dict[str, Any]:
    """Return how many of each pattern a graph's list of fused operators has, or why it has none."""
    fused = {name: natural(count) or 0 for name, count in list(object_of(at(entry, "fused")).items())[:MOST_OPERATORS]}
    refused = at(entry, "refused")
    return {"fused": fused, "refused": refused if isinstance(refused, str) else ""}


def operator_table(exported: Any, shipped: Mapping[str, int], executed: Mapping[str, int]) -> dict[str, Any]:
    """Return three stages of counts and the operators (name, own name, domain or None), the most frequent first."""
    stages = [{name: natural(count) or 0 for name, count in object_of(exported).items()}, dict(shipped), dict(executed)]
    names = sorted(set().union(*stages), key=lambda name: (-max(stage.get(name, 0) for stage in stages), name))
    operators = []
    for name in names[:MOST_OPERATORS]:
        domain, separator, own = name.rpartition("::")
        operators.append((name, own, domain if separator else None))
    complete = [dict.fromkeys(names, 0) | stage if stage else {} for stage in stages]
    return {"operators": operators, "stages": complete, "distinct": len(names)}


def executed_operators(bundle: Bundle, file: GraphFile) -> Mapping[str, int]:
    """Count the nodes of each operator after ONNX Runtime's own passes, at the runtime's optimisation level.

    Empty where ONNX Runtime cannot write the graph: one of more than 2 GiB does not fit into one file.
    """
    library = onnxruntime()
    options = library.SessionOptions()
    options.log_severity_level = FATAL
    for key, setting in session_entries(file, DEVICE).items():
        options.add_session_config_entry(key, setting)
    if file.weights is not None:
        weights = bundle.read(file.weights)
        options.add_external_initializers_from_files_in_memory([file.weights], [weights], [len(weights)])
    with TemporaryDirectory(prefix="transom-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "executed.onnx")
        try:
            library.InferenceSession(
                bundle.read(file.file_for(DEVICE)),
                options,
                providers=[PROVIDERS[DEVICE]],
                disabled_optimizers=SLOW_FUSIONS[DEVICE],
            )
            return operator_counts(ir.load(options.optimized_model_filepath))
        except Exception:  # the library raises RuntimeError and its own types
            return {}


# Sizes


@dataclass(frozen=True)
class Weights:
    """``parameters`` numbers in ``bytes`` bytes of a file."""

    parameters: int
    bytes: int


Stored = tuple[int | None, int, int]  # a weight: its offset outside the graph's file, or None; numbers; bytes


def weights_of(bundle: Bundle, models: Mapping[str, ir.Model]) -> dict[str, Weights]:
    """Return the weights in each file; a weight that several graphs read from one file is counted once."""
    weights: dict[str, Weights] = {}
    for file in bundle.manifest.graphs:
        for name in onnx_files(file):
            weights[name] = summed(each for each in stored_weights(models[name]) if each[0] is None)
        if file.weights is not None:
            weights[file.weights] = summed(
                {each for model in models.values() for each in stored_weights(model) if each[0] is not None}
            )
    return weights


def parameters_of(bundle: Bundle, models: Mapping[str, ir.Model]) -> int:
    """Return the number of parameters of one variant; other variants hold the same ones."""
    used = [models[file.file_for(DEVICE)] for file in bundle.manifest.graphs]
    inside = [each for model in used for each in stored_weights(model) if each[0] is None]
    outside = {each for model in used for each in stored_weights(model) if each[0] is not None}
    return summed([*inside, *outside]).parameters


def summed(weights: Iterable[Stored]) -> Weights:
    each = list(weights)
    return Weights(sum(numbers for _, numbers, _ in each), sum(size for _, _, size in each))


def stored_weights(model: ir.Model) -> list[Stored]:
    """Return the weights of a graph: floating-point numbers, and matrices of integers of 8 bits or fewer."""
    packed = {  # two weights of 4 bits share a byte
        blocks.name
        for node in model.graph
        if node.op_type == "MatMulNBits" and "bits" in node.attributes and node.attributes["bits"].value == 4
        for blocks in node.inputs[1:2]
        if blocks is not None
    }
    values = {name: weight.const_value for name, weight in model.graph.initializers.items()}
    return [
        (
            value.offset if isinstance(value, ir.ExternalTensor) else None,
            value.size * (1 + (name in packed)),
            value.nbytes,
        )
        for name, value in values.items()
        if value is not None and (value.dtype.is_floating_point() or (value.dtype in INTEGERS and len(value.shape) > 1))
    ]


def running_bytes(bundle: Bundle) -> int:
    """Return the bytes of all files but the golden values, which running does not need."""
    return sum(file.size for name, file in bundle.manifest.files.items() if name != GOLDEN)


def sizes_section(bundle: Bundle, weights: Mapping[str, Weights], parameters: int) -> Markup:
    """Draw one bar per file, the weights in it darker."""
    files = bundle.manifest.files
    largest = max((file.size for file in files.values()), default=0) or 1
    rows = []
    for name, file in sorted(files.items(), key=lambda item: -item[1].size)[:MOST_FILES]:
        inside = weights.get(name)
        share = min(inside.bytes / file.size, 1.0) if inside and file.size else 0.0
        width = 100 * file.size / largest
        rows.append({"name": name, "size": file.size, "width": width, "share": share, "golden": name == GOLDEN})
    total = sum(file.size for file in files.values())
    running = running_bytes(bundle)
    return render("sizes", files=rows, total=total, running=running, count=len(files), parameters=parameters)
