"""What a gate found: the figures of one quantised model beside FP32, what is judged of them, and repetitions pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, expm1, inf, isfinite, sqrt
from typing import Any, cast

from transom.export.measures import Rate, Score
from transom.export.quantization.agreement import RelativeError
from transom.runtime.errors import ExportError

SCORE, GROWTH, AGREEMENT, ERROR = "score", "perplexity", "agreement", "relative error"
ENOUGH = 1000  # cases: of fewer, a point is less than ten of them
MOST_NATS = 700.0  # exp of more is no float

Measured = Score | Rate


@dataclass(frozen=True)
class Verdict:
    """Whether a quantised model stays within its gate, and every figure measured on the way.

    criterion     what is judged: SCORE lost, GROWTH of perplexity, AGREEMENT lost, or ERROR
    allowed       the most of it: 0.01 is a point of a score, or one percent
    score_fp32    the task score, or of GROWTH nats per token as a Rate; None where there is none
    score_int8    the same of the quantised model
    agreement     on how many held-out cases both choose the same; None of a regression
    error         of the outputs
    output        what ``error`` is taken over
    repetitions   how many measurements are pooled here
    """

    criterion: str
    allowed: float
    score_fp32: Measured | None
    score_int8: Measured | None
    agreement: Score | None
    error: RelativeError
    output: str
    repetitions: int = 1

    @property
    def measure(self) -> str:
        """What is judged, by its name: "zero-shot accuracy", "perplexity", ..."""
        if self.criterion == SCORE and self.score_fp32 is not None:
            return self.score_fp32.name
        return {AGREEMENT: "same top-1 as FP32", ERROR: f"relative error of {self.output}"}.get(
            self.criterion, self.criterion
        )

    @property
    def found(self) -> float:
        """What is to be at most ``allowed``; infinite where the quantised model's outputs are not finite."""
        if not isfinite(self.relative_error):
            return inf
        fp32, int8, top1 = self.score_fp32, self.score_int8, self.agreement
        if isinstance(fp32, Score) and isinstance(int8, Score):
            return (fp32.correct - int8.correct) / fp32.n
        if isinstance(fp32, Rate) and isinstance(int8, Rate):
            return growth(int8.value - fp32.value)
        if self.criterion == AGREEMENT and top1 is not None:
            return (top1.n - top1.correct) / top1.n
        return self.relative_error

    @property
    def n(self) -> int:
        """Cases that ``found`` is taken over: of perplexity tokens, of the error samples."""
        if isinstance(self.score_fp32, Score):
            return self.score_fp32.n
        if isinstance(self.score_fp32, Rate):
            return sum(self.score_fp32.units)
        if self.criterion == AGREEMENT and self.agreement is not None:
            return self.agreement.n
        return self.error.n

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of ``found``; None where one block of text or one sample is all there is.

        Of a score lost it is Newcombe's for two independent fractions (1998, method 10). Both sides answer the same
        cases, so the truth is narrower. Repetitions over the same held-out cases count as cases of their own: there
        it may be too narrow.
        """
        if not isfinite(self.found):
            return None
        fp32, int8, top1 = self.score_fp32, self.score_int8, self.agreement
        if isinstance(fp32, Score) and isinstance(int8, Score):
            return drop_interval(fp32, int8)
        if isinstance(fp32, Rate) and isinstance(int8, Rate):
            return growth_interval(fp32, int8)
        if self.criterion == AGREEMENT and top1 is not None:
            low, high = top1.interval
            return 1 - high, 1 - low
        return self.error.interval

    @property
    def enough(self) -> bool:
        """Whether ``n`` is so large that chance moves a score little; below, repeat and pool."""
        return self.n >= ENOUGH

    @property
    def holds(self) -> bool:
        return self.found <= self.allowed

    @property
    def relative_error(self) -> float:
        return self.error.value

    def to_json(self) -> dict[str, Any]:
        """For bundle.json: every figure with its n and interval."""
        interval = self.interval
        return {
            "measure": self.measure,
            "allowed": self.allowed,
            "found": self.found,
            "n": self.n,
            "interval": interval and list(interval),
            "holds": self.holds,
            "repetitions": self.repetitions,
            "score": None
            if self.score_fp32 is None or self.score_int8 is None
            else {**self.score_fp32.shared(), "fp32": figures(self.score_fp32), "int8": figures(self.score_int8)},
            "agreement": self.agreement and {**self.agreement.shared(), **self.agreement.figures()},
            "relative_error": {"output": self.output, **self.error.to_json()},
        }

    def words(self) -> str:
        """One line: what was judged and how it came out, then what else was measured."""
        n = f"n = {self.n}"
        parts = [{SCORE: self._score_words, GROWTH: self._growth_words}.get(self.criterion, self._other_words)(n)]
        top1 = self.agreement
        if top1 is not None:
            low, high = top1.interval
            what = top1.name.partition(", ")[2]
            parts.append(
                f"agrees with FP32 in {top1.correct} of {top1.n} {what} (95 %: {100 * low:.1f} to {100 * high:.1f} %)"
            )
        if self.criterion != ERROR:
            parts.append(f"relative error of {self.output} {self.relative_error:.2g}")
        if self.repetitions > 1:
            parts.append(f"{self.repetitions} calibrations pooled")
        return "; ".join(parts)

    def _score_words(self, n: str) -> str:
        before, after = (figure(score) for score in (self.score_fp32, self.score_int8))
        lost = f"{0.0 - 100 * self.found:+.2f} points of {100 * self.allowed:.1f} allowed"
        return f"{self.measure} {before} -> {after}, {lost}, {n}"

    def _growth_words(self, n: str) -> str:
        before, after = (figure(score) for score in (self.score_fp32, self.score_int8))
        more = f"{100 * self.found:+.2f} % of {100 * self.allowed:.1f} % allowed"
        return f"perplexity {before} -> {after}, {more}, {n} tokens"

    def _other_words(self, n: str) -> str:
        if self.criterion == AGREEMENT:
            return f"{100 * self.found:.2f} points of answers changed of {100 * self.allowed:.1f} allowed, {n}"
        return f"{self.measure} {self.found:.2g} of {self.allowed:.2g} allowed, {n}"


def pooled(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over repeated measurements of one model: cases, right ones, blocks and errors added up.

    For held-out data of fewer than ENOUGH cases, where chance moves a score by more than the gate allows:
    repetitions with other calibration data say what the quantisation does, not what one calibration did.
    Raises ExportError for none, and for verdicts of different gates.
    """
    if not verdicts:
        raise ExportError("there are no verdicts to pool; expected at least one.")
    first = verdicts[0]
    if any(
        (other.criterion, other.allowed, other.output) != (first.criterion, first.allowed, first.output)
        for other in verdicts
    ):
        raise ExportError("the verdicts are of different gates; pool those of one model and one precision.")
    return replace(
        first,
        score_fp32=summed([each.score_fp32 for each in verdicts]),
        score_int8=summed([each.score_int8 for each in verdicts]),
        agreement=cast("Score | None", summed([each.agreement for each in verdicts])),
        error=RelativeError(
            tuple(square for each in verdicts for square in each.error.differences),
            tuple(square for each in verdicts for square in each.error.references),
        ),
        repetitions=sum(each.repetitions for each in verdicts),
    )


