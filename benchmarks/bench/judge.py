"""Compare outputs with PyTorch's in FP32, and mark what is wrong.

An output's error is ||a - b|| / ||b||; CLIP's embeddings are normalised first, because some libraries return them so.
Of generated tokens, those equal to PyTorch's at their place are counted. TOLERANCES say what is allowed; beyond them,
and where sums of products saturate, a time is marked wrong and never counts as best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.session import Arrays
from bench.workloads import Workload

# FP32: other orders of summation give 1e-6 to 1e-5. BF16: 8 bits of mantissa, 2^-9 = 0.002 a rounding.
# INT8 of all tools gives 0.02 to 0.053 on BERT-base and GPT-2, INT4 in blocks of 32, rounded to nearest, 0.26 on GPT-2.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.03, "int8": 0.1, "int4": 0.35}
TOKENS = {"fp32": 1.0, "bf16": 0.5, "int8": 0.5, "int4": 0.5}  # of the tokens that must be PyTorch's


@dataclass(frozen=True)
class Judgement:
    """The error of an output, equal tokens of how many, and why it is wrong; "" where it is right."""

    error: float | None
    tokens: tuple[int, int] | None
    wrong: str


def judged(workload: Workload, precision: str, outputs: Arrays, reference: Arrays, *, saturates: bool) -> Judgement:
    """Compare one variant's outputs with the reference of the same workload."""
    error, tokens, reasons = None, None, []
    for name in ("output", "logits"):
        if name in outputs and name in reference:
            ours, theirs = outputs[name], reference[name]
            if ours.shape != theirs.shape:
                return Judgement(None, None, f"{name} has shape {ours.shape}, PyTorch's {theirs.shape}")
            error = relative_error(ours, theirs, normalise=workload.model == "clip")
            if not error <= TOLERANCES[precision]:  # NaN too
                reasons.append(f"error {error:.2g} above {TOLERANCES[precision]:g}")
    if "tokens" in reference:
        theirs = reference["tokens"]
        ours = outputs["tokens"][: len(theirs)]
        same = int(np.sum(ours == theirs[: len(ours)]))
        tokens = same, len(theirs)
        if same < TOKENS[precision] * len(theirs):
            reasons.append(f"{same} of {len(theirs)} tokens are PyTorch's")
    if saturates:
        reasons.append("sums of products saturate")
    return Judgement(error, tokens, "; ".join(reasons))


def relative_error(ours: Any, theirs: Any, *, normalise: bool = False) -> float:
    """Return ||ours - theirs|| / ||theirs|| in float64; of rows scaled to length 1 where ``normalise``."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if normalise:
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
