"""Layers that encoders share: activations, dense layers as checkpoints nest them, embeddings of texts and images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """Compute x * sigmoid(1.702 x): Hendrycks and Gimpel (2016, arXiv:1606.08415), section 2."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """Compute max(x, 0) squared: So et al. (2021, arXiv:2109.08668), section 3.1."""
    return F.relu(x) * F.relu(x)


# Names as in transformers' configs; gelu_new, gelu_fast and gelu_pytorch_tanh are one tanh approximation.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Dense(nn.Module):
    """A linear layer under the name ``dense``, as checkpoints nest it, with an optional activation."""

    def __init__(self, in_features: int, out_features: int, activation: str | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        self.activation = ACTIVATIONS[activation] if activation else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        return x if self.activation is None else self.activation(x)


class FeedForward(nn.Module):
    """Two linear layers without biases around an activation; with ``gated`` a third one's output multiplies it.

    Gated it is the GLU of Shazeer (2020, arXiv:2002.05202), equation 6: SwiGLU where the activation is "silu".
    """

    def __init__(self, width: int, intermediate: int, activation: str, *, gated: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False) if gated else None
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Compute each of the rows (..., E) alone."""
        up = self.up_proj(x)
        inner = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        return self.down_proj(inner)  # type: ignore[no-any-return]


class DenseAddNorm(nn.Module):
    """Post-norm end of a sublayer: LayerNorm(residual + dense(x))."""

    def __init__(self, in_features: int, out_features: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        self.LayerNorm = nn.LayerNorm(out_features, eps=norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)  # type: ignore[no-any-return]


class UnitLength(nn.Module):
    """Vectors divided by their length, in FP32 whatever the precision of the graph, as ``SentencePooling`` is."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., E): float32."""
        x = x.float()
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / length.clamp(min=1e-12)  # F.normalize would expand the length


class TokenMean(nn.Module):
    """The mean of all tokens of a map, in FP32 whatever the precision of the graph, as ``SentencePooling`` is."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x`` (B, S, E): float32 (B, E). A product of two equal rows, as in SentencePooling."""
        S = x.shape[1]
        return (torch.ones(2, S) @ x.float())[:, 0] / S


class SentencePooling(nn.Module):
    """One vector per sentence, as sentence-transformers' Pooling and Normalize modules make it.

    Computed in FP32 whatever the precision of the graph: a sum over hundreds of tokens loses too
    many digits in FP16. Nodes under this module's name keep FP32 when a graph is converted.
    """

    def __init__(self, mode: str, normalize: bool) -> None:
        super().__init__()
        self.mode = mode
        self.normalize = normalize

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool ``hidden`` (B, S, E) over ``attention_mask`` (B, S): float32 (B, E)."""
        hidden = hidden.float()
        if self.mode == "cls":
            pooled = hidden[:, 0]
        else:
            # A product of two equal rows, one of which is taken. ONNX Runtime adds up a ReduceSum, and a product of one
            # row, in an order that depends on the batch size and on the padding; this one in the order of the tokens.
            weight = attention_mask.unsqueeze(1).float()  # (B, 1, S)
            total = (torch.cat((weight, weight), 1) @ hidden)[:, 0]  # (B, E)
            pooled = total / weight.sum(2).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled
