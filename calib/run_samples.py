"""Calibration samples put through a loaded bundle, each alone, by the code that serves users.

One sample at a time: padding, which no user's row need have, would otherwise stand beside it. Texts longer than the
bundle allows are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from transom.calib.data import CalibrationData
from transom.calib.samples import IMAGE, TEXT, Sample
from transom.runtime.backends.base import Array
from transom.runtime.errors import CalibrationError, InputError
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.bert import Bert
from transom.runtime.tasks.clip import Clip
from transom.runtime.tasks.generator import Generator, Row
from transom.runtime.tasks.gpt import GPT
from transom.runtime.tasks.transformer import Transformer
from transom.runtime.tasks.vit import ViT
from transom.runtime.text.tokenizer import EncodedBatch

NEW_TOKENS = 64  # of a generated text, at most: most sentences end before
GAP_EVERY = 7  # tokens, where a masked-language model is given a text without a gap: about the 15 % of BERT's paper

IDS, MASK, PIXELS = "input_ids", "attention_mask", "pixel_values"
# The kinds of a sample that make each graph of a family run; a graph that is not here runs whenever these do.
READS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "bert": {"model": (TEXT, IDS)},
    "vit": {"model": (IMAGE, PIXELS)},
    "clip": {"image": (IMAGE, PIXELS), "text": (TEXT, IDS)},
    "gpt": {"decoder": (TEXT, IDS)},
    "transformer": {"encoder": (TEXT, IDS)},
}


def put_through(bundle: LoadedBundle, sample: Sample) -> None:
    """Run ``bundle`` on one sample, for what its backends observe; answers are dropped.

    BERT, ViT and CLIP answer it; GPT says how probable its tokens are, of one context at most; the Transformer
    translates it greedily. Raises CalibrationError, which names the sample, for one that does not fit the graph.
    """
    family, tokenizer, preprocess = what_reads(bundle)
    check_kinds(family, sample.name, sample.kinds, tokenizer=tokenizer, preprocess=preprocess)
    try:
        if sample.feeds is not None:
            FEED[family](bundle, sample.feeds)
        else:
            PUT[family](bundle, sample)
    except InputError as error:
        raise CalibrationError(
            f"{sample.name} does not fit the graph of this {family}: {error} Correct the sample, or leave it out."
        ) from None


def what_reads(bundle: LoadedBundle) -> tuple[str, bool, bool]:
    """(family, whether it has a tokenizer, whether it has image preprocessing)."""
    manifest = bundle.manifest
    return manifest.family, manifest.tokenizer is not None, manifest.preprocess is not None


def check_reach(family: str, data: CalibrationData, *, tokenizer: bool, preprocess: bool) -> None:
    """Raise CalibrationError unless every sample fits the family by its kind, and each graph is reached by some.

    ``tokenizer`` and ``preprocess`` say whether the checkpoint has them. Nothing is computed, and no graph is needed:
    this is to be called before anything takes its time.
    """
    for entry in data.entries:
        check_kinds(family, entry.name, entry.kinds, tokenizer=tokenizer, preprocess=preprocess)
    missed = {graph: wanted for graph, wanted in READS[family].items() if not data.kinds & {*wanted}}
    for graph, (kind, raw) in missed.items():
        raise CalibrationError(
            f"{data.name} holds {listed(data.kinds)}, which never reach the graph {graph!r} of this {family}: it takes "
            f"{kind}s ({raw}). Give both, as in a folder of images and a .txt file."
        )


def check_kinds(family: str, name: str, kinds: frozenset[str], *, tokenizer: bool, preprocess: bool) -> None:
    """Raise CalibrationError where nothing of a sample is what the family takes."""
    wanted = READS[family].values()
    if not any(kinds & {*pair} for pair in wanted):
        takes = " and ".join(f"{kind}s (or a .npz file with {raw})" for kind, raw in wanted)
        raise CalibrationError(
            f"{name} holds {listed(kinds)}: samples that don't fit the graph. This {family} takes {takes}. "
            "Give calibration data of that kind."
        )
    for kind, there, raw in ((TEXT, tokenizer, IDS), (IMAGE, preprocess, PIXELS)):
        if kind in kinds and not there and any(kind in pair for pair in wanted):
            lacks = "tokenizer" if kind == TEXT else "image preprocessing"
            raise CalibrationError(
                f"{name} holds {listed(kinds)}, but this {family} has no {lacks}, since its checkpoint had none. "
                f"Give a .npz file with {raw}."
            )


def listed(kinds: frozenset[str]) -> str:
    """``an image and a text``, ``input_ids``."""
    words = {TEXT: "a text", IMAGE: "an image"}
    return " and ".join(words.get(kind, kind) for kind in sorted(kinds)) or "nothing"


def put_bert(bundle: Bert, sample: Sample) -> None:
    text = str(sample.text)
    if bundle.manifest.task == "feature-extraction" and sample.text_pair is None:
        text = str(bundle.manifest.options.get("prompt", "")) + text  # as ``embed`` does
    pairs = None if sample.text_pair is None else [sample.text_pair]
    batch = bundle.tokenizer().encode([text], pairs, truncate=True)
    if bundle.manifest.task == "fill-mask":
        batch = with_gaps(batch, bundle.tokenizer().spec.mask_id)
    bundle.run_texts(batch, bundle.backend("model").graph.outputs[0].name)


def with_gaps(batch: EncodedBatch, mask_id: int | None) -> EncodedBatch:
    """One row, with mask tokens among its own tokens (``gaps_among``), unless it has a gap already.

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
    """Every GAP_EVERY-th of ``places`` (n,), the first in the middle of its run: a word on both sides tells of it.

    So is a text shorter than that: it has one gap in its middle, where counting from either end would leave none, or
    take the first word of every text.
    """
    return places[min(GAP_EVERY, len(places)) // 2 :: GAP_EVERY]


def put_vit(bundle: ViT, sample: Sample) -> None:
    bundle.image_rows([cast(Any, sample.image)], bundle.backend("model").graph.outputs[0].name)


def put_clip(bundle: Clip, sample: Sample) -> None:
    one_text(sample)
    if sample.image is not None:
        bundle.embed_image(sample.image)
    if sample.text is not None:
        bundle.embed_text(sample.text, truncate=True)


def put_gpt(bundle: GPT, sample: Sample) -> None:
    read(bundle, ids_of(bundle, sample))


def put_transformer(bundle: Transformer, sample: Sample) -> None:
    translate(bundle, ids_of(bundle, sample))


def ids_of(bundle: Generator, sample: Sample) -> Row:
    one_text(sample)
    return list(bundle.tokenizer().encode([str(sample.text)], truncate=False).rows[0].ids)


def one_text(sample: Sample) -> None:
    if sample.text_pair is not None:
        raise InputError("it has a text_pair, and only BERT takes pairs.")


def read(bundle: GPT, ids: Row) -> None:
    """The first context's worth of tokens; a single one has no probability, but is read all the same."""
    shown = ids[: bundle.context]
    if len(shown) == 1:
        bundle.prefill([shown])
    else:
        bundle.log_probabilities(shown)


def translate(bundle: Transformer, ids: Row) -> None:
    """Greedily, and not without end."""
    bundle.generate(
        cut_source(bundle, ids),
        num_beams=1,
        do_sample=False,
        num_return_sequences=1,
        max_new_tokens=most_new_tokens(bundle),
    )


def cut_source(bundle: Transformer, ids: Row) -> Row:
    """At most as many tokens as the encoder takes; the last stays, which closes a source."""
    most = bundle.max_size(str(bundle.prompt_tokens().shape[1]))
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def most_new_tokens(bundle: Transformer) -> int:
    """How many tokens of a translation are followed."""
    return max(1, min(NEW_TOKENS, bundle.context - 1))


def feed(bundle: LoadedBundle, feeds: Mapping[str, Array]) -> None:
    bundle.run(feeds)  # the family's own: CLIP's takes the inputs of both towers


def feed_gpt(bundle: GPT, feeds: Mapping[str, Array]) -> None:
    row = row_of(feeds)
    if row is None:
        bundle.run(feeds)
    else:
        read(bundle, row)


def feed_transformer(bundle: Transformer, feeds: Mapping[str, Array]) -> None:
    row = row_of(feeds)
    if row is None:
        bundle.run(feeds)
    else:
        translate(bundle, row)


def row_of(feeds: Mapping[str, Array]) -> Row | None:
    """The token ids of raw feeds (1, S), without those that a mask hides; None where there are other feeds, too."""
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


PUT: Mapping[str, Callable[[Any, Sample], None]] = {
    "bert": put_bert,
    "vit": put_vit,
    "clip": put_clip,
    "gpt": put_gpt,
    "transformer": put_transformer,
}
FEED: Mapping[str, Callable[[Any, Mapping[str, Array]], None]] = {
    "bert": feed,
    "vit": feed,
    "clip": feed,
    "gpt": feed_gpt,
    "transformer": feed_transformer,
}
