"""The picture of each family, drawn from the bundle's own graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transom.export.report.drawing.markup import section, words
from transom.export.report.figures.alignment import draw_alignments
from transom.export.report.figures.attention_heads import draw_attention
from transom.export.report.figures.attention_rollout import draw_sight
from transom.export.report.figures.token_surprisal import draw_surprise
from transom.export.report.figures.zero_shot_matrix import draw_matching
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError, TransomError


@dataclass(frozen=True)
class Picture:
    """How a family is drawn.

    draw    bundle, inputs, prompts -> HTML; examples stand in for inputs where there are none
    texts   it needs a tokenizer
    images  it needs an image processor
    bare    bundle -> HTML for a bundle that lacks what is needed
    """

    draw: Callable[[Bundle, Sequence[str], Sequence[str]], str]
    texts: bool = False
    images: bool = False
    bare: Callable[[Bundle], str] = lambda bundle: ""

    def missing(self, bundle: Bundle) -> str:
        """What the bundle lacks to be drawn, in words; empty where it has all."""
        if self.texts and bundle.manifest.tokenizer is None:
            return "tokenizer"
        return "preprocessing of images" if self.images and bundle.manifest.preprocess is None else ""


PICTURES = {
    "bert": Picture(lambda bundle, texts, _: draw_attention(bundle, texts), texts=True),
    "clip": Picture(draw_matching, texts=True, images=True),
    "gpt": Picture(lambda bundle, texts, _: draw_surprise(bundle, texts), texts=True),
    "transformer": Picture(lambda bundle, texts, _: draw_alignments(bundle, texts), texts=True),
    "vit": Picture(
        lambda bundle, images, _: draw_sight(bundle, images),
        images=True,
        bare=lambda bundle: draw_sight(bundle, ()),  # there are still positions
    ),
}
PROMPTED = ("clip",)  # take --prompt


def draw_pictures(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    """The family's picture of ``inputs``, texts or image files, or of examples where there are none.

    Raises InputError for inputs that this bundle cannot draw. A bundle whose examples cannot be drawn gets a page
    that says so.
    """
    family = bundle.manifest.family
    picture = PICTURES.get(family)
    missing = "picture of its family" if picture is None else picture.missing(bundle)
    if prompts and family not in PROMPTED:
        raise InputError(f"--prompt is for CLIP, whose images are held against texts; this is a {family[:40]} bundle.")
    if (inputs or prompts) and missing:
        raise InputError(f"inputs are given, but there is nothing to draw of them: this bundle has no {missing}.")
    if picture is None:
        return ""
    try:
        return picture.bare(bundle) if missing else picture.draw(bundle, inputs, prompts)
    except TransomError as error:
        if inputs or prompts:
            raise
        return section("No picture", f'<p class="soft">{words(error, 400)}</p>')
