"""Read config.json of Swin and Swin v2: what both have, and the stages that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transom.models.family import MAX_LAYERS, MAX_SIZE, Source, config_fields, label_count
from transom.models.layers import ACTIVATIONS
from transom.models.patches import Size, size_pair
from transom.models.windows import Windows
from transom.runtime.errors import CheckpointError

MAX_STAGES = 16  # a map of 2^16 patches a side is one token then
MAX_MASK = 2**29  # numbers in a layer's mask, 2 GiB; those of published checkpoints have at most 2^25


@dataclass(frozen=True)
class Stage:
    """A stage of layers over a map of one size."""

    size: Size  # rows and columns of tokens
    width: int
    heads: int
    depth: int
    side: int  # of its windows
    shift: int  # of every second layer; 0 where the map is one window
    pretrained_side: int = 0  # of the windows that the position biases were trained with; 0 for the same

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]

    def windows(self, shifted: bool) -> Windows:
        """Return the windows of a layer."""
        return Windows(self.size, self.side, self.shift if shifted else 0)


@dataclass(frozen=True)
class SwinConfig:
    """Swin-T at 224 pixels by default; names as in transformers' config.json, sizes as (height, width)."""

    image_size: Size = (224, 224)
    trained_image_size: Size = (224, 224)  # of the stored position embeddings, and of Swin v2's windows
    patch_size: Size = (4, 4)
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    layer_norm_eps: float = 1e-5
    num_labels: int = 2

    @property
    def width(self) -> int:
        """Width of the last stage."""
        return self.embed_dim << (len(self.depths) - 1)

    @property
    def sizes(self) -> list[Size]:
        """Rows and columns of each stage's map: patches, padded to whole ones, then halved and rounded up."""
        rows, columns = (-(-size // side) for size, side in zip(self.image_size, self.patch_size, strict=True))
        return [(-(-rows // 2**i), -(-columns // 2**i)) for i in range(len(self.depths))]

    @property
    def stages(self) -> list[Stage]:
        """Return the stages; a map of one window's side is not shifted."""
        return [
            self.stage(i, side, 0 if min(self.sizes[i]) <= side else side // 2)
            for i, side in enumerate([self.window_size] * len(self.depths))
        ]

    def stage(self, index: int, side: int, shift: int) -> Stage:
        """Return the stage of that index with windows of ``side``."""
        width = self.embed_dim * 2**index
        return Stage(self.sizes[index], width, self.num_heads[index], self.depths[index], side, shift)


SIZES = {"num_channels": 3, "embed_dim": 96, "window_size": 7}
OTHERS = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "qkv_bias": True, "use_absolute_embeddings": False}


def swin_fields(source: Source) -> dict[str, Any]:
    """Return the fields of SwinConfig; CheckpointError for what cannot be one."""
    config_json = source.config_json
    if any(name.endswith("attn.qkv.weight") for name in source.names):
        raise CheckpointError(
            "the weights have timm's or Microsoft's names and packed projections (attn.qkv.weight), of which "
            "transformers has three. Convert the checkpoint with the script convert_swin_timm_to_pytorch.py or "
            "convert_swinv2_timm_to_pytorch.py of transformers."
        )
    fields = config_fields(config_json, SIZES, OTHERS, ACTIVATIONS, heads=())
    trained = size_pair(config_json, "image_size", 224)
    depths = per_stage(config_json, "depths", (2, 2, 6, 2))
    heads = per_stage(config_json, "num_heads", (3, 6, 12, 24))
    if len(depths) > len(heads) or sum(depths) > MAX_LAYERS:
        raise CheckpointError(
            f"config.json: depths are {list(depths)} and num_heads {list(heads)}; expected one of each for every "
            f"stage, and at most {MAX_LAYERS} layers in all. Correct these fields."
        )
    heads = heads[: len(depths)]  # depths count the stages: transformers writes its four defaults beside two depths
    divided = [(fields["embed_dim"] * 2**index, count) for index, count in enumerate(heads)]
    for width, count in divided:
        if width % count:
            raise CheckpointError(
                f"config.json: a stage of width {width} has {count} heads, which do not divide it. Correct embed_dim "
                "or num_heads."
            )
    ratio = config_json.get("mlp_ratio", 4.0)
    if type(ratio) not in (int, float) or not 1 <= ratio * fields["embed_dim"] <= MAX_SIZE:
        raise CheckpointError(
            f"config.json: mlp_ratio is {ratio!r}, expected a number by which a width of {fields['embed_dim']} gives "
            "that of the feed-forward layers. Correct it."
        )
    return {
        **fields,
        "image_size": source.image_size or trained,
        "trained_image_size": trained,
        "patch_size": size_pair(config_json, "patch_size", 4),
        "depths": depths,
        "num_heads": heads,
        "mlp_ratio": float(ratio),
        "num_labels": label_count(config_json),
    }


def require_masks(config: SwinConfig) -> None:
    """Raise CheckpointError where a layer's mask, of all pairs of a window's tokens for each head, is too large."""
    for index, stage in enumerate(config.stages):
        apart = stage.shift > 0 or stage.heads == 1  # see WindowAttention: a mask for each window
        numbers = (stage.windows(shifted=True).count if apart else 1) * stage.heads * stage.side**4
        if numbers > MAX_MASK:
            raise CheckpointError(
                f"windows of {stage.side} x {stage.side} tokens at the image size {config.image_size} give stage "
                f"{index + 1} masks of {numbers} numbers, expected at most {MAX_MASK}. Ask for a smaller --image-size, "
                "or correct window_size in config.json."
            )


def per_stage(config_json: Mapping[str, Any], name: str, default: Iterable[int], least: int = 1) -> tuple[int, ...]:
    """Parse one integer of at least ``least`` for each stage."""
    value: Any = config_json.get(name, default)
    valid = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_STAGES
    if not valid or not all(type(count) is int and least <= count <= MAX_SIZE for count in value):
        raise CheckpointError(
            f"config.json: {name} is {value!r}, expected 1..{MAX_STAGES} integers of at least {least}. Correct it."
        )
    return tuple(value)
