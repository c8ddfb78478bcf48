"""Recurrent layers against torch.nn's of the same weights, and the traced GRU against both."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from transom.export.onnx_export import onnx_from_module
from transom.models.recurrent import AdditiveAttention, BidirectionalGRU, GRUCell, LSTMCell
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

WORST = 1e-6


class Reading(nn.Module):
    """The GRU behind its mask, as a graph."""

    def __init__(self, gru: BidirectionalGRU) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gru(x, mask.sum(1))  # type: ignore[no-any-return]


def random_gru(layers: int) -> BidirectionalGRU:
    torch.manual_seed(3)
    gru = BidirectionalGRU(5, 7, layers)
    for parameter in gru.parameters():
        nn.init.normal_(parameter, std=0.5)
    gru.pack()
    return gru.eval()


@pytest.mark.parametrize("layers", [1, 3])
def test_each_row_is_read_from_its_own_ends(layers: int) -> None:
    """A batch with padding gives each row what torch.nn.GRU gives it alone."""
    gru, lengths = random_gru(layers), [9, 4, 1]
    x = torch.randn(3, 9, 5)
    with torch.no_grad():
        outputs, final = gru(x, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            expected, last = nn.GRU.forward(gru, x[row : row + 1, :length])
            assert (outputs[row, :length] - expected[0]).abs().max() <= WORST
            assert (final[row] - torch.cat((last[-2, 0], last[-1, 0]))).abs().max() <= WORST
            assert not outputs[row, length:].any()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_traced_graph_is_one_gru_a_layer_and_computes_the_same(layers: int) -> None:
    gru = random_gru(layers)
    graph = Graph(
        "encoder",
        (TensorSpec("x", "float32", ("B", "S", 5)), TensorSpec("mask", "int64", ("B", "S"))),
        (TensorSpec("outputs", "float32", ("B", "S", 14)), TensorSpec("final", "float32", ("B", 14))),
    )
    model = onnx_from_module(Reading(gru).eval(), graph, {"B": Axis(1, 1, 4), "S": Axis(1, 8, 64)})
    assert [node.op_type for node in model.graph].count("GRU") == layers
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for B, S in ((1, 1), (4, 1), (3, 9), (2, 64)):
        x = torch.randn(B, S, 5)
        mask = (torch.arange(S) < torch.tensor([S, 1, 4, 2])[:B].clamp(max=S)[:, None]).long()
        with torch.no_grad():
            expected = gru(x, mask.sum(1))
        found = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
        for ours, theirs in zip(found, expected, strict=True):
            assert np.abs(ours - theirs.numpy()).max() <= WORST


def test_the_cells_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x, hidden, state = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    ours, theirs = GRUCell(5, 7), nn.GRUCell(5, 7)
    our_lstm, their_lstm = LSTMCell(5, 7), nn.LSTMCell(5, 7)
    with torch.no_grad():
        for mine, other in ((ours, theirs), (our_lstm, their_lstm)):
            for name in ("weight", "bias"):
                getattr(other, f"{name}_ih").copy_(getattr(mine.input, name))
                getattr(other, f"{name}_hh").copy_(getattr(mine.hidden, name))
        assert (ours(x, hidden) - theirs(x, hidden)).abs().max() <= WORST
        for found, expected in zip(our_lstm(x, hidden, state), their_lstm(x, (hidden, state)), strict=True):
            assert (found - expected).abs().max() <= WORST


def test_attention_is_a_weighted_mean_of_what_the_mask_shows() -> None:
    """By pencil: with W, U and v of ones and A = 1 the scores are tanh(q + k)."""
    attention = AdditiveAttention(1, 1, 1)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.fill_(0.0 if parameter.ndim == 1 else 1.0)
        values = torch.tensor([[[0.0], [1.0], [50.0]]])
        context, weights = attention(
            torch.tensor([[0.0]]), attention.keys(values), values, torch.tensor([[True, True, False]])
        )
        second = np.exp(np.tanh(1.0)) / (1 + np.exp(np.tanh(1.0)))  # 0.6817 of the second position
        assert weights[0].tolist() == pytest.approx([1 - second, second, 0.0], abs=1e-6)
        assert context.item() == pytest.approx(second, abs=1e-6)
