"""The definition of seq2seq against its equations, written out with torch.nn; checkpoints that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoder_definitions import assert_close, edit, ours_of
from recurrent_models import SEQ2SEQ, write_seq2seq
from transom.runtime.errors import CheckpointError

SOURCES = ([5, 9, 4, 17, 3, 2], [7, 2], [11, 12, 13, 2])
TARGET = [1, 6, 15, 3, 8]  # begins with the start token


def batch() -> tuple[Tensor, Tensor]:
    """Return SOURCES padded with token 0, int64 (3, 6), and their mask."""
    lengths = torch.tensor([len(source) for source in SOURCES])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(source) for source in SOURCES], batch_first=True)
    return ids, (torch.arange(6) < lengths[:, None]).long()


def forced(loaded: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the logits along TARGET, step by step through the two graphs: (B, n, V)."""
    parts, found = loaded.parts(), []
    with torch.no_grad():
        encoded = parts["encoder"](ids, mask)
        layers = loaded.config.decoder_layers
        source, states = encoded[:-layers], encoded[-layers:]
        for token in TARGET:
            given = (mask, *source) if loaded.config.attention else source
            outputs = parts["decoder"](torch.full((len(ids), 1), token), *given, *states)
            found.append(outputs[0])
            states = outputs[-layers:]
    return torch.cat(found, dim=1)


def written_out(module: Any, source: list[int]) -> Tensor:
    """Compute the same for one source by the papers' equations, with torch.nn's GRU and GRUCell: (1, n, V)."""
    encoder, decoder, found = module.encoder, module.decoder, []
    annotations, last = nn.GRU.forward(encoder.gru, encoder.embed_tokens(torch.tensor([source])))
    h = annotations[0]  # (S, 2H)
    context = torch.cat((last[-2, 0], last[-1, 0]))
    states = [state[None] for state in torch.tanh(encoder.bridge(context)).chunk(len(decoder.cells))]
    for token in TARGET:
        if decoder.attention is not None:
            a = decoder.attention
            scores = torch.tanh(a.query(states[-1][0]) + a.key(h)) @ a.score.weight[0]  # e_ij
            context = torch.softmax(scores, 0) @ h
        y = decoder.embed_tokens(torch.tensor(token))
        x = torch.cat((y, context))[None]
        for layer, cell in enumerate(decoder.cells):
            theirs = nn.GRUCell(x.shape[1], states[layer].shape[1])
            theirs.weight_ih, theirs.bias_ih = cell.input.weight, cell.input.bias
            theirs.weight_hh, theirs.bias_hh = cell.hidden.weight, cell.hidden.bias
            x = states[layer] = theirs(x, states[layer])
        t = decoder.readout(torch.cat((x[0], y, context)))
        found.append(decoder.lm_head(torch.maximum(t[0::2], t[1::2])))
    return torch.stack(found)[None]


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": False}, {"encoder_layers": 1, "decoder_layers": 1}, {"decoder_layers": 3, "attention": False}],
    ids=str,
)
def test_each_row_of_a_batch_is_what_the_equations_give_it_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    loaded = ours_of(write_seq2seq(tmp_path, **settings))
    found = forced(loaded, *batch())
    for row, source in enumerate(SOURCES):
        with torch.no_grad():
            assert_close(found[row : row + 1], written_out(loaded.module, source))


def test_weights_of_attention_sum_to_one_over_the_source(tmp_path: Path) -> None:
    loaded = ours_of(write_seq2seq(tmp_path))
    ids, mask = batch()
    with torch.no_grad():
        encoded = loaded.parts()["encoder"](ids, mask)
        weights = loaded.parts()["decoder"](torch.ones(3, 1, dtype=torch.long), mask, *encoded)[1]
    assert weights.shape == (3, 1, 6)
    assert (weights.sum(2) - 1).abs().max() <= 1e-6
    assert not weights[:, 0][mask == 0].any()


def test_graphs_and_axes(tmp_path: Path) -> None:
    loaded = ours_of(write_seq2seq(tmp_path))
    encoder, decoder = loaded.graphs
    assert [tensor.name for tensor in encoder.outputs] == [
        "cross_key",
        "cross_value",
        "hidden_state.0",
        "hidden_state.1",
    ]
    assert [tensor.name for tensor in decoder.inputs] == [
        "decoder_input_ids", "attention_mask", "cross_key", "cross_value", "hidden_state.0", "hidden_state.1",
    ]  # fmt: skip
    assert {tensor.aliases: tensor.name for tensor in decoder.outputs if tensor.aliases} == {
        "hidden_state.0": "hidden_state.0.next",
        "hidden_state.1": "hidden_state.1.next",
    }
    assert {name: (axis.min, axis.opt, axis.max) for name, axis in loaded.axes.items()} == {
        "B": (1, 1, 16), "S": (1, 41, 41), "T": (1, 1, 1),
    }  # fmt: skip
    assert loaded.options == {"max_target_positions": 80}


def test_without_attention_the_source_is_one_vector(tmp_path: Path) -> None:
    encoder, decoder = ours_of(write_seq2seq(tmp_path, attention=False)).graphs
    assert (encoder.outputs[0].name, encoder.outputs[0].shape) == ("context", ("B", 26))
    assert "attention_mask" not in {tensor.name for tensor in decoder.inputs}
    assert [tensor.name for tensor in decoder.outputs][:2] == ["logits", "hidden_state.0.next"]


@pytest.mark.parametrize(
    ("stored", "claimed", "words"),
    [
        (True, False, "attention is false, and the weights are of the form with attention: there are weights"),
        (False, True, "attention is true, and the weights are of the form without attention, whose context is one"),
    ],
)
def test_weights_of_the_other_form(tmp_path: Path, stored: bool, claimed: bool, words: str) -> None:
    folder = write_seq2seq(tmp_path, attention=stored)
    edit(folder, attention=claimed)
    with pytest.raises(CheckpointError, match=words) as raised:
        ours_of(folder)
    assert f"Set attention to {str(stored).lower()}" in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("encoder_layers", 0, "encoder_layers is 0, expected an integer in 1..1000"),
        ("attention", "yes", "attention is 'yes', expected true or false"),
        ("embedding_size", 8.5, "embedding_size is 8.5, expected an integer"),
        ("max_source_positions", 10_000_000, r"max_source_positions is 10000000, expected 1\.\.1000000"),
        ("max_target_positions", 10_000_000, r"max_target_positions is 10000000, expected 2\.\.1000000"),
        ("max_target_positions", 1, r"max_target_positions is 1, expected 2\.\.1000000"),
        ("decoder_hidden_size", SEQ2SEQ.decoder_hidden_size + 1, "shape"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, setting: str, value: Any, words: str) -> None:
    folder = write_seq2seq(tmp_path)
    edit(folder, **{setting: value})
    with pytest.raises(CheckpointError, match=words):
        ours_of(folder)
