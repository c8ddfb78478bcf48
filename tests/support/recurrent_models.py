"""Write small random checkpoints of the recurrent families: seq2seq in both forms, and a captioner of images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from image_processors import write_image_processor
from transom.models.seq2seq import Seq2Seq, Seq2SeqConfig
from transom.models.show_attend_tell import ShowAttendTell, ShowAttendTellConfig

PAD, START, END = 0, 1, 2
WORDS = ("the", "people", "of", "paris", "a", "long", "day", "call", "him", "now", "more", "water", "what", "is", "it")
VOCABULARY = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
SEQ2SEQ = Seq2SeqConfig(  # no size like another one, two layers on each side
    vocab_size=len(VOCABULARY),
    decoder_vocab_size=len(VOCABULARY),
    embedding_size=8,
    encoder_hidden_size=13,
    decoder_hidden_size=11,
    encoder_layers=2,
    decoder_layers=2,
    attention_size=7,
    readout_size=6,
    max_source_positions=41,
    max_target_positions=80,
)
CAPTIONER = ShowAttendTellConfig(
    image_size=(20, 12),
    depths=(2, 1),
    hidden_sizes=(5, 9),
    decoder_vocab_size=len(VOCABULARY),
    embedding_size=8,
    decoder_hidden_size=11,
    attention_size=7,
    max_target_positions=80,
)
GENERATION = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}


def write_seq2seq(folder: Path, *, tokenizer: bool = False, **settings: Any) -> Path:
    """Write a checkpoint of SEQ2SEQ with other ``settings``; with a word-level ``tokenizer`` it takes texts."""
    config = Seq2SeqConfig(**{**asdict(SEQ2SEQ), **settings})
    described = {"model_type": "seq2seq", "architectures": ["Seq2SeqForConditionalGeneration"]}
    write(folder, Seq2Seq(config, "translation"), {**asdict(config), **described})
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_captioner(folder: Path, **settings: Any) -> Path:
    """Write a checkpoint of CAPTIONER with other ``settings``, its word-level tokenizer and its image processor."""
    config = ShowAttendTellConfig(**{**asdict(CAPTIONER), **settings})
    described = {"model_type": "show_attend_tell", "architectures": ["ShowAttendTellForImageToText"]}
    write(folder, ShowAttendTell(config, "image-to-text"), {**asdict(config), **described})
    write_tokenizer(folder)
    write_image_processor(folder, *config.image_size)
    return folder


def write(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write random weights under the prefix ``model.``, and config.json."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, **GENERATION}))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of VOCABULARY that splits at spaces and ends a text with </s>."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}))
