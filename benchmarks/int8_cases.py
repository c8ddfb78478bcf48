"""The models whose INT8 is measured, their data, and the sides that are compared.

A *side* is a loaded bundle: FP32's, ours in INT8, or FP32's with graphs in it that another tool quantised. All are run
by the same runtime code on the same held-out inputs, in one process. int8_measures.py takes the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from outliers import outlier_checkpoint

from transom.export.datasets import heldout_dates, heldout_text, masked_text, wordnet_pairs
from transom.export.scores import DIGIT_NAMES, blocks, heldout_images
from transom.runtime.backends import open_backend
from transom.runtime.backends.base import Array, Backend, Read
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.bundle import Bundle
from transom.runtime.greedy_check import PAD, greedy, logits_along
from transom.runtime.loading import load_with_backends
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.tasks.generator import Generator

THREADS = 2
NEW_TOKENS = 12  # that a Transformer is fed along: a date in ISO 8601 and its end


@dataclass(frozen=True)
class Case:
    """A model, its calibration set, the number of held-out inputs for its error, the bounds of its axes."""

    name: str
    data: str
    held_out: int
    max_sizes: Mapping[str, int] | None = None
    has_logits: bool = True


CASES = {
    case.name: case
    for case in (
        Case("vit", "digits", 540),
        Case("bert", "austen", 100),
        Case("minilm", "wordnet", 200, {"S": 128, "B": 8}, has_logits=False),
        Case("clip", "digit-captions", 540, has_logits=False),
        Case("gpt", "austen", 20),
        Case("transformer", "dates", 100),
    )
}


def source_of(case: Case, work: Path, *, outliers: bool = False) -> str:
    """Return SOURCE for an export."""
    return str(outlier_checkpoint(case.name, work)) if outliers else case.name


def bundle_of(case: Case, work: Path, *, outliers: bool = False) -> Path:
    """Return the FP32 bundle of a reference model, or of its copy with outliers, exported unless it exists."""
    bundle = work / (f"{case.name}-outliers" if outliers else case.name)
    if not bundle.exists():
        from transom.export.pipeline import export  # brings torch

        export(source_of(case, work, outliers=outliers), bundle, max_sizes=case.max_sizes)
    return bundle


Opener = Callable[[GraphFile, Read, str, int | None], Backend]  # as ``open_backend``


class Recorder:
    """An opener whose backends record their feeds and outputs while ``on``."""

    def __init__(self, opener: Opener = open_backend) -> None:
        self._opener = opener
        self.on = False
        self.fed: dict[str, list[dict[str, Array]]] = {}  # graph -> one entry per run, copies
        self.answers: list[Array] = []  # what the task read, real positions alone

    def __call__(self, graph: GraphFile, read: Read, device: str, threads: int | None) -> Backend:
        return RecordingBackend(self._opener(graph, read, device, threads), self)


class RecordingBackend:
    """A backend that reports to a ``Recorder``."""

    def __init__(self, backend: Backend, recorder: Recorder) -> None:
        self._backend, self._recorder = backend, recorder
        self.device, self.graph = backend.device, backend.graph

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        if not self._recorder.on:
            return self._backend.run(feeds, shapes)
        copies = {name: np.array(value) for name, value in feeds.items()}  # before the run: caches are written in place
        found = self._backend.run(feeds, shapes)
        self._recorder.fed.setdefault(self.graph.name, []).append(copies)
        self._recorder.answers += [real(output, copies.get("attention_mask")) for output in found.values()]
        return found


def real(output: Array, mask: Array | None) -> Array:
    """Return an output without its padded positions, (n, ...), where it has one row per position of the mask."""
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return output
    return cast(Array, output[mask.astype(bool)])


@dataclass
class Side:
    """A loaded bundle, and the size in bytes of the CPU's graphs."""

    case: Case
    loaded: Any
    recorder: Recorder
    size: int
    answers: list[Array] = field(default_factory=list)  # to the held-out inputs


