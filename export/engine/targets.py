"""Targets that an engine can be built for, and the precisions that each supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transom.runtime.backends.trt_library import FULL, RTX, RTX_CAPABILITIES
from transom.runtime.backends.trt_plans import FULL_TARGET, rtx_target
from transom.runtime.errors import ExportError


@dataclass(frozen=True)
class Target:
    """A target: the library that builds it and its GPU's compute capability, None for that of the GPU present."""

    name: str
    library: str
    capability: tuple[int, int] | None = None

    @property
    def is_turing(self) -> bool:
        return self.capability == (7, 5)


TARGETS = {
    target.name: target
    for target in (
        *(Target(rtx_target(capability), RTX, capability) for capability in RTX_CAPABILITIES),
        Target(FULL_TARGET, FULL),
    )
}
TURING = {  # precisions that it has no kernels for, and why
    "bf16": "Turing has no BF16 arithmetic; export with --precision fp16",
    "fp32": "TensorRT-RTX has no FP32 matrix product for Turing; export with --precision fp16 or int8",
}


def find_targets(names: Sequence[str]) -> tuple[Target, ...]:
    """Return the targets of these names, each once, in order. Raises ExportError for none, and for an unknown one."""
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        got = f"is {unknown[0]!r:.60}" if unknown else "is missing"
        raise ExportError(f"--target {got}; expected one or several of {', '.join(TARGETS)}.")
    return tuple(TARGETS[name] for name in dict.fromkeys(names))


def require_precision(target: Target, precision: str, unquantized: str) -> None:
    """Raise ExportError where ``target`` cannot compute a bundle of ``precision``.

    ``unquantized`` is the precision of the layers that an int8 graph does not quantise.
    """
    if precision == "int4":
        raise ExportError(
            "a bundle in int4 holds MatMulNBits, an operator of ONNX Runtime alone, and no engine is built of it; "
            "export with --precision int8."
        )
    if target.is_turing and unquantized in TURING:
        raise ExportError(f"{target.name} cannot run {precision} beside {unquantized}: {TURING[unquantized]}.")
