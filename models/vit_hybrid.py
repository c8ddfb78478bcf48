"""Hybrid ViT (Dosovitskiy et al., 2020, arXiv:2010.11929, section 3.1): ViT on the feature map of a ResNet.

The patches are cut out of BiT's feature map in place of the image: of one position each, as published. Checkpoints are
those of transformers 4's ``vit-hybrid``. Shape letters as in vit.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from transom.models import vit
from transom.models.bit import LAYER_TYPES, SAME, Bit, BitConfig, converted_weight, feature_map, norm_widths
from transom.models.family import MAX_LAYERS, Source, config_fields, label_count
from transom.models.layers import ACTIVATIONS
from transom.models.patches import Size, grid, require_patch, size_pair
from transom.runtime.errors import CheckpointError

# The backbone of a config.json that has none; transformers' own default is another, BitConfig's.
R50 = {"layer_type": "bottleneck", "depths": [3, 4, 9], "global_padding": "same", "embedding_dynamic_padding": True}
FEATURE_MAP = [1, 1024, 24, 24]  # batch, channels, rows, columns
BACKBONE = "embeddings.patch_embeddings.backbone."


@dataclass(frozen=True)
class ViTHybridConfig(vit.ViTConfig):
    """R50+ViT-B/16 by default. ``patch_size`` counts positions of the feature map of ``backbone``."""

    patch_size: Size = (1, 1)
    feature_map: Size = (14, 14)  # rows and columns that ``backbone`` makes of ``image_size``
    trained_feature_map: Size = (24, 24)  # of the stored position embeddings
    backbone: BitConfig = field(default_factory=BitConfig)

    @property
    def grid(self) -> Size:
        return grid(self.feature_map, self.patch_size)

    @property
    def trained_grid(self) -> Size:
        return grid(self.trained_feature_map, self.patch_size)


class Backbone(nn.Module):
    """The backbone under the name ``bit``, as checkpoints nest it."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.bit = Bit(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.bit(pixel_values)  # type: ignore[no-any-return]


