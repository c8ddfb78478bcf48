"""Calibrate, evaluate and draw ViT: labels of images, or their features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from transom.calib.run_samples import PIXELS, SampleRunner
from transom.calib.samples import IMAGE, Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import (
    NEIGHBOUR,
    NO_CHOICE,
    EvaluationCases,
    Floats,
    GateLimits,
    Outputs,
    choice_of_head,
    top1_of_head,
)
from transom.export.families.images import image_rows
from transom.runtime.bundle import Bundle
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.vit import ViT


def run_image(bundle: ViT, sample: Sample) -> None:
    """Run an image as the bundle's own methods do."""
    bundle.image_rows([cast(Any, sample.image)], bundle.backend("model").graph.outputs[0].name)


def class_token(hidden: Floats) -> Floats:
    """Return the features of an image, (E,), of its last hidden state (S, E)."""
    return cast(Floats, hidden[0])


def image_cases(
    fp32: ViT, samples: Sequence[Sample], tokens: int, pooled: Callable[[Floats], Floats] = class_token
) -> EvaluationCases:
    """Compare the label of each image; of features, whole in the error, the nearest other image by what is ``pooled``.

    A relative's features may be pooled otherwise than by the class token.
    """
    options = fp32.manifest.options
    features = fp32.manifest.task != "image-classification"
    output = "last_hidden_state" if features else "logits"

    def run(bundle: LoadedBundle) -> Iterator[Outputs]:
        for sample, values in image_rows(cast(ViT, bundle), samples, output):
            if features:
                yield Outputs(sample.name, values, NO_CHOICE, pooled(values))
            else:
                yield Outputs(sample.name, values, choice_of_head(values, options))

    if features:
        return EvaluationCases(run, NEIGHBOUR, "nearest other images", output)
    return EvaluationCases(run, top1_of_head(options), "images", output)


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.vit import draw_attention_rollout

    return draw_attention_rollout(bundle, inputs)


FAMILY = ExportFamily(
    "Vision Transformer",
    SampleRunner({"model": (IMAGE, PIXELS)}, run_image),
    image_cases,
    GateLimits(points=0.013),
    Figure(draw, images=True, bare=lambda bundle: draw(bundle, (), ())),  # there are still positions
)
