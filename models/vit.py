"""ViT (Dosovitskiy et al., 2020, arXiv:2010.11929): image patches through a pre-norm encoder.

Shape letters as in attention.py; C channels, P patches, S = P + 1 with the class token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transom.models.attention import Attention
from transom.models.family import Family, Source, config_fields, label_count
from transom.models.layers import ACTIVATIONS, Dense
from transom.models.patches import Size, grid, require_patch, resized_positions, size_pair
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec


@dataclass(frozen=True)
class ViTConfig:
    """ViT-B/16 at 224 pixels by default; names as in transformers' config.json, sizes as (height, width)."""

    image_size: tuple[int, int] = (224, 224)
    trained_image_size: tuple[int, int] = (224, 224)  # of the stored position embeddings
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    num_labels: int = 2
    pooler: bool = False
    pooler_output_size: int = 768
    pooler_act: str = "tanh"

    @property
    def grid(self) -> Size:
        """The rows and columns of patches."""
        return grid(self.image_size, self.patch_size)

    @property
    def trained_grid(self) -> Size:
        """The rows and columns that the stored position embeddings are of."""
        return grid(self.trained_image_size, self.patch_size)


class Embeddings(nn.Module):
    """Patches by a strided convolution, the class token in front, learned positions added: equation 1."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        E, (rows, columns) = config.hidden_size, config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, E))
        self.position_embeddings = nn.Parameter(torch.zeros(1, rows * columns + 1, E))
        projection = nn.Conv2d(config.num_channels, E, kernel_size=config.patch_size, stride=config.patch_size)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (B, P, E)
        cls = self.cls_token.expand(pixel_values.shape[0], -1, -1)  # (B, 1, E)
        return torch.cat((cls, patches), dim=1) + self.position_embeddings  # (B, S, E)

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Return the embedding of each patch: (B, E, rows, columns)."""
        return self.patch_embeddings["projection"](pixel_values)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Attention and its output projection; the parts are called ``attention`` and ``output`` in checkpoints."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = Attention(config.hidden_size, config.num_attention_heads, bias=config.qkv_bias)
        self.output = Dense(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm: x + Attention(LayerNorm(x)), then x + FeedForward(LayerNorm(x)): equations 2 and 3."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.output = Dense(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(self.intermediate(self.layernorm_after(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class ViT(nn.Module):
    """The encoder and, for classification, a linear head on the class token.

    ``forward(pixel_values)``, float32 (B, C, height, width), returns the outputs of ``graph`` in order:
    ``logits`` (B, L) or ``pooler_output`` (B, E) where there is one, then ``last_hidden_state`` (B, S, E).
    """

    def __init__(self, config: ViTConfig, task: str) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = Dense(config.hidden_size, config.pooler_output_size, config.pooler_act) if config.pooler else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if task == "image-classification" else None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        x = self.layernorm(self.encoder(self.embeddings(pixel_values)))
        if self.classifier is not None:
            return self.classifier(x[:, 0]), x
        return (x,) if self.pooler is None else (self.pooler(x[:, 0]), x)


def convert(name: str, stored: Tensor, config: ViTConfig) -> Tensor:
    """Resize learned positions (1, 1 + P, E) from the trained grid to the exported one; keep the rest."""
    if name != "embeddings.position_embeddings" or stored.ndim != 3:
        return stored
    return resized_positions(stored[0], config.trained_grid, config.grid)[None]


# transformers 5 renamed its modules but writes files with the older names, which are used here; both load.
NEWER_NAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)


def rename(name: str, config: ViTConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same but for prefixes; None for what ``task`` does not use."""
    name = name.removeprefix("vit.")
    for newer, older in NEWER_NAMES:
        name = re.sub(newer, older, name)
    other = "pooler." if task == "image-classification" else "classifier."
    if name.startswith((other, "decoder.")) or name == "embeddings.mask_token":  # of masked image modelling
        return None
    return name


SIZES = {
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
OTHERS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True, "pooler_act": "tanh"}


def config_from_source(source: Source) -> ViTConfig:
    """Read config.json; the image size is the checkpoint's unless the user asked for another."""
    config_json = source.config_json
    fields = config_fields(config_json, SIZES, OTHERS, ACTIVATIONS)
    trained = size_pair(config_json, "image_size", 224)
    config = ViTConfig(
        **fields,
        image_size=source.image_size or trained,
        trained_image_size=trained,
        patch_size=size_pair(config_json, "patch_size", 16),
        num_labels=label_count(config_json),
        pooler=source.task == "feature-extraction" and any("pooler." in name for name in source.names),
        pooler_output_size=size_pair(config_json, "pooler_output_size", fields["hidden_size"])[0],
    )
    require_patch(config.patch_size, {"image_size": trained, "image size asked for": config.image_size})
    return config


def graphs(config: ViTConfig, task: str) -> tuple[Graph, ...]:
    """Return the one graph, with transformers' tensor names; the image size is fixed at export."""
    rows, columns = config.grid
    pixels = TensorSpec("pixel_values", "float32", ("B", config.num_channels, *config.image_size))
    outputs = [TensorSpec("last_hidden_state", "float32", ("B", rows * columns + 1, config.hidden_size))]
    if task == "image-classification":
        outputs.insert(0, TensorSpec("logits", "float32", ("B", config.num_labels)))
    elif config.pooler:
        outputs.insert(0, TensorSpec("pooler_output", "float32", ("B", config.pooler_output_size)))
    return (Graph("model", (pixels,), tuple(outputs)),)


def axes(config: ViTConfig) -> dict[str, Axis]:
    """Return the bounds of B."""
    return {"B": Axis(1, 1, 16)}


FAMILY = Family(
    name="vit",
    model_types=("vit",),
    prefix="vit.",
    unprefixed_heads=("classifier.",),
    architectures={"ViTModel": "feature-extraction", "ViTForImageClassification": "image-classification"},
    tasks=("image-classification", "feature-extraction"),
    config=config_from_source,
    build=ViT,
    rename=rename,
    convert=convert,
    graphs=graphs,
    axes=axes,
)
