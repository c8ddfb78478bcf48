"""Read samples as token ids, as every family that generates does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from transom.calib.run_samples import IDS, MASK, SampleRunner, require_no_pair
from transom.calib.samples import TEXT, Sample
from transom.export.families.evaluation import naming, text_of
from transom.runtime.backends.base import Array
from transom.runtime.errors import CalibrationError, InputError
from transom.runtime.tasks.generator import Generator
from transom.runtime.tasks.prompts import Row


def row_runner(graph: str, run_row: Callable[[Any, Row], None]) -> SampleRunner:
    """Return the runner of a family that generates: ``run_row`` gets a text, or raw ids, as token ids.

    ``graph`` is the one that reads them. Raw inputs of other names run as they are.
    """

    def run(bundle: Generator, sample: Sample) -> None:
        run_row(bundle, prompt_of(bundle, sample))

    def run_raw(bundle: Generator, feeds: Mapping[str, Array]) -> None:
        row = row_of(feeds)
        if row is None:
            bundle.run(feeds)
        else:
            run_row(bundle, row)

    return SampleRunner({graph: (TEXT, IDS)}, run, run_raw)


def prompt_of(bundle: Generator, sample: Sample) -> Row:
    """Return a calibration sample's text as token ids, uncut."""
    require_no_pair(sample)
    return list(bundle.tokenizer().encode([str(sample.text)], truncate=False).rows[0].ids)


def row_of(feeds: Mapping[str, Array]) -> Row | None:
    """Return the token ids of raw feeds (1, S) that no mask hides; None where there are other feeds, too."""
    if feeds.keys() - {IDS, MASK}:
        return None
    ids = feeds[IDS]
    mask = feeds.get(MASK, np.ones_like(ids))
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or mask.shape != ids.shape:
        raise InputError(
            f"{IDS} is {ids.dtype} {ids.shape} for one sample, {MASK} {mask.shape}; expected integers (1, S), so "
            "(samples, S) in the file."
        )
    return [int(token) for token in ids[0, mask[0] != 0]]


def ids_of(bundle: Generator, sample: Sample) -> Row:
    """Return a sample as token ids: of its text, or its raw ``input_ids`` without what its mask leaves out."""
    if sample.feeds is not None and "input_ids" in sample.feeds:
        given = sample.feeds["input_ids"][0]
        mask = sample.feeds.get("attention_mask")
        ids = [int(token) for token in (given if mask is None else given[mask[0] != 0])]
    else:
        text = text_of(sample)
        with naming([sample]):
            ids = list(bundle.tokenizer().encode([text], truncate=False).rows[0].ids)
    outside = [token for token in ids if not 0 <= token < bundle.vocabulary]
    if outside:
        raise CalibrationError(
            f"held-out sample {sample.name} has the token {outside[0]}; the model knows 0..{bundle.vocabulary - 1}. "
            "Leave it out."
        )
    return ids
