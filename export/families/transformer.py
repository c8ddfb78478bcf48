"""Calibrate, evaluate and draw the encoder-decoder: the tokens along a greedy translation."""

from __future__ import annotations

from collections.abc import Sequence

from transom.calib.samples import Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import EvaluationCases, GateLimits
from transom.export.families.greedy_tokens import generate_greedily, greedy_token_cases
from transom.export.families.token_rows import ids_of, row_runner
from transom.runtime.bundle import Bundle
from transom.runtime.tasks.prompts import Row
from transom.runtime.tasks.transformer import Transformer


def translate(bundle: Transformer, ids: Row) -> None:
    """Translate greedily."""
    generate_greedily(bundle, cut_source(bundle, ids))


def cut_source(bundle: Transformer, ids: Row) -> Row:
    """Cut a source to as many tokens as the encoder takes; the last stays, which closes a source."""
    most = bundle.max_size(str(bundle.prompt_tokens().shape[1]))
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def translation_cases(fp32: Transformer, samples: Sequence[Sample], most: int) -> EvaluationCases:
    """Compare the tokens along FP32's greedy translations; sources of one length share a batch."""
    sources = sorted(((sample, cut_source(fp32, ids_of(fp32, sample))) for sample in samples), key=by_length)
    return greedy_token_cases(fp32, sources, most)


def by_length(source: tuple[Sample, Row]) -> int:
    return len(source[1])


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.transformer import draw_alignments

    return draw_alignments(bundle, inputs)


FAMILY = ExportFamily(
    "Transformer",
    row_runner("encoder", translate),
    translation_cases,
    GateLimits(points=0.010),
    Figure(draw, texts=True),
)
