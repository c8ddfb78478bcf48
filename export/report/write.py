"""From a bundle's folder to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transom.export.bundle import write
from transom.export.inputs import heldout_dates, passage
from transom.export.report.alignment import alignments
from transom.export.report.page import page
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, InputError

EXAMPLES = 2  # texts drawn where none are given
EXAMPLE_CHARACTERS = 60  # of each: a picture of more tokens than fit on a page says little


def write_report(folder: Path, texts: Sequence[str], out: Path) -> None:
    """Write the report of the bundle in ``folder`` to ``out``, whole or not at all.

    ``texts`` are source texts for a translation, whose alignment is drawn. Raises InputError for texts where
    there is nothing to draw, ExportError where ``out`` cannot be written.
    """
    bundle = Bundle(folder)
    manifest = bundle.manifest
    draws = manifest.family == "transformer" and manifest.tokenizer is not None
    if texts and not draws:
        raise InputError(f"texts are drawn for translations with a tokenizer; this is a {manifest.family} bundle.")
    pictures = alignments(bundle, texts or examples(bundle)) if draws else []
    try:
        write(out, page(manifest, pictures).encode())
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}. Check the folder and its permissions.") from None


def examples(bundle: Bundle) -> list[str]:
    """A few lines that the model may have an answer to: held-out dates of the reference model, else prose."""
    lines = heldout_dates()[0] if bundle.manifest.source.get("checkpoint") == "transformer" else passage()
    return [line[:EXAMPLE_CHARACTERS] for line in lines[:EXAMPLES]]
