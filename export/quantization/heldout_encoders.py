"""What encoders are asked on held-out samples: a head's logits where somebody reads them, or embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from transom.calib.run_samples import with_gaps
from transom.calib.samples import Sample
from transom.export.quantization.heldout import (
    BATCH_BYTES,
    CHOICE,
    NEIGHBOUR,
    NOTHING,
    Answers,
    Floats,
    Questions,
    naming,
    text_of,
)
from transom.runtime.errors import CalibrationError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.bert import Bert
from transom.runtime.tasks.clip import Clip
from transom.runtime.tasks.image_bundle import ImageBundle
from transom.runtime.tasks.vit import ViT

NO_CHOICE = np.empty((0, 1), np.int64)
OUTPUTS = {  # by task; others have logits
    "feature-extraction": ("sentence_embedding",),
    "question-answering": ("start_logits", "end_logits"),
}
CASES = {
    "feature-extraction": "nearest other samples",
    "fill-mask": "masked tokens",
    "question-answering": "spans",
    "token-classification": "tokens",
}
AT_TOKENS = ("fill-mask", "token-classification")

Ids = NDArray[np.int64]


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


def text_questions(fp32: Bert, samples: Sequence[Sample], most: int) -> Questions:
    """BERT's task on texts, cut to the bundle's S; where tokens are asked for, texts are added until they are ``most``.

    fill-mask             the gaps; a text without one gets those that calibration gives it, and then it is known what
                          stood there
    token-classification  every token that stands for characters of the text
    question-answering    one case per text: where the span starts and where it ends
    feature-extraction    the nearest other sample by cosine. No task is as hard on a model: of 1,000 texts many have
                          two neighbours at nearly the same distance.
    """
    task, options = fp32.manifest.task, fp32.manifest.options
    outputs = OUTPUTS.get(task, ("logits",))
    rows = [text_row(fp32, sample) for sample in samples]
    if task in AT_TOKENS:
        reached = np.cumsum([row.counted.sum() for row in rows])
        rows = rows[: int(np.searchsorted(reached, most)) + 1]
    batches = text_batches(fp32, rows)

    def ask(bundle: LoadedBundle) -> Iterator[Answers]:
        for batch in batches:
            with naming([row.sample for row in batch]):
                found = bundle.run(stacked([row.feeds for row in batch]), outputs)
            for index, row in enumerate(batch):
                parts = [found[name][index] for name in outputs]
                yield read_text(task, options, row, parts)

    top1 = NEIGHBOUR if task == "feature-extraction" else top1_of_head(options)
    return Questions(ask, top1, CASES.get(task, "samples"), " and ".join(outputs))


def read_text(task: str, options: Mapping[str, Any], row: TextRow, parts: Sequence[Floats]) -> Answers:
    """One row of the outputs, without padding and what else is not counted."""
    name = row.sample.name
    if task == "feature-extraction":
        return Answers(name, parts[0], NO_CHOICE, parts[0])
    if task in AT_TOKENS:
        values = parts[0][: row.length][row.counted]  # (positions, V)
        chosen = values.argmax(1)
        right = None if row.truth is None else (int((chosen == row.truth).sum()), len(chosen))
        return Answers(name, values, chosen[:, None], right=right)
    if task == "question-answering":
        values = np.stack([part[: row.length][row.counted] for part in parts])  # (2, positions)
        return Answers(name, values, values.argmax(1)[None])
    return Answers(name, parts[0], choice_of_head(parts[0], options))


def top1_of_head(options: Mapping[str, Any]) -> str:
    return NOTHING if options.get("problem_type") == "regression" else CHOICE


def choice_of_head(logits: Floats, options: Mapping[str, Any]) -> Ids:
    """The label of logits (L,); of a single one whether it is above even odds; of a regression nothing."""
    if top1_of_head(options) == NOTHING:
        return NO_CHOICE
    return np.array([[int(logits.argmax()) if len(logits) > 1 else int(logits[0] > 0)]], np.int64)


def text_row(bundle: Bert, sample: Sample) -> TextRow:
    """A sample as the task's own method encodes it."""
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
    """Rows of like length together, as many as the bundle and BATCH_BYTES allow; the batches in no order."""
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


