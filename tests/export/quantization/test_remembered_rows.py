"""A text that the gate has computed once is not computed again, and its outputs are those that it would get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from transom.export.quantization.remembered_rows import RememberedRows, remembering
from transom.runtime import load
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.bundle import Bundle
from transom.runtime.tasks.bert import Bert

TEXTS = ["she made it", "who would go to the city on the water", "paris", "a city made of oil and water down there"]


def test_each_text_runs_once_whatever_is_beside_it(bert_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = OrtBackend.run

    def counted(self: OrtBackend, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        rows.append(len(feeds["input_ids"]))
        return run(self, feeds, shapes)

    with (
        load(bert_bundle, threads=1, kernels="onnxruntime") as opened,
        remembering(Bundle(bert_bundle), opened) as loaded,
    ):
        alone = np.concatenate([cast(Bert, opened).embed([text]) for text in TEXTS])
        monkeypatch.setattr(OrtBackend, "run", counted)
        bert = cast(Bert, loaded)
        np.testing.assert_array_equal(bert.embed(TEXTS[:2]), alone[:2])
        assert sum(rows) == 2
        np.testing.assert_array_equal(bert.embed(TEXTS[::-1]), alone[::-1])
        assert sum(rows) == len(TEXTS)
        ids = {"input_ids": np.array([[2, 9, 0, 0]]), "attention_mask": np.array([[1, 1, 0, 0]])}
        bert.run(ids, ["sentence_embedding"])
        bert.run({**ids, "token_type_ids": np.array([[0, 1, 0, 0]])}, ["sentence_embedding"])
        bert.run({**ids, "attention_mask": np.array([[1, 0, 0, 0]])}, ["sentence_embedding"])
        assert sum(rows) == len(TEXTS) + 3, "other types, another mask"
        hidden = [bert.run(ids)["last_hidden_state"].shape for _ in range(2)]
        assert hidden[0][:2] == (1, 4)
        assert sum(rows) == len(TEXTS) + 5, "outputs per token are not kept"


def test_decoders_stay_as_they_are(gpt_bundle: Path, bert_bundle: Path) -> None:
    with load(gpt_bundle) as opened, remembering(Bundle(gpt_bundle), opened) as loaded:
        assert loaded.backend("decoder") is opened.backend("decoder")
    with load(bert_bundle) as opened, remembering(Bundle(bert_bundle), opened) as loaded:
        assert isinstance(loaded.backend("model"), RememberedRows)
