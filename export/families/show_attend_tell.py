"""Calibrate, evaluate and draw Show, Attend and Tell: the words along a greedy caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transom.calib.run_samples import PIXELS, SampleRunner
from transom.calib.samples import IMAGE, Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import EvaluationCases, GateLimits, naming
from transom.export.families.greedy_tokens import generate_greedily, greedy_token_cases
from transom.export.families.images import pixels_of
from transom.runtime.backends.base import Array
from transom.runtime.bundle import Bundle
from transom.runtime.tasks.image_prompts import Pixels
from transom.runtime.tasks.show_attend_tell import ShowAttendTell


def run(bundle: ShowAttendTell, sample: Sample) -> None:
    """Caption a sample's image greedily."""
    generate_greedily(bundle, prompt_of(bundle, sample))


def run_raw(bundle: ShowAttendTell, feeds: Mapping[str, Array]) -> None:
    """Caption raw pixel values greedily; raw inputs of the decoder run as they are."""
    if feeds.keys() == {PIXELS}:
        generate_greedily(bundle, np.asarray(feeds[PIXELS][0], np.float32))
    else:
        bundle.run(feeds)


def prompt_of(bundle: ShowAttendTell, sample: Sample) -> Pixels:
    """Return a sample's pixels, float32 (C, H, W): of its image, or its raw ``pixel_values``."""
    if sample.image is None:
        pixels: Pixels = pixels_of(sample)[0]
        return pixels
    with naming([sample]):
        pixels = bundle.preprocess()([sample.image])[0]
    return pixels


def caption_cases(fp32: ShowAttendTell, samples: Sequence[Sample], most: int) -> EvaluationCases:
    """Compare the tokens along FP32's greedy captions."""
    return greedy_token_cases(fp32, [(sample, prompt_of(fp32, sample)) for sample in samples], most)


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.show_attend_tell import draw_captions

    return draw_captions(bundle, inputs)


FAMILY = ExportFamily(
    "Show, Attend and Tell",
    SampleRunner({"encoder": (IMAGE, PIXELS)}, run, run_raw),
    caption_cases,
    GateLimits(points=0.010),
    Figure(draw, images=True),
)
