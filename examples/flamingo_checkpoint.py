"""The shape of the reference Flamingo, and the files of its checkpoint folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from digit_dialogues import CAPTION, CONTEXT, END, END_ID, IMAGE, IMAGE_ID, QUESTION
from flamingo_language import text_config, text_config_json
from flamingo_vision import CONFIG as VISION
from flamingo_vision import CONFIG_JSON as VISION_JSON
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from train_vit_digits import PREPROCESSOR as PREPROCESSOR_OF_VIT

from transom.calib.digit_compositions import CANVAS
from transom.models.flamingo_config import FlamingoConfig
from transom.models.gated_cross_attention import CrossAttentionConfig
from transom.models.resampler import ResamplerConfig

RESAMPLER = ResamplerConfig(num_latents=8, depth=2, num_heads=4, head_dim=16, intermediate_size=128)
CROSS_ATTENTION = CrossAttentionConfig(num_heads=4, head_dim=16, intermediate_size=128)
EVERY = 2  # blocks of the language model, of which one has cross-attention in front of it
MAX_IMAGES = 8
GENERATION = {
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "max_new_tokens": 12,  # a caption and its end are 8
    "pad_token_id": END_ID,
}
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": END,
    "eos_token": END,
    "image_token": IMAGE,
    "model_max_length": CONTEXT,
    "pad_token": END,
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": END,
}
PREPROCESSOR = {**PREPROCESSOR_OF_VIT, "size": {"height": CANVAS, "width": CANVAS}}


def flamingo_config(vocabulary: int) -> FlamingoConfig:
    """The whole model's shape; ``vocabulary`` is the tokenizer's size."""
    return FlamingoConfig(
        text_config=text_config(vocabulary),
        vision_config=VISION,
        resampler_config=RESAMPLER,
        cross_attention_config=CROSS_ATTENTION,
        image_token_id=IMAGE_ID,
        cross_attention_every_n_layers=EVERY,
        max_images=MAX_IMAGES,
        question_template=QUESTION,
        caption_template=CAPTION,
        example_separator=END,
    )


def config_json(config: FlamingoConfig) -> dict[str, object]:
    """Return config.json."""
    return {
        "architectures": ["FlamingoForConditionalGeneration"],
        "model_type": "flamingo",
        **asdict(config),
        "text_config": text_config_json(config.text_config),
        "vision_config": VISION_JSON,
    }


def digest(module: nn.Module) -> str:
    """SHA-256 over the names and the FP16 weights of a module, in order of the names."""
    total = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        total.update(name.encode() + weight.half().numpy().tobytes())
    return total.hexdigest()


def save(model: nn.Module, config: FlamingoConfig, tokenizer: Tokenizer, folder: Path, frozen: dict[str, str]) -> None:
    """Write the checkpoint, its weights in FP16; ``frozen`` has the digests of both models before stage 3."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.model.save(str(folder))
    files = {
        "config.json": config_json(config),
        "frozen.json": frozen,
        "generation_config.json": GENERATION,
        "preprocessor_config.json": PREPROCESSOR,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