def stacked(rows: Sequence[Mapping[str, Ids]]) -> dict[str, Ids]:
    """Rows (S,) as a batch (B, S); behind the shorter ones padding of zeros, which the mask leaves out."""
    longest = max(len(row["input_ids"]) for row in rows)
    masked = [{"attention_mask": np.ones_like(row["input_ids"]), **row} for row in rows]
    return {name: np.stack([np.pad(row[name], (0, longest - len(row[name]))) for row in masked]) for name in masked[0]}


def image_questions(fp32: ViT, samples: Sequence[Sample]) -> Questions:
    """ViT's label of each image; of features, whole in the error, the nearest other image by its class token."""
    options = fp32.manifest.options
    features = fp32.manifest.task != "image-classification"
    output = "last_hidden_state" if features else "logits"

    def ask(bundle: LoadedBundle) -> Iterator[Answers]:
        for sample, values in image_rows(cast(ViT, bundle), samples, output):
            if features:
                yield Answers(sample.name, values, NO_CHOICE, values[0])
            else:
                yield Answers(sample.name, values, choice_of_head(values, options))

    if features:
        return Questions(ask, NEIGHBOUR, "nearest other images", output)
    return Questions(ask, top1_of_head(options), "images", output)


def image_rows(bundle: ImageBundle, samples: Sequence[Sample], output: str) -> Iterator[tuple[Sample, Floats]]:
    """``output`` of each sample's image, or of its raw ``pixel_values``, in batches that the bundle allows."""
    size = bundle.max_size("B")
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        with naming(batch):
            pictures = [sample.image for sample in batch if sample.image is not None]
            if len(pictures) == len(batch):
                pixels = bundle.preprocess()(pictures)
            else:
                pixels = np.concatenate([pixels_of(sample) for sample in batch])
            found = bundle.run({"pixel_values": pixels}, [output])[output]
        yield from zip(batch, found, strict=True)


def pixels_of(sample: Sample) -> NDArray[np.float32]:
    if sample.feeds is None or "pixel_values" not in sample.feeds:
        raise CalibrationError(f"held-out sample {sample.name} has no image, which this model reads. Leave it out.")
    return np.asarray(sample.feeds["pixel_values"], np.float32)


def pictured(sample: Sample) -> bool:
    return sample.image is not None or "pixel_values" in (sample.feeds or {})


def clip_questions(fp32: Clip, samples: Sequence[Sample]) -> Questions:
    """Which of all the held-out texts each held-out image is nearest to, as ``zero_shot`` tells labels.

    Right is the text that came with the image, if one did. Where there are no images, or fewer than two texts, the
    nearest other sample by the one tower.
    """
    images = [sample for sample in samples if pictured(sample)]
    written = [sample for sample in samples if sample.text is not None or "input_ids" in (sample.feeds or {})]
    texts = [*{sample.text or sample.name: sample for sample in written}.values()]  # a caption may be there twice
    places = {sample.text or sample.name: place for place, sample in enumerate(texts)}

    def ask_both(bundle: LoadedBundle) -> Iterator[Answers]:
        clip = cast(Clip, bundle)
        labels = np.float32(clip.logit_scale) * np.stack([vector for _, vector in text_vectors(clip, texts)]).T
        for sample, vector in image_rows(clip, images, "image_embeds"):
            logits = vector @ labels  # (texts,)
            chosen = int(logits.argmax())
            own = places.get(sample.text or sample.name)
            right = None if own is None else (int(chosen == own), 1)
            yield Answers(sample.name, logits, np.array([[chosen]]), right=right)

    def ask_one(bundle: LoadedBundle) -> Iterator[Answers]:
        clip = cast(Clip, bundle)
        for sample, vector in image_rows(clip, images, "image_embeds") if images else text_vectors(clip, texts):
            yield Answers(sample.name, vector, NO_CHOICE, vector)

    if images and len(texts) > 1:
        return Questions(ask_both, CHOICE, f"images among {len(texts)} texts", "zero-shot logits")
    which, output = ("images", "image_embeds") if images else ("texts", "text_embeds")
    return Questions(ask_one, NEIGHBOUR, f"nearest other {which}", output)


def text_vectors(bundle: Clip, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Floats]]:
    """Each sample's text, or its raw ``input_ids``, as CLIP embeds it: float32 (E,) of unit length."""
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
