"""CLIP (Radford et al., 2021, arXiv:2103.00020): a tower for images and one for texts, with a shared space.

Two graphs: ``image`` and ``text`` each end in vectors of unit length, whose products times ``logit_scale`` are
the logits of transformers' CLIPModel.

Shape letters as in attention.py; C channels, P patches, S = P + 1 with the class token in the image's tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.models.attention import SelfAttention, causal_key_mask
from transom.models.cache import select_positions
from transom.models.family import Family, Source, config_fields
from transom.models.layers import ACTIVATIONS, UnitLength
from transom.models.patches import grid, require_patch, resized_positions, size_pair
from transom.runtime.errors import CheckpointError
from transom.runtime.graph_spec import Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

OLD_EOS = 2  # in configs until transformers 4.31, whatever the token's id: pooling then takes the largest id


@dataclass(frozen=True)
class TowerConfig:
    """Settings of both towers; the text tower of CLIP ViT-B/32 by default."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """Settings of the text tower; names as in transformers' config.json."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """Settings of the image tower; sizes as (height, width)."""

    image_size: tuple[int, int] = (224, 224)
    trained_image_size: tuple[int, int] = (224, 224)  # of the stored position embeddings
    patch_size: tuple[int, int] = (32, 32)
    num_channels: int = 3


@dataclass(frozen=True)
class CLIPConfig:
    """Settings of both towers, and the width of the shared space."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig(768, 3072, 12, 12)
    projection_dim: int = 512


class MLP(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """LayerNorm before each sublayer, residual around it."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextEmbeddings(nn.Module):
    """Tokens plus learned positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.token_embedding(input_ids)  # (B, S, E)
        return x + self.position_embedding.weight[: input_ids.shape[1]]


class TextModel(nn.Module):
    """A causal encoder; its output is that of the end-of-text token: section 2.4."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode ids and mask, int64 (B, S) each: (B, E)."""
        x = self.encoder(self.embeddings(input_ids), causal_key_mask(attention_mask))
        return self.final_layer_norm(select_positions(x, self.ends(input_ids)))[:, 0]  # type: ignore[no-any-return]

    def ends(self, input_ids: Tensor) -> Tensor:
        """Find the end of each text, int64 (B, 1): the first end-of-text token, or position 0 where there is none.

        For OLD_EOS at the first of the largest id, which is that token in CLIP's own vocabulary.
        """
        ids = input_ids.to(torch.int32)
        marked = ids if self.eos_token_id == OLD_EOS else (ids == self.eos_token_id).to(torch.int32)
        return marked.argmax(dim=1, keepdim=True)


class VisionEmbeddings(nn.Module):
    """Patches by a strided convolution, the class token in front, learned positions added."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        E, (rows, columns) = config.hidden_size, grid(config.image_size, config.patch_size)
        patch = config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(E))
        self.patch_embedding = nn.Conv2d(config.num_channels, E, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(rows * columns + 1, E)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, P, E)
        first = self.class_embedding.expand(pixel_values.shape[0], 1, -1)  # (B, 1, E)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight  # (B, S, E)


class VisionModel(nn.Module):
    """ViT with one more LayerNorm before its layers; its output is that of the class token: section 2.4."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # as checkpoints spell it
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, pixel_values: Tensor) -> Tensor:
        """Encode pixels, float32 (B, C, height, width), to what the last layer gives: (B, S, E)."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))  # type: ignore[no-any-return]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pixels, float32 (B, C, height, width): (B, E)."""
        return self.post_layernorm(self.hidden_states(pixel_values)[:, 0])  # type: ignore[no-any-return]


class CLIP(nn.Module):
    """Both towers, their projections, and the logarithm of the scale of the cosines."""

    def __init__(self, config: CLIPConfig, task: str) -> None:
        super().__init__()
        text, vision = config.text_config, config.vision_config
        self.text_model = TextModel(text)
        self.vision_model = VisionModel(vision)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))


class ImageTower(nn.Module):
    """``pixel_values`` (B, C, height, width) -> ``image_embeds``, float32 (B, projection_dim), unit length."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.unit_length = UnitLength()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self.unit_length(self.visual_projection(self.vision_model(pixel_values))),)


class TextTower(nn.Module):
    """``input_ids``, ``attention_mask``, int64 (B, S) -> ``text_embeds``, float32 (B, projection_dim), unit length."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.unit_length = UnitLength()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.unit_length(self.text_projection(self.text_model(input_ids, attention_mask))),)


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module behind each graph."""
    assert isinstance(model, CLIP)
    return {"image": ImageTower(model), "text": TextTower(model)}


MOST_SCALED = 80.0  # exp of more leaves float32


def options(model: nn.Module) -> dict[str, Any]:
    """Return ``logit_scale``, which multiplies the cosine of an image and a text: exp of the stored weight."""
    assert isinstance(model, CLIP)
    stored = float(model.logit_scale)
    if not abs(stored) <= MOST_SCALED:
        raise CheckpointError(
            f"the weight logit_scale is {stored:g}, expected within -{MOST_SCALED:g}..{MOST_SCALED:g} (CLIP's own end "
            "at 4.6052). Download the checkpoint again."
        )
    return {"logit_scale": math.exp(stored)}


def rename(name: str, config: CLIPConfig, task: str) -> str | None:
    """Return the module's name of a stored weight, the same; None for constants that older checkpoints store."""
    return None if name.endswith("embeddings.position_ids") else name


