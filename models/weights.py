"""Fill a module from safetensors; everything that does not fit is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transom.models.family import Family
from transom.models.mapped_weights import MappedWeights
from transom.runtime.errors import CheckpointError, one_line

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LISTED = 12  # names per kind of problem in a message; more are counted


def build_module(
    family: Family, config: Any, task: str, files: Sequence[Path | MappedWeights], *, ignore_unused: bool = False
) -> tuple[nn.Module, list[str]]:
    """Build the family's module for ``task`` from ``files``, in FP32 and eval mode; return it and the names left out.

    Weights in FP32 share the memory of the mapped files. Shapes are compared before memory is taken. Stored weights of
    other heads are left out; any other unused weight is an error unless ``ignore_unused``: a file with more than the
    definition uses usually means that the definition would compute something else.

    Raises CheckpointError listing every missing, unused, misshapen and non-finite weight.
    """
    try:
        with torch.device("meta"):
            module = family.build(config, task)
    except RuntimeError as error:  # of one weight: no module of "meta" takes memory
        raise CheckpointError(
            f"config.json asks for a weight that no memory holds ({one_line(error)}). Correct its sizes."
        ) from None
    expected = {name: parameter.shape for name, parameter in module.named_parameters()}
    tensors, sources, unused, left_out, problems = {}, {}, [], [], []  # type: ignore[var-annotated]
    repeated: list[tuple[str, str, Tensor]] = []  # stored name, the weight that it repeats, its tensor
    mapped = [file if isinstance(file, MappedWeights) else MappedWeights(file) for file in files]
    for file in mapped:
        for stored in file:
            name = family.rename(stored, config, task)
            if name is None:
                left_out.append(stored)
                original = family.tied_to(stored, config, task)
                if original is not None:
                    repeated.append((stored, original, file.tensor(stored)))
            elif name not in expected:
                unused.append(stored)
            elif name in tensors:
                problems.append(f"{stored} and {sources[name]} are the same weight twice")
            else:
                tensors[name] = converted(family, config, name, stored, file.tensor(stored), problems)
                sources[name] = stored
    tensors = {name: tensor for name, tensor in family.computed(config).items() if name not in tensors} | tensors
    prefixed = any(stored.startswith(family.prefix) for stored in sources.values())
    missing = [
        f"{family.prefix}{name}" if prefixed and not name.startswith(family.unprefixed_heads) else name
        for name in expected
        if name not in tensors
    ]
    problems += [
        f"{sources.get(name, name)} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    problems += [
        f"{stored} differs from {sources.get(original, original)}, though by config.json they are one weight"
        for stored, original, tensor in repeated
        if original in tensors and not torch.equal(tensor.float(), tensors[original])
    ]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unused and (missing or not ignore_unused):
        problems.append(f"unused: {listed(sorted(unused))}")
    if problems:
        folder = mapped[0].path.parent
        raise CheckpointError(
            f"{folder}: the weights do not fit the family {family.name} for {task}: {'; '.join(problems)}. "
            + advice(missing, unused)
        )
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False), left_out + unused


def converted(family: Family, config: Any, name: str, stored: str, tensor: Tensor, problems: list[str]) -> Tensor:
    """Convert a stored tensor to FP32 in the module's shape; add to ``problems`` what is wrong with it."""
    if tensor.dtype not in FLOATS:
        problems.append(f"{stored} is stored as {tensor.dtype}; expected float32, float16 or bfloat16")
    elif not torch.isfinite(tensor).all():
        problems.append(f"{stored} holds NaN or infinity")
    return family.convert(name, tensor.float(), config).contiguous()


def listed(names: Sequence[str]) -> str:
    """Join the first LISTED names and count the rest."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def advice(missing: Sequence[str], unused: Sequence[str]) -> str:
    """Return what to do about weights that do not fit."""
    if missing:
        return "If the checkpoint has no such head, choose another --task; else download it again."
    if unused:
        return "If they are not needed (an adapter, say), export with --ignore-unused."
    return "Download the checkpoint again, or correct config.json."
