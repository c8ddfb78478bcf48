"""Make checkpoints for scaling.py: the width of published models, few layers, random weights, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYERS = 2  # of each model; their weights, 57 MB in FP32 at a width of 768, are more than a core's caches hold
VOCABULARY = 1000

BASE: dict[str, Any] = {  # a layer of BERT-base, ViT-B and CLIP's image tower
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_hidden_layers": LAYERS,
}
SMALL: dict[str, Any] = {  # CLIP's text tower, which is not measured
    "hidden_size": 64,
    "num_attention_heads": 1,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
}


def bert(transformers: Any, longest: int, side: int) -> Any:
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=longest, **BASE)
    return transformers.BertModel(config)


def transformer(transformers: Any, longest: int, side: int) -> Any:
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY, d_model=512, encoder_layers=LAYERS, decoder_layers=1, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=longest,
        pad_token_id=VOCABULARY - 1, eos_token_id=0, decoder_start_token_id=VOCABULARY - 1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def gpt(transformers: Any, longest: int, side: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=longest, n_layer=LAYERS, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def vit(transformers: Any, longest: int, side: int) -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=side, patch_size=16, **BASE))


def clip(transformers: Any, longest: int, side: int) -> Any:
    text = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SMALL}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={"image_size": side, "patch_size": 32, **BASE}, projection_dim=512
    )
    return transformers.CLIPModel(config)


MODELS = {"bert": bert, "transformer": transformer, "gpt": gpt, "vit": vit, "clip": clip}


def save_checkpoint(folder: Path, model: str, *, longest: int, side: int) -> Path:
    """Return a checkpoint's folder; ``longest`` in tokens, ``side`` of images in pixels."""
    import torch
    import transformers

    torch.manual_seed(0)
    MODELS[model](transformers, longest, side).eval().save_pretrained(folder)
    return folder
