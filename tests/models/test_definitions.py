"""Our definitions against transformers': same weights, same inputs, FP32, awkward sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from transom.export.checkpoint import load_checkpoint

WORST = 1e-5  # max|ours - theirs| / max|theirs|
BERT_HEADS = {
    "BertModel": ("pooler_output", "last_hidden_state"),
    "BertForPreTraining": ("logits",),
    "BertForMaskedLM": ("logits",),
    "BertForNextSentencePrediction": ("logits",),
    "BertForSequenceClassification": ("logits",),
    "BertForTokenClassification": ("logits",),
    "BertForQuestionAnswering": ("start_logits", "end_logits"),
}
MakeCheckpoint = Callable[..., Path]


def ours_of(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"task": None, "max_sizes": {}, "image_size": None, "ignore_unused": False}
    return load_checkpoint(str(folder), **{**defaults, **options})


def worst_error(loaded: Any, ours: tuple[torch.Tensor, ...], theirs: Any, names: tuple[str, ...]) -> float:
    by_name = dict(zip((tensor.name for tensor in loaded.graphs[0].outputs), ours, strict=True))
    errors = []
    for name in names:
        expected = theirs["prediction_logits"] if name == "logits" and "prediction_logits" in theirs else theirs[name]
        assert by_name[name].shape == expected.shape
        errors.append(float((by_name[name] - expected).abs().max() / expected.abs().max()))
    return max(errors)


@pytest.mark.parametrize(("B", "S"), [(1, 1), (3, 67), (2, 13)])
@pytest.mark.parametrize("architecture", BERT_HEADS)
def test_bert_equals_transformers(make_checkpoint: MakeCheckpoint, architecture: str, B: int, S: int) -> None:
    labels = {} if architecture.endswith(("Answering", "Prediction")) else {"num_labels": 5}
    folder = make_checkpoint(architecture, **labels)
    theirs = getattr(transformers, architecture).from_pretrained(folder)
    loaded = ours_of(folder)
    torch.manual_seed(S)
    ids, types = torch.randint(0, 101, (B, S)), torch.randint(0, 2, (B, S))
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, S // 2 + 1 :] = 0
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types)
        found = loaded.module(ids, mask, types)
    assert worst_error(loaded, found, expected, BERT_HEADS[architecture]) <= WORST


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_bert_activations(make_checkpoint: MakeCheckpoint, activation: str) -> None:
    folder = make_checkpoint("BertModel", hidden_act=activation)
    theirs, loaded = transformers.BertModel.from_pretrained(folder), ours_of(folder)
    ids, ones = torch.arange(26).reshape(2, 13), torch.ones(2, 13, dtype=torch.long)
    with torch.no_grad():
        expected, found = theirs(input_ids=ids), loaded.module(ids, ones, ones * 0)
    assert worst_error(loaded, found, expected, BERT_HEADS["BertModel"]) <= WORST


def test_untied_word_embeddings(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertForMaskedLM", tie_word_embeddings=False)
    theirs, loaded = transformers.BertForMaskedLM.from_pretrained(folder), ours_of(folder)
    ids, ones = torch.arange(26).reshape(2, 13), torch.ones(2, 13, dtype=torch.long)
    with torch.no_grad():
        expected, found = theirs(input_ids=ids), loaded.module(ids, ones, ones * 0)
    assert worst_error(loaded, found, expected, ("logits",)) <= WORST


@pytest.mark.parametrize("image_size", [None, (28, 28), (12, 24)])
@pytest.mark.parametrize("architecture", ["ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("config", [{}, {"qkv_bias": False, "hidden_act": "gelu_new"}], ids=["usual", "no-bias"])
def test_vit_equals_transformers(
    make_checkpoint: MakeCheckpoint, architecture: str, image_size: tuple[int, int] | None, config: dict[str, Any]
) -> None:
    folder = make_checkpoint(architecture, **config)
    theirs = getattr(transformers, architecture).from_pretrained(folder)
    loaded = ours_of(folder, image_size=image_size)
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, *(image_size or (20, 20)))
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, interpolate_pos_encoding=image_size is not None)
        found = loaded.module(pixels)
    names = ("logits",) if "Classification" in architecture else ("pooler_output", "last_hidden_state")
    assert worst_error(loaded, found, expected, names) <= WORST


def test_a_task_may_differ_from_the_architecture(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertForSequenceClassification", num_labels=5)
    loaded = ours_of(folder, task="feature-extraction")
    assert [tensor.name for tensor in loaded.graphs[0].outputs] == [
        "pooler_output",
        "last_hidden_state",
        "sentence_embedding",
    ]
    assert loaded.left_out == ["classifier.bias", "classifier.weight"]


def test_half_precision_weights_load_as_fp32(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertModel")
    transformers.BertModel.from_pretrained(folder).half().save_pretrained(folder)
    loaded = ours_of(folder)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