@contextmanager
def open_side(
    case: Case, folder: Path, opener: Opener = open_backend, *, size: int | None = None, threads: int = THREADS
) -> Iterator[Side]:
    """Load a bundle as ``transom.runtime.load`` does, its backends by ``opener``."""
    bundle, recorder = Bundle(folder), Recorder(opener)
    found = size_of(bundle) if size is None else size
    backends = {file.graph.name: recorder(file, bundle.read, "cpu", threads) for file in bundle.manifest.graphs}
    with load_with_backends(bundle, backends) as loaded:
        yield Side(case, loaded, recorder, found)


def in_place(files: Mapping[str, Path], integers: Mapping[str, str] | None = None) -> Opener:
    """Return an opener that runs these files, by graph, in place of the bundle's.

    ``integers`` is what a session makes of those of ours; other tools' graphs run as ONNX Runtime does by default.
    """

    def opener(graph: GraphFile, read: Read, device: str, threads: int | None) -> Backend:
        path = files[str(graph.graph.name)]
        made = None if integers is None else integers[graph.graph.name]
        file = GraphFile(graph.graph, {"default": path.name}, None, integers=made)
        return OrtBackend(file, lambda _: path.read_bytes(), device, threads)

    return opener


def size_of(bundle: Bundle) -> int:
    """Return the bytes of the graphs that this CPU runs, with their external weights."""
    total = 0
    for file in bundle.manifest.graphs:
        data = bundle.read(file.file_for("cpu"))
        outside = {
            (entries["offset"], int(entries["length"]))
            for tensor in onnx.load_from_string(data).graph.initializer
            if (entries := {entry.key: entry.value for entry in tensor.external_data})
        }
        total += len(data) + sum(length for _, length in outside)
    return total


def calibration_feeds(case: Case, folder: Path, samples: int) -> dict[str, list[dict[str, Array]]]:
    """Return per graph the runtime's feeds for single samples, evenly spread over the data."""
    from transom.calib.data import open_calibration_data
    from transom.calib.run_samples import run_sample
    from transom.export.families.base import export_family

    data = open_calibration_data([case.data]).samples
    with open_side(case, folder) as side:
        runner = export_family(side.loaded.manifest.family, side.loaded.manifest.task).samples
        side.recorder.on = True
        for index in np.linspace(0, len(data) - 1, min(samples, len(data))).astype(int):
            run_sample(side.loaded, data[int(index)], runner)
    return side.recorder.fed


class HeldOut:
    """The held-out inputs of a case, and FP32's outputs on them.

    A Transformer is fed the tokens that FP32 chose, whatever another side would have chosen.
    """

    def __init__(self, fp32: Side) -> None:
        self.case = fp32.case
        self._chosen: list[tuple[list[list[int]], Array]] = []
        if fp32.case.name == "transformer":
            loaded: Generator = fp32.loaded
            rows = [
                list(row.ids)
                for row in loaded.tokenizer().encode(heldout_dates()[0][: self.case.held_out], truncate=False).rows
            ]
            size = loaded.max_size("B")
            batches = [rows[first : first + size] for first in range(0, len(rows), size)]
            self._chosen = [(batch, greedy(loaded, batch, NEW_TOKENS).chosen.tokens) for batch in batches]
        self.reference = self.answers(fp32)

    def answers(self, side: Side) -> list[Array]:
        """Return the outputs that the task reads: arrays whose last axis is logits or a vector."""
        if self._chosen:
            return [logits_along(side.loaded, rows, tokens)[tokens != PAD] for rows, tokens in self._chosen]
        side.recorder.on, side.recorder.answers = True, []
        put_through_task(self.case, side.loaded)
        side.recorder.on = False
        return side.recorder.answers


def put_through_task(case: Case, loaded: Any) -> None:
    """Run the held-out inputs through the task's own method."""
    if case.name == "vit":
        loaded.classify(heldout_images()[0][: case.held_out])
    elif case.name == "clip":
        loaded.zero_shot(heldout_images()[0][: case.held_out], [f"a scan of a {name}" for name in DIGIT_NAMES])
    elif case.name == "minilm":
        loaded.embed(wordnet_pairs()[0][: case.held_out])
    elif case.name == "bert":
        for text, _ in masked_text()[: case.held_out]:
            loaded.fill_mask(text, top_k=1)
    else:
        for block in blocks(heldout_text())[: case.held_out]:
            loaded.log_probabilities("\n" + block)
