"""Base class of bundles that read texts: tokenize them, and run them in batches that the bundle allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import PacksRows
from transom.runtime.errors import BundleError, InputError
from transom.runtime.feeds import wanted_outputs
from transom.runtime.finite import check_finite
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.batches import BatchRows, Name, Places, batches, by_tokens, collected, name_of_row, packed
from transom.runtime.text.batch import CompactRow, EncodedBatch, row_length
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_spec import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Encoding

Floats = NDArray[np.float32]
TEXT: Name = "text {}".format
EMPTY = np.empty(0, np.int64)
KEPT_BYTES = 16 << 20  # of rows that wait for their batch; others are tokenized again when it comes
# Tokens of a run that computes no padding: with fewer the weights are read more often, with more the activations leave
# the processor's caches.
PACKED_TOKENS = 1024
ROW_BYTES = 400  # of a CompactRow, beside 8 for each token


class TextBundle(LoadedBundle):
    """A loaded bundle with a graph from ``input_ids`` to one row per text."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tokenizer = None
        if self.manifest.tokenizer is not None:
            spec = TokenizerSpec.from_json(self.manifest.tokenizer)
            if spec.kind != "tokenizers":  # others know ids alone, no offsets into the text
                raise BundleError(f"tokenizer.kind is {spec.kind!r}, expected 'tokenizers'; export the bundle again.")
            self._tokenizer = self._bundle.open_tokenizer(spec, self.max_size("S"), lambda tokens: self.wider(S=tokens))

    def text_rows(
        self, texts: Sequence[str], output: str, *, truncate: bool, prefix: str = "", name: Name = TEXT
    ) -> Floats:
        """Compute an output with one row per text, (N, ...) in the order of the texts, as ``text_batches`` does."""
        parts = self.text_batches(texts, None, output, truncate=truncate, prefix=prefix, name=name)
        return collected(parts, len(texts))

    def text_batches(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        output: str,
        *,
        truncate: bool,
        prefix: str = "",
        name: Name = TEXT,
    ) -> Iterator[BatchRows]:
        """Compute an output with one row per text, batch by batch; ``prefix`` is put before each text.

        All texts are tokenized first, so that a wrong one is an error before anything runs, but beyond KEPT_BYTES
        only their lengths are kept. Raises as ``TextTokenizer.encode`` does, and NotFiniteError; ``name`` returns the
        name of a text in errors.
        """
        encoder = self.tokenizer()
        encoder.check(texts, pairs)

        def row(place: int) -> Encoding:
            text, pair = texts[place], None if pairs is None else pairs[place]
            prefixed = prefix + text if prefix and isinstance(text, str) else text
            return encoder.row(prefixed, pair, truncate=truncate, name=name(place), pair_name=f"pair {place}")

        lengths: list[int] = []
        kept: dict[int, CompactRow] = {}
        budget = KEPT_BYTES
        for place in range(len(texts)):
            encoding = row(place)
            lengths.append(len(encoding))
            budget -= ROW_BYTES + 8 * len(encoding)
            if budget >= 0:
                kept[place] = CompactRow.of(encoding)
        for places in self._batches(lengths):
            batch = encoder.padded([kept.pop(place) if place in kept else row(place) for place in places.tolist()])
            rows = self.run_texts(batch, output)[output]
            check_finite(rows, output, partial(name_of_row, places, name))
            yield places, rows

    def _batches(self, lengths: Sequence[int]) -> Iterator[Places]:
        """Group rows of texts: a CPU gets batches that cost little, a GPU as many rows as fit.

        A backend without padding gets as many tokens as its caches hold.
        """
        if self._packs_rows():
            return by_tokens(lengths, PACKED_TOKENS)
        if self.device != "cpu":
            return batches(lengths, self.max_size("B"))
        return packed(lengths, self.max_size("B"), partial(row_length, most=self.max_size("S")))

    def run_texts(self, batch: EncodedBatch, *outputs: str) -> dict[str, Floats]:
        """Return the graph's ``outputs`` for one batch, which is padded to its ``row_length`` while the graph runs."""
        longest = batch.input_ids.shape[1]
        packs = self._packs_rows()
        more = 0 if packs else row_length(longest, self.max_size("S")) - longest
        feeds = {
            "input_ids": padded_by(batch.input_ids, more, self.tokenizer().spec.pad_id),
            "attention_mask": padded_by(batch.attention_mask, more, 0),
        }
        graph = self.graph_for(feeds)
        if any(tensor.name == "token_type_ids" for tensor in graph.inputs):
            feeds["token_type_ids"] = padded_by(batch.token_type_ids, more, 0)
        if packs:  # any number of rows, which the tokenizer made
            sizes = dict(zip(("B", "S"), batch.input_ids.shape, strict=True))
            return self._pick(feeds).run(feeds, wanted_outputs(graph, outputs, sizes))
        found = self.run(feeds, outputs)
        by_token = {tensor.name for tensor in graph.outputs if tensor.shape[1:2] == ("S",)}
        return {name: array[:, :longest] if name in by_token else array for name, array in found.items()}

    def _packs_rows(self) -> bool:
        """Return whether the graph of texts runs without padding."""
        backend = self._pick(dict.fromkeys(("input_ids", "attention_mask"), EMPTY))
        return isinstance(backend, PacksRows) and backend.packs_rows

    def tokenizer(self) -> TextTokenizer:
        """Return the tokenizer; InputError where the checkpoint had none."""
        if self._tokenizer is None:
            raise InputError("this bundle has no tokenizer, since its checkpoint had none; call run() with input_ids.")
        return self._tokenizer


def padded_by(array: NDArray[np.int64], more: int, value: int) -> NDArray[np.int64]:
    """Pad the array (R, S) on the right with ``more`` columns of ``value``."""
    return np.pad(array, ((0, 0), (0, more)), constant_values=value) if more else array


def take(batch: EncodedBatch, chosen: Sequence[int] | NDArray[np.intp]) -> EncodedBatch:
    """Return some rows of a batch, with no more padding than the longest of them needs."""
    rows = tuple(batch.rows[index] for index in chosen)
    length = max(len(row) for row in rows)
    index = np.asarray(chosen)
    ids, mask, types = (
        array[index, :length] for array in (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    )
    return EncodedBatch(ids, mask, types, rows)
