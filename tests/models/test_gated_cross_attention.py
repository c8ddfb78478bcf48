"""Gated cross-attention beside transformers' Idefics, and what its mask, gates and groups promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from transom.models.gated_cross_attention import CrossAttentionConfig, GatedCrossAttention

WORST = 1e-5
B, S, N, IMAGES = 4, 7, 5, 3
TEXT, VISION, H, MLP = 24, 18, 3, 33
OUR_NAMES = {
    "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "mlp_norm.",
    "cross_attn.q_layer_norm.": "attention.q_norm.",
    "cross_attn.k_layer_norm.": "attention.k_norm.",
    "cross_attn.o_proj.": "attention.out_proj.",
    "cross_attn.": "attention.",
    "alpha_cross_attn": "attention_gate",
    "alpha_dense": "mlp_gate",
}


def block(seed: int = 0, **settings: Any) -> GatedCrossAttention:
    """Return a block with random weights."""
    torch.manual_seed(seed)
    config = CrossAttentionConfig(**{"num_heads": H, "head_dim": 8, "intermediate_size": MLP, **settings})
    made = GatedCrossAttention(TEXT, VISION, config).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.4)
    return made


def read(made: GatedCrossAttention, x: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
    """Let ``x`` (B, S, T) read ``latents`` (G, M, V) where ``mask`` (G, 1, K * S, M) allows any at all."""
    sees = mask.any(-1).reshape(*x.shape[:2], 1)
    return made(x, *made.attention.keys_values(latents), mask | ~mask.any(-1, keepdim=True), sees)  # type: ignore[no-any-return]


def some_images(seed: int) -> Tensor:
    """Return bool (B, S, IMAGES), which images a token sees: none, one, or several; each occurs."""
    seen = torch.rand(B, S, IMAGES, generator=torch.Generator().manual_seed(seed)) < 0.4
    counts = set(seen.sum(-1).flatten().tolist())
    assert {0, 1, 2} <= counts
    return seen


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("qk_layer_norms", [False, True])
@pytest.mark.parametrize("alpha_type", ["float", "vector"])
def test_equals_idefics(alpha_type: str, qk_layer_norms: bool, eps: float) -> None:
    """With its mask, in which a token may see several images or none, and its gate of tokens that see none."""
    torch.manual_seed(1)
    config = IdeficsConfig(
        hidden_size=TEXT,
        num_attention_heads=H,
        intermediate_size=MLP,
        rms_norm_eps=eps,
        alpha_type=alpha_type,
        qk_layer_norms=qk_layer_norms,
        vision_config={"embed_dim": VISION},
        attn_implementation="eager",
    )
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.normal_(std=0.4)
    ours = block(
        norm="rms_norm", mlp="gated", hidden_act="silu", gate=alpha_type, qk_layer_norms=qk_layer_norms, norm_eps=eps
    )
    ours.load_state_dict(
        {our_name(name): tensor.reshape(shape_of(tensor)) for name, tensor in theirs.state_dict().items()}
    )

    x, latents, seen = torch.randn(B, S, TEXT), torch.randn(B, IMAGES * N, VISION), some_images(2)
    mask = seen[:, None].repeat_interleave(N, dim=-1)  # (B, 1, S, IMAGES * N)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)  # as IdeficsModel.forward makes both
    gate = (additive == 0.0).any(dim=-1).float().squeeze(1)
    expected = theirs(x, image_hidden_states=latents, image_attention_mask=additive, cross_attention_gate=gate)
    found = read(ours, x, latents, mask)
    worst = float((found - expected).abs().max() / expected.abs().max())
    print(f"{alpha_type}, qk_layer_norms {qk_layer_norms}, eps {eps}: worst {worst:.1e} of the largest")
    assert worst <= WORST


def our_name(name: str) -> str:
    """Return our name of a weight of transformers' block."""
    for theirs, ours in OUR_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return our shape: transformers' gates of a number per channel are (1, 1, T)."""
    return (-1,) if tensor.ndim == 3 else tuple(tensor.shape)


