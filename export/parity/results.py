"""What bundle.json records of an export beside the files: how far off it was, and what its graphs were made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.export.parity.compare import TOLERANCES, Case
from transom.export.parity.fp16_range import Ranges, in_half
from transom.runtime.compare import BIAS, largest_scales
from transom.runtime.greedy_check import Divergence


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator, those of subgraphs too, the most frequent first.

    An operator that is not ONNX's own carries its domain: ``com.microsoft::FusedMatMul``.
    """
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes())
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def parity_to_json(
    cases: Sequence[Case], precision: str, ranges: Ranges, near_ties: Sequence[Divergence]
) -> dict[str, Any]:
    """The figures of the parity run; ``fp16_largest`` is the tensor nearest to the end of FP16, ``fp16_largest_sum``
    the product whose partial sums come nearest to it, or past it."""
    worst = max(cases, key=lambda case: case.worst.error)
    figures: dict[str, Any] = {
        "metric": "max|ours - pytorch| at a shape / max|pytorch| over all shapes (logits: at least 1), per output",
        "tolerance": TOLERANCES[precision],
        "scales": largest_scales(comparison for case in cases for comparison in case.comparisons),
        "worst": {"sizes": dict(worst.shape), **worst.worst.to_json()},
        "outputs": outputs_to_json(cases),
        "cases": [case_to_json(case) for case in cases],
    }
    if near_ties:
        figures["greedy_near_ties"] = [asdict(divergence) for divergence in near_ties]
    for key, measured in (("fp16_largest", ranges.tensors), ("fp16_largest_sum", ranges.sums)):
        found = in_half(measured)
        if found:
            name, (value, module) = max(found.items(), key=lambda item: item[1][0])
            figures[key] = {"tensor": name, "module": module, "value": value}
    return figures


def case_to_json(case: Case) -> dict[str, Any]:
    """The sizes of one case and each output's error there."""
    errors = {comparison.tensor: comparison.error for comparison in case.comparisons}
    return {"sizes": dict(case.shape), "errors": errors, **({"emulated": True} if case.emulated else {})}


def outputs_to_json(cases: Sequence[Case]) -> dict[str, Any]:
    """Of each output the worst element of all cases, and the histogram of all elements' |ours - theirs|.

    ``equal`` elements do not differ; ``counts[i]`` differ by 2^(exponent + i) or more, but less than twice that.
    """
    outputs: dict[str, Any] = {}
    for name in dict.fromkeys(comparison.tensor for case in cases for comparison in case.comparisons):
        found = [(case, each) for case in cases for each in case.comparisons if each.tensor == name]
        case, worst = max(found, key=lambda pair: pair[1].error)
        histogram = np.sum([each.histogram for _, each in found], axis=0)
        different = np.flatnonzero(histogram[1:]) + 1
        first, last = (int(different[0]), int(different[-1])) if len(different) else (BIAS, BIAS - 1)
        outputs[name] = {
            "worst": {"sizes": dict(case.shape), **worst.to_json()},
            "equal": int(histogram[0]),
            "exponent": first - BIAS,
            "counts": histogram[first : last + 1].tolist(),
        }
    return outputs