def summed(measured: Sequence[Measured | None]) -> Measured | None:
    """One measure over all cases or blocks; None where one is missing."""
    scores = [each for each in measured if isinstance(each, Score)]
    rates = [each for each in measured if isinstance(each, Rate)]
    if len(scores) == len(measured):
        return replace(scores[0], n=sum(each.n for each in scores), correct=sum(each.correct for each in scores))
    if len(rates) == len(measured):
        amounts = tuple(amount for each in rates for amount in each.amounts)
        return replace(rates[0], amounts=amounts, units=tuple(unit for each in rates for unit in each.units))
    return None


def drop_interval(fp32: Score, int8: Score) -> tuple[float, float]:
    """95 % interval of a difference of fractions from their Wilson intervals. Newcombe (1998), method 10."""
    (low, high), (other_low, other_high) = fp32.interval, int8.interval
    drop = fp32.value - int8.value
    below = sqrt((fp32.value - low) ** 2 + (other_high - int8.value) ** 2)
    above = sqrt((high - fp32.value) ** 2 + (int8.value - other_low) ** 2)
    return drop - below, drop + above


def growth(nats: float) -> float:
    """By what part the perplexity grows that gets ``nats`` per token more."""
    return expm1(nats) if nats < MOST_NATS else inf  # NaN is no growth that any gate allows


def growth_interval(fp32: Rate, int8: Rate) -> tuple[float, float] | None:
    """95 % interval of the growth on other texts of this kind, the blocks paired; None for one block."""
    if fp32.n < 2:
        return None
    more = tuple(after - before for after, before in zip(int8.amounts, fp32.amounts, strict=True))
    low, high = replace(fp32, amounts=more).interval
    return growth(low), growth(high)


def figures(measured: Measured) -> dict[str, Any]:
    """A score's figures; of nats per token the perplexity too."""
    if isinstance(measured, Rate) and measured.n < 2:  # of one block no interval is known
        found: dict[str, Any] = {"value": measured.value, "interval": None}
    else:
        found = measured.figures()
    return {**found, "perplexity": exp(min(measured.value, MOST_NATS))} if isinstance(measured, Rate) else found


def figure(measured: Measured | None) -> str:
    if measured is None:
        return "not finite"
    if isinstance(measured, Rate):
        return f"{exp(min(measured.value, MOST_NATS)):.2f}"
    return f"{measured.value:.4f}"
