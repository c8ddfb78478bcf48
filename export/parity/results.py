"""Results of a parity run: the golden values, and the object ``parity`` of bundle.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from transom.export.parity.fp16_range import Ranges, in_half
from transom.runtime.backends.base import Array
from transom.runtime.compare import BIAS, Comparison, largest_scales
from transom.runtime.greedy_check import Divergence

CASE_BYTES = 4 << 20  # of one case
TOTAL_BYTES = 12 << 20  # of all: each device stores them


@dataclass(frozen=True)
class CaseResult:
    """The worst element of each output in one case, by its ``shape``.

    ``emulated``: not of what ships, but of FP16 as a GPU would round it. ``native``: of the lists of fused operators.
    """

    shape: Mapping[str, int]
    comparisons: tuple[Comparison, ...]
    emulated: bool = False
    native: bool = False

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda comparison: comparison.error)


class Golden:
    """Golden values: small cases in the order they come; the first is always kept, and so is a generation."""

    def __init__(self) -> None:
        self._tensors: dict[str, Array] = {}
        self._bytes = 0

    def offer(
        self, case: str, inputs: Mapping[str, Array], sides: Mapping[str, Mapping[str, Array]], *, always: bool = False
    ) -> None:
        """Keep a case as ``<case>/input|<side>/<tensor>`` if it fits, or ``always``.

        ``sides`` are those of transom.runtime.golden_reference.
        """
        tensors = {
            f"{case}/{side}/{name}": np.ascontiguousarray(array)  # safetensors writes the memory as it is
            for side, arrays in {"input": inputs, **sides}.items()
            for name, array in arrays.items()
        }
        size = sum(array.nbytes for array in tensors.values())
        if not (always or self.fits(size)):
            return
        self._tensors |= tensors
        self._bytes += size

    def fits(self, size: int) -> bool:
        """Return whether ``size`` bytes more may be kept: always those of the first case."""
        return not self._tensors or (size <= CASE_BYTES and self._bytes + size <= TOTAL_BYTES)

    def steps(self, step_bytes: int, sides: int) -> int:
        """Return how many steps of ``step_bytes`` on each of ``sides`` fit into one case; at least one."""
        return max(1, CASE_BYTES // (sides * step_bytes + 1))

    def to_bytes(self) -> bytes:
        return save(self._tensors)


def parity_to_json(
    cases: Sequence[CaseResult], tolerance: float, ranges: Ranges, near_ties: Sequence[Divergence]
) -> dict[str, Any]:
    """Return the object ``parity`` of bundle.json.

    ``fp16_largest`` is the tensor nearest to the end of FP16, ``fp16_largest_sum`` the product whose partial sums come
    nearest to it, or past it.
    """
    worst = max(cases, key=lambda case: case.worst.error)
    fields: dict[str, Any] = {
        "metric": "max|ours - pytorch| at a shape / max|pytorch| over all shapes (logits: at least 1), per output",
        "tolerance": tolerance,
        "scales": largest_scales(comparison for case in cases for comparison in case.comparisons),
        "worst": {"sizes": dict(worst.shape), **worst.worst.to_json()},
        "outputs": outputs_to_json(cases),
        "cases": [case_to_json(case) for case in cases],
    }
    if near_ties:
        fields["greedy_near_ties"] = [asdict(divergence) for divergence in near_ties]
    for key, measured in (("fp16_largest", ranges.tensors), ("fp16_largest_sum", ranges.sums)):
        found = in_half(measured)
        if found:
            name, (value, module) = max(found.items(), key=lambda item: item[1][0])
            fields[key] = {"tensor": name, "module": module, "value": value}
    return fields


def case_to_json(case: CaseResult) -> dict[str, Any]:
    """Return the sizes of one case and each output's error there."""
    errors = {comparison.tensor: comparison.error for comparison in case.comparisons}
    sides = {"emulated": case.emulated, "native": case.native}
    return {"sizes": dict(case.shape), "errors": errors, **{side: True for side, is_it in sides.items() if is_it}}


def outputs_to_json(cases: Sequence[CaseResult]) -> dict[str, Any]:
    """Return the worst element of each output over all cases, and the histogram of all elements' |ours - theirs|.

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
