"""Recurrent layers: a bidirectional GRU over padded rows, cells of one step, and additive attention.

The cells are matrix products and elementwise operators, so that a step graph runs in any precision and its products
can be integers. The recurrence over a source is one ONNX ``GRU`` per layer, which honours the length of each row.

Shape letters, in the code and as axis names in the ONNX graph:
    B batch   S source positions   E input size   H hidden size   A attention size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import Tensor as TensorSpec

MASKED = -3e4  # far below any score of a trained model, and a number that FP16 holds
MOST_POSITIONS = 1_000_000
GRU_VERSION = 22  # of the ONNX operator: the first with bfloat16


class BidirectionalGRU(nn.GRU):
    """A stack of bidirectional GRUs (Cho et al., 2014, arXiv:1406.1078) in PyTorch's form: reset after the product.

    Both directions of a row begin and end at its own ends: padding on the right never changes it. Weights have the
    names of ``torch.nn.GRU``. Call ``pack`` once they are loaded, before the module is traced.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True)

    def pack(self) -> None:
        """Keep the weights in the layout of ONNX beside PyTorch's: ``W`` (2, 3H, E), ``R`` (2, 3H, H), ``B`` (2, 6H).

        The gates are in the order update, reset, new; PyTorch's are reset, update, new.
        """
        for layer in range(self.num_layers):
            for name, kinds in (("W", ("weight_ih",)), ("R", ("weight_hh",)), ("B", ("bias_ih", "bias_hh"))):
                packed = [
                    torch.cat([gates_of_onnx(getattr(self, f"{kind}_l{layer}{direction}")) for kind in kinds])
                    for direction in ("", "_reverse")
                ]
                self.register_buffer(f"{name}{layer}", torch.stack(packed).detach(), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Run over ``x`` (B, S, E), rows of ``lengths`` int64 (B,), each at least 1.

        Returns the last layer's outputs (B, S, 2H), zeros behind a row's end, and its final states (B, 2H): the
        forward direction's at the row's end, then the backward direction's at its beginning.
        """
        if torch.onnx.is_in_onnx_export():
            return self.symbolic(x, lengths)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, final = super().forward(packed)
        padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])
        return padded, torch.cat((final[-2], final[-1]), dim=1)

    def symbolic(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Emit one ONNX ``GRU`` per layer, which PyTorch 2.13's exporter has no operator for."""
        B, S, H = x.shape[0], x.shape[1], self.hidden_size
        ends = lengths.to(torch.int32)
        final = x
        for layer in range(self.num_layers):
            outputs, final = torch.onnx.ops.symbolic_multi_out(
                "GRU",
                (x.transpose(0, 1), *(getattr(self, f"{name}{layer}") for name in "WRB"), ends),
                {"hidden_size": H, "direction": "bidirectional", "linear_before_reset": 1},
                dtypes=(x.dtype, x.dtype),
                shapes=((S, 2, B, H), (2, B, H)),
                version=GRU_VERSION,
            )
            x = outputs.permute(2, 0, 1, 3).flatten(2)  # (B, S, 2H)
        return x, final.transpose(0, 1).flatten(1)


def gates_of_onnx(stored: Tensor) -> Tensor:
    """Return PyTorch's gates (3H, ...) in the order of ONNX: update, reset, new."""
    reset, update, new = stored.chunk(3)
    return torch.cat((update, reset, new))


class GRUCell(nn.Module):
    """One step of a GRU in PyTorch's form, written as matrix products. Gates: reset, update, new."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return the next state: ``x`` (B, E), ``hidden`` (B, H) -> (B, H)."""
        x_reset, x_update, x_new = self.input(x).chunk(3, dim=1)
        h_reset, h_update, h_new = self.hidden(hidden).chunk(3, dim=1)
        update = torch.sigmoid(x_update + h_update)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
        return new + update * (hidden - new)


class LSTMCell(nn.Module):
    """One step of an LSTM (Hochreiter and Schmidhuber, 1997), as matrix products."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input = nn.Linear(input_size, 4 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 4 * hidden_size)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next state and cell: ``x`` (B, E), ``hidden`` and ``cell`` (B, H) -> (B, H) each."""
        admit, forget, new, output = (self.input(x) + self.hidden(hidden)).chunk(4, dim=1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(admit) * torch.tanh(new)
        return torch.sigmoid(output) * torch.tanh(cell), cell


class AdditiveAttention(nn.Module):
    """Attention with scores v^T tanh(W q + U k): Bahdanau et al., 2015 (arXiv:1409.0473), appendix A.1.2.

    ``key`` is applied once per source (``keys``), the rest at every step.
    """

    def __init__(self, query_size: int, value_size: int, attention_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_size, attention_size, bias=False)
        self.key = nn.Linear(value_size, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)

    def keys(self, values: Tensor) -> Tensor:
        """Project the source's vectors: (B, S, E) -> (B, S, A)."""
        keys: Tensor = self.key(values)
        return keys

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend once: ``query`` (B, H), ``keys`` (B, S, A), ``values`` (B, S, E), ``mask`` bool (B, S).

        Returns the context (B, E) and the weights (B, S), which sum to 1 over the positions that ``mask`` shows.
        """
        scores = self.score(torch.tanh(self.query(query)[:, None] + keys)).squeeze(2)
        if mask is not None:
            scores = scores.masked_fill(~mask, MASKED)
        weights = torch.softmax(scores, dim=1)
        return (weights[:, None] @ values).squeeze(1), weights


def check_positions(name: str, value: int, least: int) -> None:
    """Raise CheckpointError for a number of positions that nothing stored bounds.

    An output has at least two: the start token and one more.
    """
    if not least <= value <= MOST_POSITIONS:
        raise CheckpointError(f"config.json: {name} is {value}, expected {least}..{MOST_POSITIONS}. Correct it.")


def state_inputs(name: str, layers: int, size: int) -> tuple[TensorSpec, ...]:
    """Return ``<name>.<i>`` of every layer, float32 (B, size): what the step before, or the encoder, gave."""
    return tuple(TensorSpec(f"{name}.{layer}", "float32", ("B", size), state=True) for layer in range(layers))


def state_outputs(states: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Return the states after a step, each of which takes its input's place."""
    return tuple(
        TensorSpec(f"{tensor.name}.next", "float32", tensor.shape, state=True, aliases=tensor.name) for tensor in states
    )
