"""Calibrate, evaluate and draw BERT: a head's logits where somebody reads them, or embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.run_samples import IDS, SampleRunner, Together
from transom.calib.samples import TEXT, Sample
from transom.export.families.base import ExportFamily, Figure
from transom.export.families.evaluation import (
    BATCH_BYTES,
    NEIGHBOUR,
    NO_CHOICE,
    EvaluationCases,
    Floats,
    GateLimits,
    Outputs,
    choice_of_head,
    naming,
    text_of,
    top1_of_head,
)
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.bert import Bert
from transom.runtime.text.batch import EncodedBatch, row_length

GAP_EVERY = 7  # tokens, where a masked-language model is given a text without a gap: about the 15 % of BERT's paper
HEAD_OUTPUTS = {  # by task; others have logits
    "feature-extraction": ("sentence_embedding",),
    "question-answering": ("start_logits", "end_logits"),
}
COUNTED = {
    "feature-extraction": "nearest other samples",
    "fill-mask": "masked tokens",
    "question-answering": "spans",
    "token-classification": "tokens",
}
AT_TOKENS = ("fill-mask", "token-classification")

Ids = NDArray[np.int64]


def run_text(bundle: Bert, sample: Sample) -> None:
    """Run a text, or a pair, as the task's own method does; a masked-language model gets gaps."""
    run_batch(bundle, encoded(bundle, sample))


def run_texts(bundle: Bert, samples: Sequence[Sample]) -> None:
    """Run texts of one ``row_length`` at once, each as ``run_text`` does."""
    rows = [encoded(bundle, sample) for sample in samples]
    batch = bundle.tokenizer().padded([row.rows[0] for row in rows])
    for ids, row in zip(batch.input_ids, rows, strict=True):
        ids[: row.input_ids.shape[1]] = row.input_ids[0]  # with its gaps
    run_batch(bundle, batch)


def run_batch(bundle: Bert, batch: EncodedBatch) -> None:
    bundle.run_texts(batch, bundle.backend("model").graph.outputs[0].name)


def encoded(bundle: Bert, sample: Sample) -> EncodedBatch:
    """Return a text, or a pair, as one row of what the task's own method reads."""
    text = str(sample.text)
    if bundle.manifest.task == "feature-extraction" and sample.text_pair is None:
        text = str(bundle.manifest.options.get("prompt", "")) + text  # as ``embed`` does
    pairs = None if sample.text_pair is None else [sample.text_pair]
    batch = bundle.tokenizer().encode([text], pairs, truncate=True)
    if bundle.manifest.task == "fill-mask":
        batch = with_gaps(batch, bundle.tokenizer().spec.mask_id)
    return batch


def row_tokens(bundle: Bert, sample: Sample) -> int:
    """Return the tokens of a text's row as the graph gets it: a few of padding with it."""
    return row_length(encoded(bundle, sample).input_ids.shape[1], bundle.max_size("S"))


def with_gaps(batch: EncodedBatch, mask_id: int | None) -> EncodedBatch:
    """Return one row with mask tokens among its own tokens (``gaps_among``), unless it has a gap already.

    A masked-language model is never used, and was never trained, without: what [MASK] makes of the activations
    belongs in their ranges. Calibration and the accuracy gate take the same, for ranges of other tokens than those that
    are judged would be judged by chance.
    """
    if mask_id is None or mask_id in batch.input_ids:
        return batch
    ids = batch.input_ids.copy()
    ids[0, gaps_among(np.flatnonzero(np.array(batch.rows[0].special_tokens_mask) == 0))] = mask_id
    return replace(batch, input_ids=ids)


