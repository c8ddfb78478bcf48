"""Draw the figure of a bundle's family."""

from __future__ import annotations

from collections.abc import Sequence

from transom.export.families.base import Figure, export_family
from transom.export.report.drawing.markup import section, words
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError, TransomError
from transom.runtime.families import FAMILIES


def draw_figure(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    """Draw ``inputs``, texts or image files, or examples where there are none, as HTML.

    Raises InputError for inputs that this bundle cannot draw. A bundle whose examples cannot be drawn gets a page
    that says so, and one of an unknown family nothing.
    """
    family = bundle.manifest.family
    figure: Figure | None = export_family(family).figure if family in FAMILIES else None
    missing = "picture of its family" if figure is None else figure.missing(bundle)
    if prompts and not (figure and figure.prompts):
        raise InputError(f"--prompt is for CLIP, whose images are compared with texts; this is a {family[:40]} bundle.")
    if (inputs or prompts) and missing:
        raise InputError(f"inputs are given, but there is nothing to draw of them: this bundle has no {missing}.")
    if figure is None:
        return ""
    try:
        return figure.bare(bundle) if missing else figure.draw(bundle, inputs, prompts)
    except TransomError as error:
        if inputs or prompts:
            raise
        return section("No picture", f'<p class="soft">{words(error, 400)}</p>')
