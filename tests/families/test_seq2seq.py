"""seq2seq with attention and without: what every recurrent family shows, and sources that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from command_line import error_line, transom
from conftest import Once
from recurrent_family import RecurrentFamily
from recurrent_models import write_seq2seq
from transom.runtime import load
from transom.runtime.errors import InputError

TEXTS = ["the people of paris", "water", "what is it now a long long day"]


class TestWithAttention(RecurrentFamily):
    task = "translation"
    linears = 10  # encoder: bridge, attention's keys; decoder: query, score, two of each cell, readout, head
    others: ClassVar = {"GRU": 2}
    loops = 2  # of two layers
    products = (2, 16)
    kernels: ClassVar = {"fp32": (60, 20), "fp16": (60, 23), "bf16": (60, 23), "int8": (59, 23)}
    attention = True

    def checkpoint(self, folder: Path) -> Path:
        return write_seq2seq(folder, tokenizer=True, attention=self.attention)

    def calibration_data(self, folder: Path) -> Path:
        path = folder / "texts.txt"
        path.write_text("\n".join(f"{text} and {'more ' * row}water" for row in range(4) for text in TEXTS) + "\n")
        return path

    def inputs(self, folder: Path) -> list[Any]:
        return TEXTS

    def prompts(self, count: int) -> list[Any]:
        return [[5, 9, 4, 17, 3, 2], [7, 2], [11, 12, 13, 2]][:count]

    def test_padding_never_changes_a_row(self, once: Once) -> None:
        ids = np.array([[5, 9, 2, 0, 0, 0], [4, 4, 4, 4, 4, 2]])
        mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
        with load(self.bundle(once)) as bundle:
            padded = bundle.run({"input_ids": ids, "attention_mask": mask})
            alone = bundle.run({"input_ids": ids[:1, :3]})
            other = bundle.run({"input_ids": np.where(mask == 1, ids, 9), "attention_mask": mask})
        for name, expected in alone.items():
            found = padded[name][:1, :3] if expected.ndim == 3 else padded[name][:1]
            assert np.abs(found - expected).max() <= 1e-6
            assert np.array_equal(padded[name], other[name])

    def test_a_source_longer_than_the_maximum(self, once: Once, tmp_path: Path) -> None:
        folder = self.bundle(once)
        line = error_line(transom("run", folder, "water " * 42))
        assert "43 tokens" in line
        assert "41" in line
        with load(folder) as bundle, pytest.raises(InputError, match="source 1 is 42 tokens; axis S allows 41"):
            bundle.generate([[5, 2], [5] * 42])

    @pytest.mark.parametrize(
        ("texts", "words"),
        [("", "a prompt is empty"), (["water", "", "now"], "prompt 1 is empty"), ([], "a prompt is empty")],
    )
    def test_an_empty_source(self, once: Once, texts: Any, words: str) -> None:
        with load(self.bundle(once)) as bundle, pytest.raises(InputError, match=words):
            bundle.translate(texts)

    @pytest.mark.parametrize(
        ("mask", "words"),
        [
            ([[1, 1, 1], [0, 0, 0]], "row 1 of 2 has no token; expected at least one 1"),
            ([[0, 1, 1], [1, 1, 1]], "row 0 of 2 has padding before a token"),
            ([[1, 1, 1], [1, 0, 1]], "row 1 of 2 has padding before a token"),
            ([[1, 1, 1], [2, 0, 0]], "row 1 of 2 holds 2; expected at least one 1, then zeros"),
            ([[1, 1, -1], [1, 1, 1]], "row 0 of 2 holds -1; expected at least one 1, then zeros"),
        ],
    )
    def test_a_batch_with_a_row_that_no_recurrence_reads(self, once: Once, mask: Any, words: str) -> None:
        with load(self.bundle(once)) as bundle, pytest.raises(InputError, match=words):
            bundle.run({"input_ids": np.full((2, 3), 5), "attention_mask": np.array(mask)})


class TestWithoutAttention(TestWithAttention):
    linears = 7  # without attention's three
    products = (1, 14)
    kernels: ClassVar = {"fp32": (57, 13), "fp16": (57, 17), "bf16": (57, 17), "int8": (56, 17)}
    attention = False


def test_the_weights_of_the_alignment_are_an_output(once: Once) -> None:
    with load(TestWithAttention().bundle(once)) as bundle:
        ids, mask = np.array([[5, 9, 2], [7, 2, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
        encoded = bundle.run({"input_ids": ids, "attention_mask": mask})
        found = bundle.run({"decoder_input_ids": np.ones((2, 1), np.int64), "attention_mask": mask, **encoded})
    assert found["cross_attentions"].shape == (2, 1, 3)
    assert found["cross_attentions"].sum(2) == pytest.approx(np.ones((2, 1)), abs=1e-6)
    assert found["cross_attentions"][1, 0, 2] == 0
