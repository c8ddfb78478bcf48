"""Calibrate, evaluate and draw Perceiver: images as ViT's, texts as BERT's; the figure is what each latent reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transom.calib.run_samples import IDS, SampleRunner
from transom.calib.samples import TEXT
from transom.export.families import bert, vit
from transom.export.families.base import ExportFamily, Figure
from transom.runtime.bundle import Bundle

TITLE = "Perceiver"


def draw_images(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.perceiver import draw_latents_over_images

    return draw_latents_over_images(bundle, inputs)


def draw_texts(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.perceiver import draw_latents_over_bytes

    return draw_latents_over_bytes(bundle, inputs)


TEXTS = ExportFamily(
    TITLE,
    SampleRunner({"model": (TEXT, IDS)}, bert.run_text),
    bert.text_cases,
    bert.FAMILY.gate,
    Figure(draw_texts, texts=True),
)
FAMILY = replace(
    vit.FAMILY,
    title=TITLE,
    figure=Figure(draw_images, images=True),
    by_task={"fill-mask": TEXTS, "text-classification": TEXTS},
)