def gaps_among(places: NDArray[np.intp]) -> NDArray[np.intp]:
    """Choose every GAP_EVERY-th of ``places`` (n,), the first in the middle of its run, between words on both sides.

    So is a text shorter than that: it has one gap in its middle, where counting from either end would leave none, or
    take the first word of every text.
    """
    return places[min(GAP_EVERY, len(places)) // 2 :: GAP_EVERY]


@dataclass(frozen=True)
class TextRow:
    """A text as ids, int64 (S,) per input, without padding; ``counted`` (S,) says which positions are asked for.

    ``truth`` is what stood there, int64 (positions,), where we put the gaps ourselves.
    """

    sample: Sample
    feeds: Mapping[str, Ids]
    counted: NDArray[np.bool_]
    truth: Ids | None = None

    @property
    def length(self) -> int:
        return len(self.counted)


def text_cases(fp32: Bert, samples: Sequence[Sample], most: int) -> EvaluationCases:
    """Compare the task's outputs on texts, cut to the bundle's S; where it answers at tokens, until there are ``most``.

    fill-mask             the gaps; a text without one gets those that calibration gives it, and then it is known what
                          stood there
    token-classification  every token that stands for characters of the text
    question-answering    one case per text: where the span starts and where it ends
    feature-extraction    the nearest other sample by cosine. No task is as hard on a model: of 1,000 texts many have
                          two neighbours at nearly the same distance.
    """
    task, options = fp32.manifest.task, fp32.manifest.options
    outputs = HEAD_OUTPUTS.get(task, ("logits",))
    rows = [text_row(fp32, sample) for sample in samples]
    if task in AT_TOKENS:
        reached = np.cumsum([row.counted.sum() for row in rows])
        rows = rows[: int(np.searchsorted(reached, most)) + 1]
    batches = text_batches(fp32, rows)

    def run(bundle: LoadedBundle) -> Iterator[Outputs]:
        for batch in batches:
            with naming([row.sample for row in batch]):
                found = bundle.run(stacked([row.feeds for row in batch], bundle.max_size("S")), outputs)
            for index, row in enumerate(batch):
                parts = [found[name][index] for name in outputs]
                yield read_text(task, options, row, parts)

    top1 = NEIGHBOUR if task == "feature-extraction" else top1_of_head(options)
    return EvaluationCases(run, top1, COUNTED.get(task, "samples"), " and ".join(outputs))


def read_text(task: str, options: Mapping[str, Any], row: TextRow, parts: Sequence[Floats]) -> Outputs:
    """Read one row of the outputs, without padding and positions that are not counted."""
    name = row.sample.name
    if task == "feature-extraction":
        return Outputs(name, parts[0], NO_CHOICE, parts[0])
    if task in AT_TOKENS:
        values = parts[0][: row.length][row.counted]  # (positions, V)
        chosen = values.argmax(1)
        right = None if row.truth is None else (int((chosen == row.truth).sum()), len(chosen))
        return Outputs(name, values, chosen[:, None], right=right)
    if task == "question-answering":
        values = np.stack([part[: row.length][row.counted] for part in parts])  # (2, positions)
        return Outputs(name, values, values.argmax(1)[None])
    return Outputs(name, parts[0], choice_of_head(parts[0], options))


def text_row(bundle: Bert, sample: Sample) -> TextRow:
    """Encode a sample as the task's own method does."""
    task = bundle.manifest.task
    mask_id = (bundle.manifest.tokenizer or {}).get("mask_id")
    if sample.feeds is not None:
        raw = {name: np.asarray(array)[0] for name, array in sample.feeds.items()}
        if "input_ids" not in raw:
            raise CalibrationError(f"held-out sample {sample.name} has no input_ids, which this model reads.")
        counted = raw.get("attention_mask", np.ones_like(raw["input_ids"])) != 0
        gaps = counted & (raw["input_ids"] == mask_id)
        return TextRow(sample, raw, gaps if task == "fill-mask" and gaps.any() else counted)
    text = text_of(sample)
    with naming([sample]):
        prompt = str(bundle.manifest.options.get("prompt", "")) if task == "feature-extraction" else ""
        pairs = None if sample.text_pair is None else [sample.text_pair]
        batch = bundle.tokenizer().encode([prompt + text], pairs, truncate=True)
    ids, encoding = batch.input_ids[0], batch.rows[0]
    plain = np.array(encoding.special_tokens_mask) == 0
    counted = np.ones(len(ids), np.bool_)
    truth = None
    if task == "fill-mask" and mask_id is not None:
        whole, ids = ids, with_gaps(batch, mask_id).input_ids[0]
        counted = ids == mask_id
        truth = None if mask_id in whole else whole[counted]
    elif task == "token-classification":
        counted = plain & np.array([start < end for start, end in encoding.offsets])
    elif task == "question-answering" and pairs is not None:
        counted = np.array([sequence == 1 for sequence in encoding.sequence_ids])
    feeds = {"input_ids": ids, "attention_mask": batch.attention_mask[0], "token_type_ids": batch.token_type_ids[0]}
    taken = {tensor.name for tensor in bundle.graph_for(feeds).inputs}
    return TextRow(sample, {name: array for name, array in feeds.items() if name in taken}, counted, truth)


def text_batches(bundle: Bert, rows: Sequence[TextRow]) -> list[list[TextRow]]:
    """Batch rows of like length, as many as the bundle and BATCH_BYTES allow; the batches in no order."""
    graph = bundle.graph_for({"input_ids": np.empty(0)})
    width = max(size for tensor in graph.outputs for size in (*tensor.shape, 1) if isinstance(size, int))
    found: list[list[TextRow]] = []
    for row in sorted(rows, key=lambda row: row.length):
        most = min(bundle.max_size("B"), max(1, BATCH_BYTES // (4 * width * row.length)))
        if found and len(found[-1]) < most and found[-1][0].feeds.keys() == row.feeds.keys():
            found[-1].append(row)
        else:
            found.append([row])
    return [found[index] for index in np.random.RandomState(0).permutation(len(found))]


def stacked(rows: Sequence[Mapping[str, Ids]], most: int) -> dict[str, Ids]:
    """Stack rows (S,) into a batch (B, S) of their ``row_length``, which ``most`` bounds; behind them zeros, masked."""
    longest = row_length(max(len(row["input_ids"]) for row in rows), most)
    masked = [{"attention_mask": np.ones_like(row["input_ids"]), **row} for row in rows]
    return {name: np.stack([np.pad(row[name], (0, longest - len(row[name]))) for row in masked]) for name in masked[0]}


def draw(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> str:
    from transom.export.report.figures.bert import draw_attention_heads

    return draw_attention_heads(bundle, inputs)


FAMILY = ExportFamily(
    "BERT",
    SampleRunner({"model": (TEXT, IDS)}, run_text, together=Together(row_tokens, run_texts)),
    text_cases,
    GateLimits(points=0.010),
    Figure(draw, texts=True),
)
