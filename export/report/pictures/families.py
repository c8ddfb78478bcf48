"""The picture of each family, drawn from the bundle's own graph."""

from __future__ import annotations

from collections.abc import Sequence

from transom.export.report.drawing.markup import section, words
from transom.export.report.pictures.alignment import draw_alignments
from transom.export.report.pictures.matching import draw_matching
from transom.export.report.pictures.sentences import draw_attention
from transom.export.report.pictures.sight import draw_sight
from transom.export.report.pictures.surprise import draw_surprise
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError, TransomError

OF_TEXTS = {"bert": draw_attention, "gpt": draw_surprise, "transformer": draw_alignments}


def draw_pictures(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    """The family's picture of ``inputs``, texts or image files, or of examples where there are none.

    Raises InputError for inputs that this bundle cannot draw. A bundle whose examples cannot be drawn gets a page
    that says so.
    """
    check_inputs(bundle, inputs, prompts)
    try:
        return drawn(bundle, inputs, prompts)
    except TransomError as error:
        if inputs or prompts:
            raise
        return section("No picture", f'<p class="soft">{words(error, 400)}</p>')


def check_inputs(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> None:
    """Raise InputError for what this bundle has no picture of."""
    family = bundle.manifest.family
    if prompts and family != "clip":
        raise InputError(f"--prompt is for CLIP, whose images are held against texts; this is a {family[:40]} bundle.")
    texts = family in OF_TEXTS
    lacks = "tokenizer" if texts else "preprocessing of images"
    if (inputs or prompts) and not complete(bundle):
        raise InputError(f"there is no picture of {'texts' if texts else 'images'}: this bundle has no {lacks}.")


def complete(bundle: Bundle) -> bool:
    """Does the bundle hold all that turns texts and images into tensors?"""
    manifest = bundle.manifest
    reads_texts, reads_images = manifest.family in (*OF_TEXTS, "clip"), manifest.family in ("vit", "clip")
    return not (reads_texts and manifest.tokenizer is None) and not (reads_images and manifest.preprocess is None)


def drawn(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    family = bundle.manifest.family
    if family == "vit":
        return draw_sight(bundle, inputs)  # without preprocessing there are still positions
    if not complete(bundle):
        return ""
    if family == "clip":
        return draw_matching(bundle, inputs, prompts)
    return OF_TEXTS[family](bundle, inputs) if family in OF_TEXTS else ""
