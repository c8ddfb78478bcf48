"""Decoders small enough for a test, as generation sees them: a table, and two models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel, PreTrainedModel

VOCABULARY = 23
START = 22  # Marian's pad_token_id and decoder_start_token_id


class Table:
    """What follows a token depends on that token alone: logits are ``table[token]``; notes what it is asked."""

    def __init__(self, table: NDArray[np.float32], last: Sequence[int]) -> None:
        self.table = table
        self.last = np.array(last)
        self.selected: list[list[int]] = []
        self.fed = 0

    def logits(self) -> NDArray[np.float32]:
        return self.table[self.last]

    def decode_step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        assert tokens.shape == self.last.shape
        assert tokens.dtype == np.int64
        self.last, self.fed = tokens.copy(), self.fed + 1
        return self.logits()

    def reorder(self, rows: NDArray[np.intp]) -> None:
        self.selected.append(rows.tolist())
        self.last = self.last[rows]


class Recomputed:
    """A torch model that reads each row again from its start: slow, and nothing to go wrong with a cache."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]], sources: Any = None) -> None:
        self.model = model
        self.rows = [list(row) for row in rows]
        self.sources = None if sources is None else [list(source) for source in sources]

    def logits(self) -> NDArray[np.float32]:
        found = np.zeros((len(self.rows), VOCABULARY), dtype=np.float32)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(self.rows):
            groups.setdefault((len(row), len(self.sources[index]) if self.sources else 0), []).append(index)
        for group in groups.values():
            ids = torch.tensor([self.rows[index] for index in group])
            with torch.no_grad():
                if self.sources is None:
                    out = self.model(ids).logits
                else:
                    source = torch.tensor([self.sources[index] for index in group])
                    out = self.model(input_ids=source, decoder_input_ids=ids).logits
            found[group] = out[:, -1].numpy()
        return found

    def decode_step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        assert len(tokens) == len(self.rows)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.logits()

    def reorder(self, rows: NDArray[np.intp]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]
        if self.sources is not None:
            self.sources = [self.sources[row] for row in rows]


def spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights large enough that the best token leads by a margin, none of the tokens always being it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            weight = torch.randn(parameter.shape, generator=generator) * 0.6
            if len(weight) == VOCABULARY:
                weight *= 2 / weight.norm(dim=1, keepdim=True)
            parameter.data.copy_(weight)
    return model.eval()


@lru_cache
def tiny_gpt() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=48,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return spread(GPT2LMHeadModel(config), seed=1)


@lru_cache
def tiny_marian() -> PreTrainedModel:
    config = MarianConfig(
        vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=48,
        pad_token_id=START, eos_token_id=0, decoder_start_token_id=START, forced_eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return spread(MarianMTModel(config), seed=2)