class Embeddings(vit.Embeddings):
    """Patches of the backbone's feature map by a strided convolution; class token and positions as ViT's."""

    def __init__(self, config: ViTHybridConfig) -> None:
        super().__init__(config)
        channels, _, _ = feature_map(config.backbone, config.image_size)
        projection = nn.Conv2d(channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.patch_embeddings = nn.ModuleDict({"backbone": Backbone(config.backbone), "projection": projection})

    def patches(self, pixel_values: Tensor) -> Tensor:
        return super().patches(self.patch_embeddings["backbone"](pixel_values))


class ViTHybrid(vit.ViT):
    """ViT around the backbone, with the same inputs and outputs."""

    def __init__(self, config: ViTHybridConfig, task: str) -> None:
        super().__init__(config, task)
        self.embeddings = Embeddings(config)


def convert(name: str, stored: Tensor, config: ViTHybridConfig) -> Tensor:
    """Standardise the backbone's weights; resize positions as ViT does."""
    if name.startswith(BACKBONE):
        return converted_weight(stored)
    return vit.convert(name, stored, config)


def rename(name: str, config: ViTHybridConfig, task: str) -> str | None:
    """Rename as ViT does; None also for what lies behind the feature map: later stages, a last normalisation."""
    renamed = vit.rename(name, config, task)
    if renamed is None or not renamed.startswith(BACKBONE):
        return renamed
    part = renamed.removeprefix(f"{BACKBONE}bit.")
    if part.startswith("norm."):
        return None
    stage = part.removeprefix("encoder.stages.").split(".")[0]
    behind = part.startswith("encoder.stages.") and stage.isdecimal() and int(stage) >= config.backbone.stages
    return None if behind else renamed


def config_from_source(source: Source) -> ViTHybridConfig:
    """Read config.json and the backbone's part of it; image sizes as in ViT."""
    config_json = source.config_json
    for name in ("use_timm_backbone", "use_pretrained_backbone", "backbone"):
        if config_json.get(name):
            raise CheckpointError(
                f"config.json: {name} is {config_json[name]!r}, a backbone that lies elsewhere or is named otherwise; "
                "expected one of model_type 'bit' in backbone_config. Use a checkpoint with a backbone_config."
            )
    fields = config_fields(config_json, vit.SIZES, vit.OTHERS, ACTIVATIONS)
    trained = size_pair(config_json, "image_size", 224)
    backbone = backbone_config(config_json, fields["num_channels"])
    channels, *sides = stored_feature_map(config_json)
    image_size = source.image_size or trained
    made, wanted = (feature_map(backbone, size) for size in (trained, image_size))
    config = ViTHybridConfig(
        **{**fields, "pooler_act": "tanh"},  # the one that transformers writes into its code
        image_size=image_size,
        trained_image_size=trained,
        feature_map=wanted[1:],
        trained_feature_map=(sides[0], sides[1]),
        patch_size=size_pair(config_json, "patch_size", 1),
        num_labels=label_count(config_json),
        pooler=source.task == "feature-extraction" and any("pooler." in name for name in source.names),
        pooler_output_size=fields["hidden_size"],
        backbone=backbone,
    )
    if made != (channels, *sides):
        raise CheckpointError(
            f"config.json: backbone_featmap_shape has (channels, rows, columns) {(channels, *sides)}, but the backbone "
            f"makes {made} of an image of {trained}. Correct image_size, backbone_config or backbone_featmap_shape."
        )
    maps = {"feature map of image_size": made[1:], f"feature map of image size {image_size}": wanted[1:]}
    require_patch(config.patch_size, maps)
    return config


def stored_feature_map(config_json: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the channels, rows and columns of ``backbone_featmap_shape``, whose first number is a batch size."""
    value = config_json.get("backbone_featmap_shape", FEATURE_MAP)
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(map(is_size, value)):
        raise CheckpointError(
            f"config.json: backbone_featmap_shape is {value!r}, expected four positive integers: batch, channels, rows "
            "and columns. Correct it."
        )
    return value[1], value[2], value[3]


def is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= 2**20


BACKBONE_SIZES = {"embedding_size": 64, "num_groups": 32, "output_stride": 32, "width_factor": 1, "num_channels": 3}
BACKBONE_OTHERS = {"hidden_act": "relu", "embedding_dynamic_padding": False}
HIDDEN_SIZES, DEPTHS = [256, 512, 1024, 2048], [3, 4, 6, 3]


def backbone_config(config_json: Mapping[str, Any], num_channels: int) -> BitConfig:
    """Read ``backbone_config``; CheckpointError for a backbone that is not BiT, or that no transformers would run."""
    stored = config_json.get("backbone_config")
    where = "config.json: backbone_config"
    if stored is None:
        stored = R50
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{where} is {stored!r:.80}, expected an object. Correct it.")
    kind = stored.get("model_type", "bit")
    if kind != "bit":
        raise CheckpointError(
            f"{where} has model_type {kind!r}; a hybrid ViT is defined on 'bit' alone, and another backbone has other "
            "layers and normalisations. Use a checkpoint with such a backbone."
        )
    fields = config_fields(stored, BACKBONE_SIZES, BACKBONE_OTHERS, ACTIVATIONS, heads=(), where=where)
    hidden_sizes = sizes(stored, "hidden_sizes", HIDDEN_SIZES, where)
    depths = sizes(stored, "depths", DEPTHS, where)
    layer_type = stored.get("layer_type", LAYER_TYPES[0])
    if layer_type not in LAYER_TYPES:
        raise CheckpointError(f"{where}: layer_type is {layer_type!r}, expected one of {', '.join(LAYER_TYPES)}.")
    padding = stored.get("global_padding")
    if padding is not None and str(padding).upper() != SAME:
        raise CheckpointError(
            f"{where}: global_padding is {padding!r}; defined are null and 'same'. Without padding a 3x3 convolution "
            "returns less than its shortcut, and the two cannot be added. Use another checkpoint."
        )
    if fields["num_channels"] != num_channels:
        raise CheckpointError(
            f"{where} has num_channels {fields['num_channels']}, config.json has {num_channels}. Correct these fields."
        )
    config = BitConfig(
        **fields,
        hidden_sizes=hidden_sizes,
        depths=depths,
        layer_type=layer_type,
        global_padding=None if padding is None else SAME,
        stages=min(computed_stages(stored, len(depths), where), len(hidden_sizes)),
    )
    odd = [width for width in norm_widths(config) if width % config.num_groups]
    if odd:
        raise CheckpointError(
            f"{where}: num_groups {config.num_groups} does not divide the width {odd[0]}, which is to be normalised in "
            "groups. Correct num_groups, or the widths."
        )
    return config


def sizes(stored: Mapping[str, Any], name: str, default: list[int], where: str) -> tuple[int, ...]:
    """Return a list of sizes of the backbone's stages, of at most MAX_LAYERS in all."""
    value = stored.get(name, default)
    if not isinstance(value, list | tuple) or not value or len(value) > MAX_LAYERS or not all(map(is_size, value)):
        raise CheckpointError(f"{where}: {name} is {value!r:.80}, expected a list of positive integers. Correct it.")
    if name == "depths" and sum(value) > MAX_LAYERS:
        raise CheckpointError(f"{where}: depths are {sum(value)} layers, expected at most {MAX_LAYERS}. Correct them.")
    return tuple(value)


def computed_stages(stored: Mapping[str, Any], stages: int, where: str) -> int:
    """Return the number of stages up to the feature map that is read: the last of ``out_features``."""
    names = ["stem", *(f"stage{number}" for number in range(1, stages + 1))]
    features, indices = stored.get("out_features"), stored.get("out_indices")
    if features is None and isinstance(indices, list) and all(type(index) is int for index in indices):
        features = [names[index] for index in indices if -len(names) <= index < len(names)] or indices
    if features is None:
        return stages
    if not isinstance(features, list) or not features or not all(feature in names for feature in features):
        raise CheckpointError(f"{where}: out_features is {features!r:.80}, expected some of {', '.join(names)}.")
    return max(map(names.index, features))


FAMILY = replace(
    vit.FAMILY,
    name="vit_hybrid",
    model_types=("vit-hybrid",),
    architectures={"ViTHybridModel": "feature-extraction", "ViTHybridForImageClassification": "image-classification"},
    config=config_from_source,
    build=ViTHybrid,
    rename=rename,
    convert=convert,
)
