"""CLIP: every image against every prompt."""

from __future__ import annotations

from collections.abc import Sequence

from transom.export.reference_models import examples_for
from transom.export.report.drawing.markup import figure, words
from transom.export.report.drawing.raster import data_uri, pixels_class, reduced
from transom.runtime.bundle import Bundle
from transom.runtime.image_loading import open_image
from transom.runtime.tasks.clip import BLANK, Clip

THUMBNAIL = 160  # pixels of an image's longer side
TINT = 0.6  # opacity of a probability of 1: numbers must be read on it
FAINT = 0.05  # what is less probable is written in grey
PROMPTS = ("a photo of a building", "a photo of a flower", "a photo of a person", "a photo of a dog")


def draw_matching(bundle: Bundle, images: Sequence[str], prompts: Sequence[str]) -> str:
    """The matrix of ``images`` and ``prompts``; examples for what is not given."""
    names, asked = list(dict.fromkeys(prompts)), ""
    examples = examples_for(bundle.manifest.source.get("checkpoint"))
    template = None
    if not names and examples.labels:
        template = examples.template
        names, asked = list(examples.labels), f"Asked as “{template}”, {BLANK} being the column's name. "
    pictures = [open_image(source) for source in images or examples.images]
    names = names or list(PROMPTS)
    with Clip(bundle) as model:
        answers = model.zero_shot(pictures, names, templates=template)
    rows = []
    for picture, answer in zip(pictures, answers, strict=True):
        found = dict(answer)
        small = reduced(picture, THUMBNAIL)
        cells = "".join(cell(found[name], top=name == answer[0][0]) for name in names)
        shown = f'<img src="{data_uri(small)}"{pixels_class(small)} alt="{words(answer[0][0], 60)}">'
        rows.append(f"<tr><td>{shown}</td>{cells}</tr>")
    head = "".join(f'<th scope="col">{words(name, 80)}</th>' for name in names)
    matrix = f'<div class="scroll"><table class="matrix"><thead><tr><th scope="col">image</th>{head}</tr></thead>'
    return "<h2>Which words fit which image</h2>" + figure(
        f"{words(asked, 200)}Each row is an image and adds up to 1: the probability of each column's text, softmax of "
        f"the cosines times {model.logit_scale:.4g}. The outlined one is the answer. Nobody trained a classifier.",
        f"{matrix}<tbody>{''.join(rows)}</tbody></table></div>",
    )


def cell(probability: float, *, top: bool) -> str:
    kind = "shade top" if top else "shade" if probability >= FAINT else "shade soft"
    return f'<td class="{kind}" style="--p:{TINT * probability:.3f}">{probability:.2f}</td>'
