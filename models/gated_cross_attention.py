"""Flamingo's gated cross-attention (Alayrac et al., 2022, arXiv:2204.14198, section 2.2 and figure 4).

A block stands in front of a frozen block of a language model and lets each token read an image. Two gates, tanh of a
learned number, scale what its attention and its MLP add: at zero the language model computes what it did without it.

transformers' Idefics has the same block, and the settings here cover it. Where it differs from the paper: RMSNorm, and
a gated MLP with SiLU, as in its Llama, where the paper has a dense MLP with squared ReLU (the defaults here, with
LayerNorm); gates that may be one number per channel (``gate`` "vector"), where the paper has one number; queries and
keys that may be normalised (``qk_layer_norms``); tokens that may see several images, where the paper's see the latest.
The block takes any mask; ``flamingo.py`` makes the paper's. No linear layer has a bias, as in Idefics.

Shape letters as in attention.py; G groups of K consecutive rows that share their images, B = G * K; N latents of an
image, M columns of keys, V the images' width, T the text's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transom.models.attention import attend, split_heads
from transom.models.layers import FeedForward

NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
MLPS = ("dense", "gated")
GATES = ("float", "vector")


@dataclass(frozen=True)
class CrossAttentionConfig:
    """The paper's block for a language model of width 768 by default: the MLP is four times as wide."""

    num_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 3072
    norm: str = "layer_norm"
    mlp: str = "dense"
    hidden_act: str = "relu2"
    gate: str = "float"
    qk_layer_norms: bool = False
    norm_eps: float = 1e-5


class CrossAttention(nn.Module):
    """Attention from text to the latents of images; their keys and values are projected apart, once per image."""

    def __init__(self, text_width: int, image_width: int, config: CrossAttentionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(text_width, inner, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(image_width, inner, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (
            NORMS[config.norm](config.head_dim, eps=config.norm_eps) if config.qk_layer_norms else nn.Identity()
            for _ in range(2)
        )
        self.out_proj = nn.Linear(inner, text_width, bias=False)

    def keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Project the latents of an image: (B, N, V) -> keys and values (B, H, N, D) each."""
        keys = self.k_norm(split_heads(self.k_proj(latents), self.num_heads))
        return keys, split_heads(self.v_proj(latents), self.num_heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend from ``x`` (B, S, T) over ``keys`` and ``values`` (G, H, M, D): (B, S, T).

        ``mask`` is bool (G, 1, K * S, M), true where a key may be seen; each query must see one. The K rows of a group
        are more queries of one attention, so that their keys are stored and read once.
        """
        B, S, _ = x.shape
        rows = self.q_proj(x).reshape(keys.shape[0], -1, self.q_proj.out_features)  # (G, K * S, H * D)
        q = self.q_norm(split_heads(rows, self.num_heads))  # (G, H, K * S, D)
        return self.out_proj(attend(q, keys, values, mask).reshape(B, S, -1))  # type: ignore[no-any-return]


class GatedCrossAttention(nn.Module):
    """x + tanh(gate) * attention(norm(x)), then x + tanh(gate) * mlp(norm(x)): figure 4."""

    def __init__(self, text_width: int, image_width: int, config: CrossAttentionConfig) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](text_width, eps=config.norm_eps)
        self.attention = CrossAttention(text_width, image_width, config)
        self.mlp_norm = NORMS[config.norm](text_width, eps=config.norm_eps)
        self.mlp = FeedForward(text_width, config.intermediate_size, config.hidden_act, gated=config.mlp == "gated")
        channels = text_width if config.gate == "vector" else 1
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sees: Tensor) -> Tensor:
        """Let the tokens ``x`` (B, S, T) read images: (B, S, T).

        ``keys``, ``values`` and ``mask`` are those of CrossAttention; ``sees`` bool (B, S, 1) is false for a token that
        sees no image: whatever its row of the mask, attention adds nothing to it. The MLP works on it all the same.
        """
        attended = self.attention(self.attention_norm(x), keys, values, mask)
        attended = torch.where(sees, attended, torch.zeros_like(attended))
        x = x + torch.tanh(self.attention_gate) * attended
        return x + torch.tanh(self.mlp_gate) * self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]
