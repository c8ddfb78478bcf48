"""Choose which of a bundle's engines runs on this GPU."""

from __future__ import annotations

from transom.runtime.backends.cuda import Gpu
from transom.runtime.backends.trt_library import FULL, INSTALL, NAMES, RTX, RTX_CAPABILITIES
from transom.runtime.errors import BackendError
from transom.runtime.manifest_graphs import GraphFile, Plan

FULL_TARGET = "tensorrt"  # built by full TensorRT for the GPU that was present


def rtx_target(capability: tuple[int, int]) -> str:
    """Return the target of TensorRT-RTX for a compute capability: ``rtx-sm89`` of (8, 9)."""
    return "rtx-sm{}{}".format(*capability)


def target_for(gpu: Gpu) -> str:
    """Return the target to build for a GPU: TensorRT-RTX where it has kernels for it."""
    return rtx_target(gpu.capability) if gpu.capability in RTX_CAPABILITIES else FULL_TARGET


def pick_plan(graph: GraphFile, gpu: Gpu) -> Plan:
    """Return the plan for ``gpu``. BackendError where none fits, with the bundle's targets and the command to build."""
    for target in (rtx_target(gpu.capability), FULL_TARGET):
        plan = graph.plans.get(target)
        if plan is not None and plan.sm in (None, gpu.sm):
            return plan
    there = [target if plan.sm is None else f"{target} ({plan.sm.upper()})" for target, plan in graph.plans.items()]
    raise BackendError(
        f"the bundle has {'engines for ' + ', '.join(there) if there else 'no engines'}; this GPU is {gpu}. "
        f"Run `transom build BUNDLE --target {target_for(gpu)}`, or load with device='cpu'."
    )


def kind_of(plan: Plan) -> str:
    """Return the library that loads a plan, RTX or FULL."""
    return RTX if plan.library == NAMES[RTX] else FULL


def require_version(plan: Plan, version: str) -> None:
    """Raise BackendError where a library of ``version`` does not load ``plan``.

    TensorRT-RTX reads what an older one wrote; TensorRT reads its own version's plans alone.
    """
    here, built, kind = numbers(version), numbers(plan.version), kind_of(plan)
    if here >= built if kind == RTX else here[:3] == built[:3]:
        return
    raise BackendError(
        f"{plan.file} was built by {plan.library[:40]} {plan.version[:40]}; {NAMES[kind]} here is {version}. Build it "
        f"again with `transom build`, or install that version (`{INSTALL[kind]}`)."
    )


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))
