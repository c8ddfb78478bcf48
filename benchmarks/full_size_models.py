"""Models of published size with random weights, made by transformers, and real inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "export" / "data"
SAMPLES = 16
LENGTH = 64  # tokens of each, and of the longest text
LENGTHS = [64, 1, 48, 2, 32, 1, 16, 4]  # of texts, twice
EOS = 49407  # of CLIP's text tower, which reads its answer at this token

Arrays = dict[str, NDArray[Any]]


def bert(transformers: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig())


def gpt(transformers: Any) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def vit(transformers: Any) -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


def clip(transformers: Any) -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config={"eos_token_id": EOS}))


def transformer(transformers: Any) -> Any:
    config = transformers.MarianConfig(
        vocab_size=32000, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512,
        pad_token_id=31999, eos_token_id=0, decoder_start_token_id=31999, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def texts() -> Arrays:
    """Return bytes of real prose as token ids, in rows of 1 to LENGTH tokens; the tokenizer does not matter here.

    Ranges of long rows alone clip single tokens: with random weights that takes INT8 beyond parity's limit.
    """
    prose = np.frombuffer((DATA / "austen_heldout.txt").read_bytes(), np.uint8).astype(np.int64)
    ids = prose[: SAMPLES * LENGTH].reshape(SAMPLES, LENGTH)
    mask = (np.arange(LENGTH) < np.array(LENGTHS * 2)[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def prompts() -> Arrays:
    return {"input_ids": texts()["input_ids"]}


def photographs() -> Arrays:
    """Return crops of two photographs, between -1 and 1, (N, 3, 224, 224)."""
    pieces = []
    for name in ("photo_china.jpg", "photo_flower.jpg"):
        with Image.open(DATA / name) as image:
            small = image.convert("RGB").resize((640, 427))
        pixels = np.asarray(small, np.float32).transpose(2, 0, 1) / 127.5 - 1
        for left in np.linspace(0, 640 - 224, SAMPLES // 2).astype(int):
            pieces.append(pixels[:, left // 3 : left // 3 + 224, left : left + 224])
    return {"pixel_values": np.stack(pieces)}


def pictures_and_texts() -> Arrays:
    ids = texts()["input_ids"].copy()
    ids[:, -1] = EOS
    return photographs() | {"input_ids": ids}


MODELS: dict[str, tuple[str, Callable[[Any], Any], Callable[[], Arrays]]] = {
    "bert": ("BERT-base, 110 M", bert, texts),
    "gpt": ("GPT-2, 124 M", gpt, prompts),
    "vit": ("ViT-B/16, 86 M", vit, photographs),
    "clip": ("CLIP-B/32, 151 M", clip, pictures_and_texts),
    "transformer": ("Transformer 6+6, 60 M", transformer, texts),
}


def random_checkpoint(model: str, work: Path) -> Path:
    """Return the checkpoint of a model of MODELS in ``work``, made with random weights the first time."""
    folder = work / f"{model}-checkpoint"
    if not (folder / "config.json").is_file():
        import torch
        import transformers

        torch.manual_seed(0)
        MODELS[model][1](transformers).eval().save_pretrained(folder)
    return folder
