"""Calibrate, evaluate and draw Swin: labels of images, or their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from transom.export.families import vit
from transom.export.families.base import Figure
from transom.export.families.evaluation import Floats
from transom.runtime.bundle import Bundle


def token_mean(hidden: Floats) -> Floats:
    """Return the features of an image, (E,), of its last hidden state (S, E)."""
    return cast(Floats, hidden.mean(0))


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.swin import draw_window_attention

    return draw_window_attention(bundle, inputs)


FAMILY = replace(
    vit.FAMILY,
    title="Swin Transformer",
    cases=partial(vit.image_cases, pooled=token_mean),
    figure=Figure(draw, images=True),
)
