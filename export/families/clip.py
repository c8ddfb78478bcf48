"""Calibrate, evaluate and draw CLIP: images beside the texts that they are nearest to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from transom.calib.run_samples import IDS, PIXELS, SampleRunner, require_no_pair
from transom.calib.samples import IMAGE, TEXT, Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import (
    CHOICE,
    NEIGHBOUR,
    NO_CHOICE,
    EvaluationCases,
    Floats,
    GateLimits,
    Outputs,
    naming,
    text_of,
)
from transom.export.families.images import image_rows
from transom.runtime.bundle import Bundle
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.clip import Clip


def run_towers(bundle: Clip, sample: Sample) -> None:
    """Run the tower of what the sample holds, or both."""
    require_no_pair(sample)
    if sample.image is not None:
        bundle.embed_image(sample.image)
    if sample.text is not None:
        bundle.embed_text(sample.text, truncate=True)


def pictured(sample: Sample) -> bool:
    return sample.image is not None or "pixel_values" in (sample.feeds or {})


def clip_cases(fp32: Clip, samples: Sequence[Sample], tokens: int) -> EvaluationCases:
    """Compare which of the held-out texts each held-out image is nearest to, as ``zero_shot`` chooses labels.

    Right is the text that came with the image, if one did. Where there are no images, or fewer than two texts, the
    nearest other sample by the one tower.
    """
    images = [sample for sample in samples if pictured(sample)]
    written = [sample for sample in samples if sample.text is not None or "input_ids" in (sample.feeds or {})]
    texts = [*{sample.text or sample.name: sample for sample in written}.values()]  # a caption may be there twice
    places = {sample.text or sample.name: place for place, sample in enumerate(texts)}

    def run_both(bundle: LoadedBundle) -> Iterator[Outputs]:
        clip = cast(Clip, bundle)
        labels = np.float32(clip.logit_scale) * np.stack([vector for _, vector in text_vectors(clip, texts)]).T
        for sample, vector in image_rows(clip, images, "image_embeds"):
            logits = vector @ labels  # (texts,)
            chosen = int(logits.argmax())
            own = places.get(sample.text or sample.name)
            right = None if own is None else (int(chosen == own), 1)
            yield Outputs(sample.name, logits, np.array([[chosen]]), right=right)

    def run_one(bundle: LoadedBundle) -> Iterator[Outputs]:
        clip = cast(Clip, bundle)
        for sample, vector in image_rows(clip, images, "image_embeds") if images else text_vectors(clip, texts):
            yield Outputs(sample.name, vector, NO_CHOICE, vector)

    if images and len(texts) > 1:
        return EvaluationCases(run_both, CHOICE, f"images among {len(texts)} texts", "zero-shot logits")
    which, output = ("images", "image_embeds") if images else ("texts", "text_embeds")
    return EvaluationCases(run_one, NEIGHBOUR, f"nearest other {which}", output)


def text_vectors(bundle: Clip, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Floats]]:
    """Embed each sample's text, or its raw ``input_ids``: float32 (E,) of unit length."""
    for sample in samples:
        with naming([sample]):
            if sample.text is not None:
                batch = bundle.tokenizer().encode([text_of(sample)], truncate=True)
                found = bundle.run_texts(batch, "text_embeds")
            else:
                taken = ("input_ids", "attention_mask")
                feeds = {name: array for name, array in (sample.feeds or {}).items() if name in taken}
                found = bundle.run(feeds, ["text_embeds"])
            yield sample, found["text_embeds"][0]


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.clip import draw_zero_shot_matrix

    return draw_zero_shot_matrix(bundle, inputs, prompts)


FAMILY = ExportFamily(
    "CLIP",
    SampleRunner({"image": (IMAGE, PIXELS), "text": (TEXT, IDS)}, run_towers),
    clip_cases,
    GateLimits(points=0.010),
    Figure(draw, texts=True, images=True, prompts=True),
)
