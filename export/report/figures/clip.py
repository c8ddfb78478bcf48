"""Draw CLIP's zero-shot matrix: every image against every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from transom.export.reference_models import examples_for
from transom.export.report.images import data_uri, is_small, thumbnail
from transom.export.report.rendering import render
from transom.runtime.bundle import Bundle
from transom.runtime.image_loading import open_image
from transom.runtime.tasks.clip import BLANK, Clip

THUMBNAIL = 160  # pixels of an image's longer side
TINT = 0.6  # opacity of a probability of 1: the numbers on it must be readable
FAINT = 0.05  # probabilities below are written in grey
PROMPTS = ("a photo of a building", "a photo of a flower", "a photo of a person", "a photo of a dog")


def draw_zero_shot_matrix(bundle: Bundle, images: Sequence[str], prompts: Sequence[str]) -> Markup:
    """Draw the matrix of ``images`` and ``prompts``; examples for what is not given."""
    names, template = list(dict.fromkeys(prompts)), None
    examples = examples_for(bundle.manifest.source.get("checkpoint"))
    if not names and examples.labels:
        names, template = list(examples.labels), examples.template
    names = names or list(PROMPTS)
    pictures = [open_image(source) for source in images or examples.images]
    with Clip(bundle) as model:
        answers = model.zero_shot(pictures, names, templates=template)
        scale = model.logit_scale
    rows = [matrix_row(picture, names, answer) for picture, answer in zip(pictures, answers, strict=True)]
    return render("figures/clip", names=names, rows=rows, template=template, blank=BLANK, scale=scale)


def matrix_row(picture: Image.Image, names: Sequence[str], answer: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return one image and its probabilities; ``answer`` is (name, probability), best first."""
    small, probabilities, best = thumbnail(picture, THUMBNAIL), dict(answer), answer[0][0]
    cells = []
    for name in names:
        probability = probabilities[name]
        kind = "shade top" if name == best else "shade" if probability >= FAINT else "shade soft"
        cells.append({"kind": kind, "tint": TINT * probability, "probability": probability})
    return {"uri": data_uri(small), "small": is_small(small), "answer": best, "cells": cells}
