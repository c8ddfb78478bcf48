"""Calibrate, evaluate and draw seq2seq: as the Transformer, whose tasks it has, but for its figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transom.export.families import transformer
from transom.export.families.base import Figure
from transom.runtime.bundle import Bundle


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.seq2seq import draw_alignments

    return draw_alignments(bundle, inputs)


FAMILY = replace(transformer.FAMILY, title="seq2seq", figure=Figure(draw, texts=True))
