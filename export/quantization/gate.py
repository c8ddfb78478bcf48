"""The accuracy gate: what a quantised model may lose against FP32 on held-out data, and whether it stays within.

The task score decides where there is one; else the nearest measure to it: the perplexity of texts, the share of
changed top-1 answers, the error of an embedding.
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
from transom.export.quantization.data_split import held_out_part
from transom.export.quantization.fidelity import Fidelity, Fp32Outputs
from transom.export.quantization.gate_result import AGREEMENT, ERROR, GROWTH, SCORE, GateResult, Measured
from transom.export.reference_models import ReferenceModel, scored_model
from transom.export.scores import blocks
from transom.runtime.errors import ExportError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator

MODES = ("static", "dynamic", "weight-only")  # how activations are quantised
EMBEDDING_ERROR = 0.10  # of an embedding's length


class Gate:
    """Compares quantised bundles with an FP32 one, whose outputs and score are computed once.

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
        self._limits = export_family(fp32.manifest.family, fp32.manifest.task).gate
        self._fp32_outputs = Fp32Outputs(fp32, held_out, data)
        self._score = score
        self._tokens: tuple[int, ...] = ()
        self._fp32_score: Measured | None = None
        if score is not None:
            measured = score(fp32)
            self._tokens = tokens_of_blocks(fp32) if isinstance(measured, Rate) else ()
            self._fp32_score = per_token(measured, self._tokens)

    @classmethod
    def of_reference(cls, model: ReferenceModel, fp32: LoadedBundle) -> Gate:
        """Return the gate of a reference model: its score, and the held-out data that ships with it."""
        if fp32.manifest.task != model.task:
            raise ExportError(f"{model.name} is scored as {model.task}; this bundle is for {fp32.manifest.task}.")
        return cls(fp32, model.held_out(), f"held-out data of {model.name}", model.score)

    @classmethod
    def of_bundle(cls, source: str, fp32: LoadedBundle, data: Sequence[str]) -> Gate | None:
        """Return the gate that a quantised bundle was measured by, ``fp32`` standing for its FP32 side.

        ``source`` is the checkpoint that bundle.json records, ``data`` the calibration data. None where the gate takes
        the user's data and none are given.
        """
        model = scored_model(source, fp32.manifest.task)
        if model is not None:
            return cls.of_reference(model, fp32)
        if not data:
            return None
        held_out = held_out_part(fp32.manifest, data)
        return cls(fp32, held_out.samples, held_out.name)

    @property
    def wanted(self) -> int:
        """The number of measurements as large as this gate's that make enough cases: ``GateResult.wanted``."""
        fidelity = self._fp32_outputs.compare_itself()
        score = self._fp32_score
        scores = (score, score) if score is not None else fidelity.nats or fidelity.right
        return gate_result(self._limits, MODES[0], fidelity, scores).wanted

    def evaluate(self, bundle: LoadedBundle, activations: str) -> GateResult:
        """Measure a quantised bundle; ``activations`` are "static", "dynamic" or "weight-only"."""
        if activations not in MODES:
            raise ExportError(f"activations is {activations!r}; expected one of {', '.join(MODES)}.")
        fidelity = self._fp32_outputs.compare(bundle)
        scores: tuple[Measured, Measured] | None = fidelity.nats or fidelity.right
        if self._score is not None and self._fp32_score is not None:
            finite = isfinite(fidelity.error.value)  # a score refuses what is not finite, the result reports it
            scores = (self._fp32_score, per_token(self._score(bundle), self._tokens)) if finite else None
        return gate_result(self._limits, activations, fidelity, scores)


def gate_result(
    limits: GateLimits, activations: str, fidelity: Fidelity, scores: tuple[Measured, Measured] | None
) -> GateResult:
    """Choose the criterion and its limit. ``scores`` are FP32's and the quantised model's."""
    top1 = fidelity.top1
    if limits.growth is not None:
        criterion, allowed = GROWTH, limits.growth[activations]
    elif limits.points is not None and scores is not None:
        criterion, allowed = SCORE, limits.points
    elif limits.points is not None and top1 is not None and not fidelity.embeds:
        criterion, allowed = AGREEMENT, limits.points
    else:
        criterion, allowed = ERROR, EMBEDDING_ERROR
    before, after = scores or (None, None)
    return GateResult(criterion, allowed, before, after, top1, fidelity.error, fidelity.output)


def per_token(measured: Measured, tokens: Sequence[int]) -> Measured:
    """Convert bits per byte to nats per token, which a perplexity is the exponential of; return an Accuracy as it is.

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
