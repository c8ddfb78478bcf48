"""The accuracy gate: what a quantised model may lose against FP32 on held-out data, and whether it stays within.

Judged is the task score where there is one. Elsewhere it is what stands nearest to it: the perplexity of texts, the
answers that changed, the error of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, log

from transom.calib.samples import Sample
from transom.export.datasets import heldout_text
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
from transom.export.quantization.heldout import reference_samples
from transom.export.scores import SCORES, blocks
from transom.runtime.errors import ExportError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.gpt import GPT

__all__ = ["EMBEDDING_ERROR", "ENOUGH", "MOST_NATS", "PERPLEXITY", "POINTS", "Gate", "GateResult", "pooled"]

POINTS = {"bert": 0.010, "clip": 0.010, "transformer": 0.010, "vit": 0.013}  # of a score or of agreement
PERPLEXITY = {"static": 0.05, "dynamic": 0.03, "weight-only": 0.03}  # growth, by how activations are quantised
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
        self._family = fp32.manifest.family
        self._reference = Fp32Outputs(fp32, held_out, data)
        self._score = score
        self._tokens = tokens_of_blocks(fp32) if score is not None and isinstance(fp32, GPT) else ()
        self._fp32 = None if score is None else per_token(score(fp32), self._tokens)

    @classmethod
    def of_reference(cls, source: str, fp32: LoadedBundle) -> Gate:
        """The gate of a reference model: its score, and the held-out data that ships with it."""
        scored = SCORES[source]
        if fp32.manifest.task != scored.task:
            raise ExportError(f"{source} is scored as {scored.task}; this bundle is for {fp32.manifest.task}.")
        samples = reference_samples(source)
        return cls(fp32, samples, f"held-out data of {source}", scored.of)

    def evaluate(self, bundle: LoadedBundle, activations: str) -> GateResult:
        """Measure a quantised bundle; ``activations`` are "static", "dynamic" or "weight-only"."""
        if activations not in PERPLEXITY:
            raise ExportError(f"activations is {activations!r}; expected one of {', '.join(PERPLEXITY)}.")
        agreement = self._reference.compare(bundle)
        scores: tuple[Measured, Measured] | None = agreement.nats or agreement.right
        if self._score is not None and self._fp32 is not None:
            finite = isfinite(agreement.error.value)  # a score refuses what is not finite, the verdict says it
            scores = (self._fp32, per_token(self._score(bundle), self._tokens)) if finite else None
        return gate_result(self._family, activations, agreement, scores)


def gate_result(
    family: str, activations: str, agreement: Fidelity, scores: tuple[Measured, Measured] | None
) -> GateResult:
    """What is judged of these measurements, and by what. ``scores`` are FP32's and the quantised model's."""
    top1 = agreement.top1
    if family == "gpt":
        criterion, allowed = GROWTH, PERPLEXITY[activations]
    elif scores is not None:
        criterion, allowed = SCORE, POINTS[family]
    elif top1 is not None and not agreement.embeds:
        criterion, allowed = AGREEMENT, POINTS[family]
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


def tokens_of_blocks(bundle: GPT) -> tuple[int, ...]:
    """How many tokens the score predicts of each of its blocks: all but the newline before it."""
    texts = ["\n" + block for block in blocks(heldout_text())]
    return tuple(len(row.ids) - 1 for row in bundle.tokenizer().encode(texts, truncate=False).rows)
