"""The accuracy gate: what a quantised model may lose against FP32 on held-out data, and whether it stays within.

Judged is the task score where there is one. Elsewhere it is what stands nearest to it: the perplexity of texts, the
answers that changed, the error of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, log
from typing import cast

from transom.calib.samples import Sample
from transom.export.datasets import heldout_text
from transom.export.families.base import export_family
from transom.export.families.evaluation import GateLimits
from transom.export.metrics import Accuracy, Rate
from transom.export.quantization.fidelity import Fidelity, Fp32Outputs
from transom.export.quantization.gate_result import (
    AGREEMENT,
    ENOUGH,
    ERROR,
    GROWTH,
    MOST_NATS,
    SCORE,
    GateResult,
    Measured,
    pooled,
)
from transom.export.reference_models import ReferenceModel
from transom.export.scores import blocks
from transom.runtime.errors import ExportError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator

__all__ = ["EMBEDDING_ERROR", "ENOUGH", "MODES", "MOST_NATS", "Gate", "GateResult", "pooled"]

MODES = ("static", "dynamic", "weight-only")  # how activations are quantised
EMBEDDING_ERROR = 0.10  # of an embedding's length


class Gate:
    """Judges quantised bundles against an FP32 one, whose own answers and score are taken once.

    ``held_out`` are samples that calibration did not see, ``data`` their name. ``score`` measures a bundle's task
    score, where there is one. Raises CalibrationError as ``Fp32Outputs`` does.
    """

    def __init__(
        self,
        fp32: LoadedBundle,
        held_out: Sequence[Sample],
        data: str,
        score: Callable[[LoadedBundle], Measured] | None = None,
    ) -> None:
        self._limits = export_family(fp32.manifest.family).gate
        self._reference = Fp32Outputs(fp32, held_out, data)
        self._score = score
        self._tokens: tuple[int, ...] = ()
        self._fp32: Measured | None = None
        if score is not None:
            measured = score(fp32)
            self._tokens = tokens_of_blocks(fp32) if isinstance(measured, Rate) else ()
            self._fp32 = per_token(measured, self._tokens)

    @classmethod
    def of_reference(cls, model: ReferenceModel, fp32: LoadedBundle) -> Gate:
        """Return the gate of a reference model: its score, and the held-out data that ships with it."""
        if fp32.manifest.task != model.task:
            raise ExportError(f"{model.name} is scored as {model.task}; this bundle is for {fp32.manifest.task}.")
        return cls(fp32, model.held_out(), f"held-out data of {model.name}", model.score)

    def evaluate(self, bundle: LoadedBundle, activations: str) -> GateResult:
        """Measure a quantised bundle; ``activations`` are "static", "dynamic" or "weight-only"."""
        if activations not in MODES:
            raise ExportError(f"activations is {activations!r}; expected one of {', '.join(MODES)}.")
        agreement = self._reference.compare(bundle)
        scores: tuple[Measured, Measured] | None = agreement.nats or agreement.right
        if self._score is not None and self._fp32 is not None:
            finite = isfinite(agreement.error.value)  # a score refuses what is not finite, the verdict says it
            scores = (self._fp32, per_token(self._score(bundle), self._tokens)) if finite else None
        return gate_result(self._limits, activations, agreement, scores)


def gate_result(
    limits: GateLimits, activations: str, agreement: Fidelity, scores: tuple[Measured, Measured] | None
) -> GateResult:
    """Choose what is judged of these measurements. ``scores`` are FP32's and the quantised model's."""
    top1 = agreement.top1
    if limits.growth is not None:
        criterion, allowed = GROWTH, limits.growth[activations]
    elif limits.points is not None and scores is not None:
        criterion, allowed = SCORE, limits.points
    elif limits.points is not None and top1 is not None and not agreement.embeds:
        criterion, allowed = AGREEMENT, limits.points
    else:
        criterion, allowed = ERROR, EMBEDDING_ERROR
    before, after = scores or (None, None)
    return GateResult(criterion, allowed, before, after, top1, agreement.error, agreement.output)


def per_token(measured: Measured, tokens: Sequence[int]) -> Measured:
    """Bits per byte as nats per token, which a perplexity is the exponential of; an Accuracy as it is.

    The amounts are bits per block, and ``tokens`` how many tokens each block has.
    """
    if isinstance(measured, Accuracy):
        return measured
    nats = tuple(bits * log(2) for bits in measured.amounts)
    return Rate("nats per token", measured.data, nats, tuple(tokens))


def tokens_of_blocks(bundle: LoadedBundle) -> tuple[int, ...]:
    """Count the tokens that the score predicts of each of its blocks: all but the newline before it."""
    texts = ["\n" + block for block in blocks(heldout_text())]
    return tuple(len(row.ids) - 1 for row in cast(Generator, bundle).tokenizer().encode(texts, truncate=False).rows)
