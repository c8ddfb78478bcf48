"""Describe what the export needs of a family; each family's module ends in one ``ExportFamily``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transom.calib.run_samples import SampleRunner
from transom.calib.samples import Sample
from transom.export.families.evaluation import EvaluationCases, GateLimits
from transom.runtime.bundle import Bundle
from transom.runtime.families import family_record


@dataclass(frozen=True)
class Figure:
    """The figure of a family's model in a report, drawn from the bundle's own graph.

    draw     bundle, inputs, prompts -> HTML; examples stand in for inputs where there are none
    texts    it needs a tokenizer
    images   it needs an image processor
    prompts  it takes ``--prompt`` beside the inputs
    bare     bundle -> HTML for a bundle that lacks what is needed
    """

    draw: Callable[[Bundle, Sequence[str], Sequence[str]], str]
    texts: bool = False
    images: bool = False
    prompts: bool = False
    bare: Callable[[Bundle], str] = lambda bundle: ""

    def missing(self, bundle: Bundle) -> str:
        """Return what the bundle lacks to be drawn, in words; empty where it has all."""
        if self.texts and bundle.manifest.tokenizer is None:
            return "tokenizer"
        return "preprocessing of images" if self.images and bundle.manifest.preprocess is None else ""


@dataclass(frozen=True)
class ExportFamily:
    """The export's side of a family.

    title    its name in a report
    samples  how a loaded bundle is run on a calibration sample
    cases    FP32 bundle, held-out samples, tokens at most -> the cases on which a quantised bundle is compared with it
    gate     how much a quantised bundle may lose
    figure   what its report shows
    by_task  the record of a task that takes other inputs than those above; empty but for families of both texts and
             images
    """

    title: str
    samples: SampleRunner
    cases: Callable[[Any, Sequence[Sample], int], EvaluationCases]
    gate: GateLimits
    figure: Figure
    by_task: Mapping[str, ExportFamily] = field(default_factory=dict)


def export_family(name: str, task: str | None = None) -> ExportFamily:
    """Return the export's record of a family, one of ``transom.runtime.families.FAMILIES``, for a ``task`` of it."""
    record: ExportFamily = family_record("export.families", name)
    return record if task is None else record.by_task.get(task, record)
