"""A hybrid ViT put together of transformers' BiT and ViT, in the layout of ``vit-hybrid`` checkpoints.

transformers 5 defines the halves and no longer the whole. To its ViT the feature map of the backbone is an image of
many channels: its patch embedding, class token, positions and layers are those of the hybrid.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PLACE = "embeddings.patch_embeddings.backbone."


class HybridViT(nn.Module):
    """BitBackbone, and the ViT of an ``architecture``'s head (ViTHybridForImageClassification, say) on its feature map.

    ``config`` is the content of config.json.
    """

    def __init__(self, architecture: str, config: dict[str, Any]) -> None:
        super().__init__()
        self.architecture, self.config = architecture, config
        self.backbone = transformers.BitBackbone(transformers.BitConfig(**config["backbone_config"])).eval()
        size = config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        with torch.no_grad():
            shape = self.feature_map(torch.zeros(1, config["num_channels"], height, width)).shape
        self.shape = list(shape)
        of_vit = {name: value for name, value in config.items() if name != "backbone_config"}
        of_vit |= {"image_size": self.shape[2:], "num_channels": self.shape[1]}
        head = getattr(transformers, architecture.replace("Hybrid", ""))
        self.vit = head(transformers.ViTConfig(**of_vit)).eval()

    def feature_map(self, pixel_values: Tensor) -> Tensor:
        """Return what the patches are cut out of: (B, C, rows, columns)."""
        feature_map: Tensor = self.backbone(pixel_values).feature_maps[-1]
        return feature_map

    def forward(self, pixel_values: Tensor) -> Any:
        """Return the outputs of transformers' ViT, positions interpolated where the map is of another size."""
        features = self.feature_map(pixel_values)
        return self.vit(features, interpolate_pos_encoding=list(features.shape[2:]) != self.shape[2:])

    @property
    def prefix(self) -> str:
        return "" if self.architecture == "ViTHybridModel" else "vit."

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors as transformers 4 wrote those of a ViTHybridModel."""
        self.vit.save_pretrained(folder)  # under the names that the hybrid has, too
        weights = load_file(folder / "model.safetensors")
        weights |= {f"{self.prefix}{PLACE}{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        described = {"model_type": "vit-hybrid", "architectures": [self.architecture]}
        described |= {"backbone_featmap_shape": self.shape, **self.config}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Read what ``save_pretrained`` wrote."""
        config = json.loads((folder / "config.json").read_text())
        model = cls(config["architectures"][0], config)
        weights = load_file(folder / "model.safetensors")
        place = f"{model.prefix}{PLACE}"
        ours = {name.removeprefix(place): tensor for name, tensor in weights.items() if name.startswith(place)}
        model.backbone.load_state_dict(ours)
        rest = {name: tensor for name, tensor in weights.items() if not name.startswith(place)}
        model.vit = type(model.vit).from_pretrained(None, config=model.vit.config, state_dict=rest)
        return model.eval()
