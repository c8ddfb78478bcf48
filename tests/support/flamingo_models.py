"""Write small random Flamingo checkpoints, with a word-level tokenizer and an image processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from image_processors import write_image_processor
from transom.models.family import Source
from transom.models.flamingo import Flamingo
from transom.models.flamingo_config import FlamingoConfig, config_from_source

IMAGE, END, UNKNOWN = "<image>", "<|endoftext|>", "<unk>"
WORDS = (
    *("Question:", "Answer:", "Caption:", "how", "many", "what", "is", "left", "right", "of", "the", "and", "now?"),
    *("zeros?", "ones?", "twos?", "threes?", "sevens?", "three?", "seven?", "none", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine", "a", "digits"),
)
VOCABULARY = {word: number for number, word in enumerate((END, IMAGE, UNKNOWN, *WORDS))}
TEXT: dict[str, Any] = {  # no size like another one
    "model_type": "gpt2",
    "vocab_size": len(VOCABULARY),
    "n_positions": 80,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 2,
    "n_inner": 40,
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "image_size": [20, 12],
    "patch_size": 4,
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 26,
}
CLIP: dict[str, Any] = {**VIT, "model_type": "clip_vision_model"}
RESAMPLER: dict[str, Any] = {"num_latents": 5, "depth": 2, "num_heads": 2, "head_dim": 7, "intermediate_size": 30}
CROSS_ATTENTION: dict[str, Any] = {"num_heads": 4, "head_dim": 8, "intermediate_size": 33}
CONFIG: dict[str, Any] = {
    "model_type": "flamingo",
    "architectures": ["FlamingoForConditionalGeneration"],
    "text_config": TEXT,
    "vision_config": VIT,
    "resampler_config": RESAMPLER,
    "cross_attention_config": CROSS_ATTENTION,
    "cross_attention_every_n_layers": 2,
    "image_token_id": VOCABULARY[IMAGE],
    "max_images": 6,
    "bos_token_id": VOCABULARY[END],
    "eos_token_id": VOCABULARY[END],
}
PARTS = ("text_config", "vision_config", "resampler_config", "cross_attention_config")


def config_json(**settings: Any) -> dict[str, Any]:
    """Return CONFIG with other ``settings``; those of a part change single fields, unless they name a model_type."""

    def part(name: str, given: Any) -> Any:
        whole = name not in PARTS or not isinstance(given, Mapping) or "model_type" in given
        return given if whole else {**CONFIG[name], **given}

    return {**CONFIG, **{name: part(name, given) for name, given in settings.items()}}


def read_config(described: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> FlamingoConfig:
    """Read a config.json as an export does."""
    return config_from_source(Source(described, frozenset(), "image-text-to-text", {}, image_size))


def random_flamingo(config: FlamingoConfig, *, gates: float | None = None, seed: int = 4) -> Flamingo:
    """Build a model with random weights; ``gates`` sets all that stands in tanh."""
    torch.manual_seed(seed)
    model = Flamingo(config, "image-text-to-text").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3)
        if parameter.ndim == 1 and "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight"):
            parameter += 1
        if gates is not None and name.endswith("_gate"):
            parameter.fill_(gates)
    return model


def write_flamingo(folder: Path, *, gates: float | None = None, seed: int = 4, **settings: Any) -> Path:
    """Write a checkpoint of CONFIG with other ``settings`` (see ``config_json``), its tokenizer and image processor."""
    described = config_json(**settings)
    config = read_config(described)
    model = random_flamingo(config, gates=gates, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described))
    write_tokenizer(folder)
    write_image_processor(folder, *config.vision_config.image_size)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of VOCABULARY that splits at spaces and around the marks of images."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([END, IMAGE, UNKNOWN])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN, "image_token": IMAGE}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
