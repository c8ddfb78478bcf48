"""The resampler beside transformers' Idefics, and beside the paper's figure 5 written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from transom.models.layers import ACTIVATIONS, FeedForward
from transom.models.resampler import Resampler, ResamplerConfig

WORST = 1e-5
B, P, E, H, D, N = 3, 11, 20, 3, 7, 5
MLP = 4 * E  # Idefics takes no other size
NEWER = (
    ("latents", "latents"),
    ("layer_norm.", "norm."),
    ("context_layer_norm", "context_norm"),
    ("latents_layer_norm", "latents_norm"),
    ("q_layer_norm", "q_norm"),
    ("k_layer_norm", "k_norm"),
    ("output_proj", "out_proj"),
)


def idefics(depth: int, qk_layer_norms: bool) -> IdeficsPerceiverResampler:
    """Return transformers' resampler with random weights."""
    config = IdeficsConfig(
        vision_config={"embed_dim": E}, perceiver_config={"qk_layer_norms_perceiver": qk_layer_norms}
    )
    theirs = IdeficsPerceiverResampler(config, E, depth, H, D, N).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.normal_(std=0.4)
    return theirs


def our_name(name: str) -> str:
    """Return our name of a weight of transformers' resampler."""
    if name.startswith("blocks."):
        _, block, part, rest = name.split(".", 3)
        parts = {"ln.": "mlp_norm.", "fc.": "mlp.up_proj.", "c_proj.": "mlp.down_proj."}
        if part == "1":
            start, end = rest.split(".")
            return f"blocks.{block}.{parts[start + '.']}{end}"
        for theirs, ours in NEWER[2:]:
            rest = rest.replace(theirs, ours)
        return f"blocks.{block}.attention.{rest}"
    return name.replace("layer_norm.", "norm.")


def with_weights_of(theirs: Any, config: ResamplerConfig) -> Resampler:
    ours = Resampler(E, config).eval().requires_grad_(False)
    ours.load_state_dict({our_name(name): tensor for name, tensor in theirs.state_dict().items()})
    return ours


@pytest.mark.parametrize("qk_layer_norms", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_equals_idefics(depth: int, qk_layer_norms: bool) -> None:
    torch.manual_seed(depth)
    theirs = idefics(depth, qk_layer_norms)
    ours = with_weights_of(theirs, ResamplerConfig(N, depth, H, D, MLP, "relu", qk_layer_norms))
    context = torch.randn(B, P, E)
    found, expected = ours(context), theirs(context)
    worst = float((found - expected).abs().max() / expected.abs().max())
    print(f"depth {depth}, qk_layer_norms {qk_layer_norms}: worst {worst:.1e} of the largest")
    assert worst <= WORST


def test_another_activation_is_not_idefics() -> None:
    """The comparison sees the setting: squared ReLU instead of its ReLU."""
    torch.manual_seed(0)
    theirs = idefics(1, False)
    context = torch.randn(B, P, E)
    found = with_weights_of(theirs, ResamplerConfig(N, 1, H, D, MLP, "relu2"))(context)
    assert (found - theirs(context)).abs().max() > 0.01


@pytest.fixture(scope="module")
def model() -> Resampler:
    torch.manual_seed(3)
    made = Resampler(E, ResamplerConfig(N, 2, H, D, 30)).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.4)
    return made


def test_latents_read_the_image_and_each_other(model: Resampler) -> None:
    """Figure 5: keys and values are those of the image's rows and of the latents, queries those of the latents."""
    torch.manual_seed(1)
    attention = model.blocks[0].attention
    context, latents = torch.randn(1, P, E), torch.randn(1, N, E)
    rows = torch.cat((attention.context_norm(context), attention.latents_norm(latents)), 1)[0]

    def heads(project: Any, x: Tensor) -> Tensor:
        return project(x).reshape(-1, H, D)  # type: ignore[no-any-return]

    q, k, v = heads(attention.q_proj, rows[P:]), heads(attention.k_proj, rows), heads(attention.v_proj, rows)
    weights = (torch.einsum("nhd,mhd->hnm", q, k) / D**0.5).softmax(-1)  # (H, N, P + N)
    expected = attention.out_proj(torch.einsum("hnm,mhd->nhd", weights, v).reshape(N, H * D))
    torch.testing.assert_close(attention(context, latents)[0], expected)


def test_an_image_does_not_depend_on_the_others(model: Resampler) -> None:
    torch.manual_seed(2)
    context = torch.randn(B, P, E)
    together = model(context)
    assert together.shape == (B, N, E)
    for row in range(B):
        torch.testing.assert_close(model(context[row : row + 1])[0], together[row])


def test_the_order_of_an_images_rows_does_not_matter(model: Resampler) -> None:
    """Nothing here knows where a row stands: positions are the vision encoder's."""
    torch.manual_seed(2)
    context = torch.randn(1, P, E)
    torch.testing.assert_close(model(context.flip(1)), model(context), rtol=1e-4, atol=1e-5)


def test_squared_relu() -> None:
    """So et al., section 3.1, in numbers."""
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert ACTIVATIONS["relu2"](x).tolist() == [0.0, 0.0, 0.25, 9.0]


def test_a_feed_forward_is_gated_or_not() -> None:
    """Of one channel: down * relu(up * x), or down * (relu(gate * x) * up * x)."""
    x = torch.tensor([[2.0]])
    for gated, expected in ((False, 5 * 6.0), (True, 5 * (14.0 * 6.0))):
        layer = FeedForward(1, 1, "relu", gated=gated).requires_grad_(False)
        layer.up_proj.weight.fill_(3)
        layer.down_proj.weight.fill_(5)
        if layer.gate_proj is not None:
            layer.gate_proj.weight.fill_(7)
        assert layer(x).item() == expected
        assert all(not name.endswith("bias") for name, _ in layer.named_parameters())
