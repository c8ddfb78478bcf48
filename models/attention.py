"""Attention, one for all families, in the form that every fusion matches.

Shape letters, in the code and as axis names in the ONNX graph:
    B batch   S sequence   E hidden size   H heads   D head size, E = H * D
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention up to its output projection: "Attention Is All You Need", section 3.2.

    Separate projections and 4-D operands, so that the exporter emits exactly one ONNX ``Attention``
    (opset 23) per layer; a packed QKV that is unbound would export as Slice and Squeeze chains.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over ``x`` (B, S, E); ``mask`` is bool (B, 1, S, S), true where a key may be seen."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        return attend(q, k, v, mask)


class Projections(nn.Module):
    """The four projections of a multi-head attention, named as in Marian's and CLIP's checkpoints: section 3.2.2."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.out_proj = nn.Linear(d_model, d_model)

    def queries(self, x: Tensor) -> Tensor:
        """Project to queries: (B, S, E) -> (B, H, S, D)."""
        return split_heads(self.q_proj(x), self.num_heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project to keys and values: (B, S, E) -> (B, H, S, D) each."""
        return split_heads(self.k_proj(x), self.num_heads), split_heads(self.v_proj(x), self.num_heads)


class SelfAttention(Projections):
    """Attention over ``x`` (B, S, E) and its output projection."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out_proj(attend(self.queries(x), *self.keys_values(x), mask))  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute softmax(q k^T * scale) v and join the heads: (B, S, E).

    ``q`` is (B, H, S, D), ``k`` and ``v`` are (B, H, C, D), ``mask`` bool (B, 1, S, C), true where a key
    may be seen. ``scale`` is 1/sqrt(D) unless given.
    """
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # (B, H, S, D)
    return y.transpose(1, 2).flatten(2)  # (B, S, E)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split the heads: (B, S, E) -> (B, H, S, D)."""
    B, S, E = x.shape
    return x.view(B, S, num_heads, E // num_heads).transpose(1, 2)


def key_mask(attention_mask: Tensor, queries: int | None = None) -> Tensor:
    """Turn ``attention_mask`` (B, S), non-zero where a token is real, into bool (B, 1, queries, S).

    ``queries`` is S unless given. Expanded over them: ONNX Runtime's CPU kernel refuses a mask of
    (B, 1, 1, S) at run time.
    """
    B, S = attention_mask.shape
    return attention_mask.to(torch.bool)[:, None, None, :].expand(B, 1, S if queries is None else queries, S)


def causal_key_mask(attention_mask: Tensor) -> Tensor:
    """Return ``key_mask`` with no later key visible to a query either: bool (B, 1, S, S)."""
    place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return key_mask(attention_mask) & (place <= place[:, None])
