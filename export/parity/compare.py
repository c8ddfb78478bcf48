"""Parity: what ships, held against PyTorch in FP32, over a grid of shapes. Beyond tolerance is an error."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from transom.export.variants import with_state
from transom.runtime.backends.base import Array
from transom.runtime.compare import Comparison
from transom.runtime.errors import ParityError
from transom.runtime.graph_spec import Axis, Graph

# max|ours - theirs| / max|theirs| per output tensor. The unit roundoff u is 2^-24 for FP32, 2^-11 for FP16
# and 2^-8 for BF16; errors of n roundings grow between sqrt(n) and n.
TOLERANCES = {
    "fp32": 2e-5,  # 335 u: other summation orders over up to some thousand terms; 2e-6 is usual
    "fp16": 1e-2,  # 20 u: every tensor rounded, a dozen layers deep; 2e-3 is usual
    "bf16": 8e-2,  # 20 u, as above; 1.5e-2 is usual
    # Integers are no rounding of every tensor alike: inputs unlike the calibration data are clipped, single elements
    # may be far off. How accurate a model is the gate measures. This catches one that computes something else: outputs
    # that are all zero have an error of 1.
    "int8": 0.5,
    "int4": 0.8,
}


@dataclass(frozen=True)
class Case:
    """One shape of the grid and the worst element of each output there.

    ``emulated``: not of what ships, but of FP16 as a GPU would round it.
    """

    shape: Mapping[str, int]
    comparisons: tuple[Comparison, ...]
    emulated: bool = False

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda comparison: comparison.error)


def grid(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """Every corner of the axes' bounds, the size to tune for, and awkward sizes in between.

    Corners first: 1x1 and the maximum are where shapes go wrong.
    """
    corners = itertools.product(*(sorted({axis.min, axis.max}) for axis in axes.values()))
    inside = [
        [clamped(axis, size) for axis, size in zip(axes.values(), sizes, strict=True)]
        for sizes in (
            [axis.opt for axis in axes.values()],
            list(itertools.islice(itertools.cycle((2, 7)), len(axes))),
            list(itertools.islice(itertools.cycle((3, 67)), len(axes))),
        )
    ]
    unique = dict.fromkeys(tuple(sizes) for sizes in (*corners, *inside))
    return [dict(zip(axes, sizes, strict=True)) for sizes in unique]


def clamped(axis: Axis, size: int) -> int:
    return max(axis.min, min(size, axis.max))


class PyTorchBackend:
    """The definition itself as a backend: the runtime's own code around it, PyTorch FP32 inside."""

    device = "pytorch"

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        self._module, self.graph = module, with_state(graph, "float32")

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """As a backend does; the definition itself writes its caches in place."""
        with torch.inference_mode():
            outputs = self._module(*(torch.from_numpy(feeds[tensor.name]) for tensor in self.graph.inputs))
        named = {tensor.name: value.numpy() for tensor, value in zip(self.graph.outputs, outputs, strict=True)}
        return {name: named[name] for name in shapes}


def require_parity(cases: Iterable[Case], tolerance: float, what: str, advice: str) -> None:
    """Raise ParityError naming the worst element if the error of any case is ``tolerance`` or more.

    So it does where there is no case at all: nothing is proven then. ``advice`` says what to do about it.
    """
    cases = list(cases)
    if not cases:
        raise ParityError(f"{what} was compared with PyTorch in no case at all. Report this, with its config.json.")
    worst = max(cases, key=lambda case: case.worst.error)
    if not worst.worst.error < tolerance:
        shape = " ".join(f"{name}={size}" for name, size in worst.shape.items())
        simulated = ", simulated as another device computes it," if worst.emulated else ""
        raise ParityError(
            f"{what}{simulated} differs from PyTorch at {shape}: {worst.worst}; the error must be below "
            f"{tolerance:g}. {advice}"
        )
