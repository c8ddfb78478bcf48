"""Choose the device that ``auto`` means: the fastest one on which every graph of a bundle opens.

What a library was compiled for says nothing about the machine, and a plan's file nothing about the library that is
installed: whether a device can be used is found out by opening the graphs there. ``load`` and ``transom doctor`` share
this choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from transom.runtime.backends import FASTEST_FIRST
from transom.runtime.errors import BackendError, BundleError

if TYPE_CHECKING:
    from transom.runtime.manifest_graphs import GraphFile

REASONS = {
    "tensorrt": "the bundle's engine for this GPU is loaded",
    "cuda": "ONNX Runtime uses the GPU",
    "cpu": "no GPU can be used",
}
ASKED = "it was asked for"
NO_ENGINES = "the bundle has no engines; `transom build` makes them"
NO_BUNDLE = "takes a bundle with an engine: `transom doctor BUNDLE` tries one"

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Choice:
    """The device of a loaded bundle and why; ``passed_over`` has the faster ones and what is wrong with each."""

    device: str
    reason: str
    passed_over: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"device": self.device, "reason": self.reason, "passed_over": dict(self.passed_over)}


def choose(open_on: Callable[[str], Opened], absent: Mapping[str, str]) -> tuple[Opened, Choice]:
    """Open on the fastest device that works, in the order of FASTEST_FIRST; return what was opened, and the choice.

    ``absent`` has the devices that need not be tried, and why. Raises what ``open_on`` raises for the CPU, the last.
    """
    passed_over: dict[str, str] = {}
    for device in FASTEST_FIRST[:-1]:
        if device in absent:
            passed_over[device] = absent[device]
            continue
        try:
            return open_on(device), Choice(device, REASONS[device], passed_over)
        except (BackendError, BundleError) as error:  # no GPU, no library, a plan that it cannot read
            passed_over[device] = str(error)
    device = FASTEST_FIRST[-1]
    return open_on(device), Choice(device, REASONS[device], passed_over)


def without_engines(graphs: Sequence[GraphFile]) -> dict[str, str]:
    """Return the devices that need not be tried for ``graphs``, and why: an engine is needed of each graph."""
    return {} if all(graph.plans for graph in graphs) else {"tensorrt": NO_ENGINES}