def convert(name: str, stored: Tensor, config: CLIPConfig) -> Tensor:
    """Resize the image tower's positions (1 + P, E) from the trained grid to the exported one; keep the rest."""
    if name == "logit_scale" and stored.numel() == 1:
        return stored.reshape(())
    if name != "vision_model.embeddings.position_embedding.weight":
        return stored
    return vision_positions(stored, config.vision_config)


def vision_positions(stored: Tensor, vision: VisionConfig) -> Tensor:
    """Resize the positions (1 + P, E) of an image's tower from the trained grid to the exported one."""
    old, new = (grid(size, vision.patch_size) for size in (vision.trained_image_size, vision.image_size))
    return resized_positions(stored, old, new)


SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
TEXT_SIZES = SIZES | {"vocab_size": 49408, "max_position_embeddings": 77}
VISION_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
}
VISION_SIDES = {"image_size": 224, "patch_size": 32}
OTHERS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def config_from_source(source: Source) -> CLIPConfig:
    """Read config.json; the image size is the checkpoint's unless the user asked for another."""
    config_json = source.config_json
    texts = tower(config_json, "text_config", TEXT_SIZES | OTHERS | {"eos_token_id": 49407})
    text = config_fields(texts, TEXT_SIZES, OTHERS, ACTIVATIONS, where="config.json: text_config")
    visions = tower(config_json, "vision_config", VISION_SIZES | VISION_SIDES | OTHERS)
    eos = texts.get("eos_token_id", 49407)
    if type(eos) is not int or not 0 <= eos < text["vocab_size"]:
        raise CheckpointError(
            f"config.json: text_config's eos_token_id is {eos!r}, expected a token in 0..{text['vocab_size'] - 1}."
        )
    both = config_fields(config_json, {"projection_dim": 512}, {}, ACTIVATIONS, heads=())
    vision = vision_config(visions, source.image_size)
    return CLIPConfig(TextConfig(**text, eos_token_id=eos), vision, both["projection_dim"])


def vision_config(fields: Mapping[str, Any], image_size: tuple[int, int] | None) -> VisionConfig:
    """Read the fields of an image's tower; the image size is theirs unless the user asked for another."""
    sizes = config_fields(fields, VISION_SIZES, OTHERS, ACTIVATIONS, where="config.json: vision_config")
    trained, patch = (size_pair(fields, name, default) for name, default in VISION_SIDES.items())
    size = image_size or trained
    require_patch(patch, {"image_size": trained, "image size asked for": size})
    return VisionConfig(**sizes, image_size=size, trained_image_size=trained, patch_size=patch)


def tower(config_json: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tower's fields. Where older configs repeat them as ``<name>_dict``, that wins, with its defaults.

    As transformers' CLIPConfig does in ``__post_init__``.
    """
    found: dict[str, Any] = {}
    for key, given in ((name, {}), (f"{name}_dict", defaults)):
        value = config_json.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: {key} is {value!r}, expected an object. Correct it.")
        found = {**found, **given, **value}
    return found


def graphs(config: CLIPConfig, task: str) -> tuple[Graph, ...]:
    """Return both graphs, with transformers' tensor names; the image size is fixed at export."""
    vision, projected = config.vision_config, ("B", config.projection_dim)
    pixels = TensorSpec("pixel_values", "float32", ("B", vision.num_channels, *vision.image_size))
    tokens = (
        TensorSpec("input_ids", "int64", ("B", "S"), exclusive_max=config.text_config.vocab_size),
        TensorSpec("attention_mask", "int64", ("B", "S"), default=1),
    )
    return (
        Graph("image", (pixels,), (TensorSpec("image_embeds", "float32", projected),)),
        Graph("text", tokens, (TensorSpec("text_embeds", "float32", projected),)),
    )


def marks(config: CLIPConfig) -> tuple[int, ...]:
    """Return the token that ends a text; OLD_EOS stands for the largest id, whatever it is."""
    end = config.text_config.eos_token_id
    return () if end == OLD_EOS else (end,)


def axes(config: CLIPConfig) -> dict[str, Axis]:
    """Return the bounds of B and S."""
    longest = config.text_config.max_position_embeddings
    return {"B": Axis(1, 1, 16), "S": Axis(1, min(16, longest), longest)}


FAMILY = Family(
    name="clip",
    model_types=("clip",),
    prefix="",
    architectures={"CLIPModel": "zero-shot-image-classification"},
    tasks=("zero-shot-image-classification",),
    config=config_from_source,
    build=CLIP,
    rename=rename,
    convert=convert,
    graphs=graphs,
    axes=axes,
    parts=parts,
    options=options,
    marks=marks,
)