SETTINGS = [
    {"norm": norm, "mlp": mlp, "gate": gate, "qk_layer_norms": qk, "hidden_act": act}
    for norm, mlp, gate, qk, act in (
        ("layer_norm", "dense", "float", False, "relu2"),
        ("layer_norm", "gated", "vector", True, "gelu"),
        ("rms_norm", "dense", "vector", False, "relu"),
        ("rms_norm", "gated", "float", True, "silu"),
    )
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_closed_gates_change_nothing(settings: dict[str, Any]) -> None:
    made = block(**settings)
    made.attention_gate.zero_()
    made.mlp_gate.zero_()
    assert made.attention_gate.numel() == made.mlp_gate.numel() == (TEXT if settings["gate"] == "vector" else 1)
    x, latents = torch.randn(B, S, TEXT), torch.randn(B, 2 * N, VISION)
    assert torch.equal(read(made, x, latents, torch.ones(B, 1, S, 2 * N, dtype=torch.bool)), x)


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_gate_opens_its_half(settings: dict[str, Any]) -> None:
    """With the MLP's gate closed what is added is tanh(gate) times the attention; a channel has its own in a vector."""
    made = block(**settings)
    made.mlp_gate.zero_()
    x, latents = torch.randn(B, S, TEXT), torch.randn(B, N, VISION)
    mask = torch.ones(B, 1, S, N, dtype=torch.bool)
    attended = made.attention(made.attention_norm(x), *made.attention.keys_values(latents), mask)
    torch.testing.assert_close(read(made, x, latents, mask) - x, torch.tanh(made.attention_gate) * attended)
    made.attention_gate.zero_()
    made.mlp_gate.fill_(0.5)
    added = torch.tanh(torch.tensor(0.5)) * made.mlp(made.mlp_norm(x))
    torch.testing.assert_close(read(made, x, latents, mask) - x, added)


def test_attention_in_numbers() -> None:
    """Softmax of the products over sqrt(D), head by head, over the columns that a token sees."""
    made = block().attention
    x, latents = torch.randn(1, S, TEXT), torch.randn(1, N, VISION)
    mask = torch.rand(1, 1, S, N) < 0.5
    mask[..., 0] = True
    q, k, v = made.q_proj(x)[0], made.k_proj(latents)[0], made.v_proj(latents)[0]
    found = []
    for head in range(H):
        part = slice(8 * head, 8 * head + 8)
        products = (q[:, part] @ k[:, part].T / 8**0.5).masked_fill(~mask[0, 0], float("-inf"))
        found.append(products.softmax(-1) @ v[:, part])
    expected = made.out_proj(torch.cat(found, dim=1))
    torch.testing.assert_close(made(x, *made.keys_values(latents), mask)[0], expected)


def test_a_token_that_sees_nothing_gets_its_mlp_alone() -> None:
    made = block()
    x, latents = torch.randn(B, S, TEXT), torch.randn(B, N, VISION)
    none = torch.zeros(B, 1, S, N, dtype=torch.bool)
    found = read(made, x, latents, none)
    assert torch.equal(found, read(made, x, 100 * latents, none))
    assert torch.equal(found, x + torch.tanh(made.mlp_gate) * made.mlp(made.mlp_norm(x)))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_of_a_group_share_its_images(rows: int) -> None:
    """K rows of one group give what each gives with the images to itself."""
    made = block(qk_layer_norms=True)
    groups = B // rows
    x, latents = torch.randn(B, S, TEXT), torch.randn(groups, IMAGES * N, VISION)
    mask = some_images(5)[:, None].repeat_interleave(N, dim=-1)
    alone = read(made, x, latents.repeat_interleave(rows, dim=0), mask)
    shared = read(made, x, latents, mask.reshape(groups, 1, rows * S, IMAGES * N))
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    if rows < B:  # the groups are not taken for each other
        swapped = read(made, x, latents.flip(0), mask.reshape(groups, 1, rows * S, IMAGES * N))
        assert (swapped - alone).abs().max() > 0.01


def test_no_linear_layer_has_a_bias() -> None:
    with torch.device("meta"):
        made = GatedCrossAttention(TEXT, VISION, CrossAttentionConfig(mlp="gated"))
    names = [name for name, module in made.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(names) == 7
    assert not any(module.bias is not None for module in made.modules() if isinstance(module, torch.nn.Linear))
