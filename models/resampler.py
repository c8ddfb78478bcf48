"""Flamingo's Perceiver resampler (Alayrac et al., 2022, arXiv:2204.14198, section 2.1 and figure 5).

A few learned latents read what a vision encoder gives of one image, of any size, and themselves; they are all that a
language model sees of it.

transformers' Idefics has the same blocks, and the settings here cover it. Where it differs from the paper: its MLP has
ReLU, the paper's squared ReLU ("relu2", the default here); it may normalise queries and keys (``qk_layer_norms``); it
has norms in front of attention and MLP and one at the end, and no linear layer has a bias, of which the paper's figure
shows nothing: done here as there. The paper adds learned embeddings of time to the frames of a video; an image is one
frame, and they are left out, as in Idefics.

Shape letters as in attention.py; N latents, P rows of the vision encoder, E their width, which the latents have too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transom.models.attention import attend, split_heads
from transom.models.layers import FeedForward


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of transformers' IdeficsPerceiverConfig by default, the activation of the paper."""

    num_latents: int = 64
    depth: int = 6
    num_heads: int = 16
    head_dim: int = 96
    intermediate_size: int = 3072
    activation: str = "relu2"
    qk_layer_norms: bool = False
    layer_norm_eps: float = 1e-5


class ResamplerAttention(nn.Module):
    """The latents' attention over the image's rows and the latents themselves, one sequence of P + N keys."""

    def __init__(self, width: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner, eps = config.num_heads * config.head_dim, config.layer_norm_eps
        self.context_norm = nn.LayerNorm(width, eps=eps)
        self.latents_norm = nn.LayerNorm(width, eps=eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (
            nn.LayerNorm(config.head_dim, eps=eps) if config.qk_layer_norms else nn.Identity() for _ in range(2)
        )
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """Attend from ``latents`` (B, N, E) over ``context`` (B, P, E) and ``latents``: (B, N, E)."""
        latents = self.latents_norm(latents)
        rows = torch.cat((self.context_norm(context), latents), dim=1)  # (B, P + N, E)
        q = self.q_norm(split_heads(self.q_proj(latents), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(rows), self.num_heads))
        v = split_heads(self.v_proj(rows), self.num_heads)
        return self.out_proj(attend(q, k, v))  # type: ignore[no-any-return]


class ResamplerBlock(nn.Module):
    """Attention and MLP of the latents, each after a LayerNorm and with a residual around it."""

    def __init__(self, width: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.attention = ResamplerAttention(width, config)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.activation)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = latents + self.attention(context, latents)
        return latents + self.mlp(self.mlp_norm(latents))  # type: ignore[no-any-return]


class Resampler(nn.Module):
    """Blocks that turn what a vision encoder gives of an image into N latents."""

    def __init__(self, width: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(config.num_latents, width))
        self.blocks = nn.ModuleList(ResamplerBlock(width, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, context: Tensor) -> Tensor:
        """Read ``context`` float32 (B, P, E), one image a row: (B, N, E)."""
        latents = self.latents.expand(context.shape[0], -1, -1)
        for block in self.blocks:
            latents = block(context, latents)
        return self.norm(latents)  # type: ignore[no-any-return]
