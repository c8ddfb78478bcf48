"""A loaded bundle that reads texts: its tokenizer, and rows of an output in batches that the bundle allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import BundleError, InputError
from transom.runtime.session import LoadedBundle
from transom.runtime.text.tokenizer import EncodedBatch, TextEncoder, TextSpec

Floats = NDArray[np.float32]


class TextBundle(LoadedBundle):
    """What families with a graph from ``input_ids`` to one row per text share."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._text = None
        if self.manifest.tokenizer is not None:
            spec = TextSpec.from_json(self.manifest.tokenizer)
            if spec.kind != "tokenizers":  # others know ids alone, no offsets into the text
                raise BundleError(f"tokenizer.kind is {spec.kind!r}, expected 'tokenizers'; export the bundle again.")
            self._text = TextEncoder(
                self._bundle.read(spec.file), spec, self.max_size("S"), lambda tokens: self.wider(S=tokens)
            )

    def text_rows(self, texts: Sequence[str], pairs: Sequence[str] | None, output: str, *, truncate: bool) -> Floats:
        """An output with one row per text, computed in batches of texts of like length."""
        encoded = self.encoder().encode(texts, pairs, truncate=truncate)
        order = np.argsort(encoded.attention_mask.sum(1), kind="stable")
        rows: list[Floats] = [np.empty(0, np.float32)] * len(texts)
        for start in range(0, len(order), self.max_size("B")):
            chosen = order[start : start + self.max_size("B")]
            for index, row in zip(chosen, self.run_texts(take(encoded, chosen), output)[output], strict=True):
                rows[index] = row
        return np.stack(rows)

    def run_texts(self, batch: EncodedBatch, *outputs: str) -> dict[str, Floats]:
        """The graph's ``outputs`` for one batch."""
        feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if any(tensor.name == "token_type_ids" for tensor in self.graph_for(feeds).inputs):
            feeds["token_type_ids"] = batch.token_type_ids
        return self.run(feeds, outputs)

    def encoder(self) -> TextEncoder:
        """The tokenizer; InputError where the checkpoint had none."""
        if self._text is None:
            raise InputError("this bundle has no tokenizer, since its checkpoint had none; call run() with input_ids.")
        return self._text


def take(batch: EncodedBatch, chosen: Sequence[int] | NDArray[np.intp]) -> EncodedBatch:
    """Some rows of a batch, with no more padding than the longest of them needs."""
    rows = tuple(batch.rows[index] for index in chosen)
    length = max(len(row) for row in rows)
    index = np.asarray(chosen)
    ids, mask, types = (
        array[index, :length] for array in (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    )
    return EncodedBatch(ids, mask, types, rows)
