"""Checkpoints with random weights, made by transformers, and bundles exported from them once per run."""

from __future__ import annotations

import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network; those of the hub set it themselves

import transformers

WORDS = """
the a of and to in is it that was for on are as with his they at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many then
them these so some her would make like him into time has look two more write go see number no way could people my than
first water been call who oil its now find long down day did get come made may part capital france paris city
"""


def vocabulary() -> list[str]:
    """A WordPiece vocabulary of 5 special tokens, every printable character, and some words."""
    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *WORDS.split()]


BERT = {  # head size 80, three layers, a prime intermediate size: nothing a kernel could like
    "vocab_size": len(vocabulary()),
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 203,
    "max_position_embeddings": 67,
}
VIT = {
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 203,
    "image_size": 20,
    "patch_size": 4,
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``make_checkpoint("BertForMaskedLM", num_labels=5)`` -> a new folder as ``save_pretrained`` writes it.

    Weights are normal with deviation 0.2, larger than at initialisation, so that every layer matters. BERT
    folders get ``vocab.txt``; ``tokenizer=False`` leaves it out.
    """

    def make(architecture: str, *, seed: int = 0, tokenizer: bool = True, shard: str = "5GB", **config: Any) -> Path:
        family = transformers.BertConfig if architecture.startswith("Bert") else transformers.ViTConfig
        defaults = BERT if architecture.startswith("Bert") else VIT
        model = random_model(architecture, family(**{**defaults, **config}), seed)
        folder = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(folder, max_shard_size=shard)
        if architecture.startswith("Bert") and tokenizer:
            (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
            (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
        return folder

    return make


def random_model(architecture: str, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def export_to(folder: Path, source: Path | str, **options: Any) -> Path:
    from transom.export.pipeline import export

    out = folder / "bundle"
    export(str(source), out, **options)
    return out


@pytest.fixture(scope="session")
def bert_checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("BertModel")


@pytest.fixture(scope="session")
def bert_bundle(bert_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT, feature-extraction, FP32, with a tokenizer."""
    return export_to(tmp_path_factory.mktemp("bert"), bert_checkpoint)


@pytest.fixture(scope="session")
def vit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference ViT, image-classification, FP32."""
    return export_to(tmp_path_factory.mktemp("vit"), "vit")
