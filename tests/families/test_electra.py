"""ELECTRA: what every family shows, its settings, its discriminator, and answers equal to transformers'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

from command_line import document, transom
from conftest import BERT, CITIES, Once
from edited_checkpoints import edit_config, edit_weights, read
from encoder_family import EncoderFamily
from transom.export.pipeline import export
from transom.export.report.report import write_report
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError
from transom.runtime.selftest import selftest

SIZES = {**BERT, "embedding_size": 96}
TEXTS = ["the capital of france is paris", "water", "how many people, and which day?", "a long way down the river: 7!"]


class TestElectra(EncoderFamily):
    family = "electra"
    config = ("ElectraConfig", SIZES)
    heads: ClassVar = {
        "ElectraModel": ("last_hidden_state",),
        "ElectraForPreTraining": ("logits",),
        "ElectraForMaskedLM": ("logits",),
        "ElectraForSequenceClassification": ("logits",),
        "ElectraForTokenClassification": ("logits",),
        "ElectraForQuestionAnswering": ("start_logits", "end_logits"),
    }
    linears = 19  # six in each layer, and the projection of the embeddings
    labels: ClassVar = {
        "ElectraForSequenceClassification": {"num_labels": 5},
        "ElectraForTokenClassification": {"id2label": CITIES, "label2id": {name: i for i, name in CITIES.items()}},
    }

    def call_theirs(self, model: Any, feeds: Mapping[str, torch.Tensor]) -> Any:
        """Put the logit 0 of "original" before a discriminator's own."""
        found = model(**feeds)
        if isinstance(model, transformers.ElectraForPreTraining):
            return {"logits": torch.stack((torch.zeros_like(found.logits), found.logits), -1)}
        return found

    @pytest.mark.parametrize(
        "settings",
        [
            {"embedding_size": SIZES["hidden_size"]},
            {"embedding_size": 224},
            {"tie_word_embeddings": False},
            {"tie_word_embeddings": False, "embedding_size": SIZES["hidden_size"]},
            {"layer_norm_eps": 1e-3, "type_vocab_size": 3},
            *({"hidden_act": name} for name in ("gelu_new", "quick_gelu", "relu", "silu", "tanh")),
        ],
        ids=str,
    )
    def test_every_setting_equals_transformers(
        self, settings: dict[str, Any], architecture: str, tmp_path: Path
    ) -> None:
        class WithSettings(TestElectra):
            config = ("ElectraConfig", {**SIZES, **settings})

        WithSettings().test_the_definition_equals_transformers(architecture, tmp_path)

    @pytest.mark.parametrize("head", ["ElectraForPreTraining", "ElectraForMaskedLM", "ElectraForTokenClassification"])
    @pytest.mark.parametrize("numbers", ["bf16", "int8"])
    def test_heads_at_tokens_in_other_precisions(self, head: str, numbers: str, once: Once) -> None:
        """The discriminator's first logit has weights of 0 alone; a tied generator reads the table of embeddings."""
        folder = self.bundle(once, head, numbers)
        verify(folder, accuracy=False)
        report = selftest(folder)
        assert report.worst.error <= report.tolerance
        with load(folder) as bundle:
            logits = bundle.run({"input_ids": np.arange(26).reshape(2, 13)})["logits"]
        assert np.isfinite(logits).all()
        assert (not logits[..., 0].any()) == (head == "ElectraForPreTraining")

    def test_the_report_draws_attention(self, once: Once, tmp_path: Path) -> None:
        page = tmp_path / "page.html"
        write_report(self.bundle(once, "ElectraForPreTraining"), ("water of the river",), page, ())
        assert "attention in layer" in page.read_text("utf-8")


SUITE = TestElectra()


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, r"'relative_key', which adds.*Use a checkpoint"),
        ({"is_decoder": True}, r"is_decoder is set.*Use a checkpoint of an encoder"),
        ({"add_cross_attention": True}, r"add_cross_attention is set.*Use a checkpoint of an encoder"),
        ({"embedding_size": 0}, r"embedding_size is 0, expected.*Correct these fields"),
        ({"hidden_act": "mish"}, r"hidden_act is 'mish', expected one of gelu.*Correct these fields"),
        ({"num_attention_heads": 7}, r"hidden_size 160 is no multiple of num_attention_heads 7"),
        ({"embedding_size": 160}, r"word_embeddings.weight has shape \(\d+, 96\), config.json asks for"),
        ({"architectures": ["ElectraForMultipleChoice"]}, r"'ElectraForMultipleChoice'.*Choose a head with --task"),
    ],
    ids=str,
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edit_config(SUITE.checkpoint(tmp_path, "ElectraModel"), **changes)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_a_tied_head_that_is_stored_is_the_embedding(tmp_path: Path) -> None:
    folder = SUITE.checkpoint(tmp_path, "ElectraForMaskedLM")
    words = "electra.embeddings.word_embeddings.weight"
    edit_weights(folder, lambda tensors: tensors.update({"generator_lm_head.weight": tensors[words].clone()}))
    assert read(folder).left_out == ["generator_lm_head.weight"]
    edit_weights(folder, lambda tensors: tensors["generator_lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"generator_lm_head.weight differs from .*word_embeddings.weight"):
        read(folder)


def test_names_of_older_checkpoints_load(tmp_path: Path) -> None:
    folder = SUITE.checkpoint(tmp_path, "ElectraModel")
    before = read(folder).module.state_dict()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            older = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            tensors[f"electra.{older}"] = tensors.pop(name)
        tensors["electra.embeddings.position_ids"] = torch.arange(67)[None]

    loaded = read(edit_weights(folder, rename))
    assert loaded.left_out == ["electra.embeddings.position_ids"]
    assert all(torch.equal(before[name], value) for name, value in loaded.module.state_dict().items())


@pytest.mark.parametrize("architecture", [*SUITE.heads, "ElectraForMultipleChoice"])
def test_features_are_read_from_every_checkpoint(architecture: str, tmp_path: Path) -> None:
    loaded = read(SUITE.checkpoint(tmp_path, architecture), task="feature-extraction")
    assert [tensor.name for tensor in loaded.graphs[0].outputs] == ["last_hidden_state", "sentence_embedding"]


def test_heads_that_are_not_stored_are_missing(tmp_path: Path) -> None:
    discriminator = SUITE.checkpoint(tmp_path / "discriminator", "ElectraForPreTraining")
    with pytest.raises(CheckpointError, match=r"missing: .*generator_lm_head.bias.*choose another --task"):
        read(discriminator, task="fill-mask")
    with pytest.raises(CheckpointError, match=r"'next-sentence-prediction'; a checkpoint of electra offers"):
        read(discriminator, task="next-sentence-prediction")
    bare = SUITE.checkpoint(tmp_path / "bare", "ElectraModel")
    with pytest.raises(CheckpointError, match=r"missing: classifier.weight"):
        read(bare, task="token-classification")


# The discriminator


def test_each_token_is_original_or_replaced(once: Once) -> None:
    """Probabilities are the sigmoid of transformers' logit, and what is left to 1."""
    bundle = SUITE.bundle(once, "ElectraForPreTraining")
    folder = bundle.parent / "checkpoint"
    assert Bundle(bundle).manifest.labels == ("original", "replaced")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.ElectraForPreTraining.from_pretrained(folder).eval()
    for text, result in zip(TEXTS, document(transom("run", bundle, *TEXTS, "--json"))["results"], strict=True):
        encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        spans = encoded.pop("offset_mapping")[0, 1:-1].tolist()
        with torch.no_grad():
            replaced = model(**encoded).logits[0, 1:-1].sigmoid()
        found = result["entities"]
        assert [[entity["start"], entity["end"]] for entity in found] == spans
        assert [entity["label"] == "replaced" for entity in found] == (replaced > 0.5).tolist()
        expected = torch.where(replaced > 0.5, replaced, 1 - replaced)
        np.testing.assert_allclose([entity["probability"] for entity in found], expected, rtol=1e-4)


def test_labels_of_the_config_are_not_the_discriminators(tmp_path: Path) -> None:
    loaded = read(SUITE.checkpoint(tmp_path, "ElectraForPreTraining", num_labels=5))
    assert loaded.labels == ("original", "replaced")
    assert loaded.graphs[0].outputs[0].shape == ("B", "S", 2)


def test_which_head_labels_tokens(tmp_path: Path) -> None:
    """The one that architectures names; where it names another, the classifier if there is one."""
    folder = SUITE.checkpoint(tmp_path, "ElectraForPreTraining")
    edit_config(folder, architectures=["ElectraModel"])
    assert read(folder, task="token-classification").config.discriminator
    classifier = {"classifier.weight": torch.ones(2, 160), "classifier.bias": torch.ones(2)}
    edit_weights(folder, lambda tensors: tensors.update(classifier))
    for architecture, discriminator in {
        "ElectraForPreTraining": True,
        "ElectraForTokenClassification": False,
        "ElectraModel": False,
    }.items():
        loaded = read(edit_config(folder, architectures=[architecture]), task="token-classification")
        assert loaded.config.discriminator == discriminator
        assert loaded.labels == (("original", "replaced") if discriminator else ("LABEL_0", "LABEL_1"))


# Answers


def results_of(once: Once, architecture: str, *inputs: str) -> tuple[Path, Any]:
    """Return the checkpoint, and what `transom run` answers to the inputs."""
    bundle = SUITE.bundle(once, architecture)
    return bundle.parent / "checkpoint", document(transom("run", bundle, *inputs, "--json"))["results"]


def test_gaps_are_filled_as_in_transformers(once: Once) -> None:
    texts = ["the capital of [MASK] is paris", "[MASK] is the [MASK]"]
    folder, results = results_of(once, "ElectraForMaskedLM", *texts)
    pipeline = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    for text, result in zip(texts, results, strict=True):
        expected = pipeline(text)
        expected = expected if isinstance(expected[0], list) else [expected]
        for gap, theirs in zip(result["masks"], expected, strict=True):
            assert [answer["token"] for answer in gap] == [answer["token_str"] for answer in theirs]
            found = [answer["probability"] for answer in gap]
            np.testing.assert_allclose(found, [answer["score"] for answer in theirs], rtol=1e-4)


def test_texts_are_classified_as_in_transformers(once: Once) -> None:
    folder, results = results_of(once, "ElectraForSequenceClassification", *TEXTS)
    pipeline = transformers.pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    for theirs, result in zip(pipeline(TEXTS), results, strict=True):
        assert [answer["label"] for answer in result["labels"]] == [answer["label"] for answer in theirs]
        found = [answer["probability"] for answer in result["labels"]]
        np.testing.assert_allclose(found, [answer["score"] for answer in theirs], rtol=1e-4)


def test_tokens_are_labelled_as_in_transformers(once: Once) -> None:
    folder, results = results_of(once, "ElectraForTokenClassification", *TEXTS)
    pipeline = transformers.pipeline("token-classification", model=str(folder), device="cpu")
    for theirs, result in zip(pipeline(TEXTS), results, strict=True):
        places = [(answer["label"], answer["start"], answer["end"]) for answer in result["entities"]]
        assert places == [(answer["entity"], answer["start"], answer["end"]) for answer in theirs]
        found = [answer["probability"] for answer in result["entities"]]
        np.testing.assert_allclose(found, [answer["score"] for answer in theirs], rtol=1e-4)


def test_questions_are_answered_as_by_transformers_logits(once: Once) -> None:
    """transformers 5 has no pipeline for questions: its rule on its logits, with the first token as "no answer"."""
    question, context = "which city is the capital", "the capital of france is paris, a city on the water"
    folder, results = results_of(once, "ElectraForQuestionAnswering", question, context)
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(
        question, context, return_tensors="pt", return_offsets_mapping=True
    )
    offsets = encoded.pop("offset_mapping")[0].tolist()
    considered = torch.tensor([kind == 1 for kind in encoded.sequence_ids(0)])
    in_context = considered.clone()
    considered[0] = True
    with torch.no_grad():
        theirs = transformers.ElectraForQuestionAnswering.from_pretrained(folder).eval()(**encoded)
    start, end = (
        logits[0].masked_fill(~considered, -10_000.0).softmax(-1) * in_context
        for logits in (theirs.start_logits, theirs.end_logits)
    )
    joint = torch.outer(start, end).triu().tril(14)  # spans of 15 tokens at most
    first, last = divmod(int(joint.argmax()), len(end))
    (answer,) = results[0]["answers"]
    assert (answer["start"], answer["end"]) == (offsets[first][0], offsets[last][1])
    assert answer["probability"] == pytest.approx(float(joint.max()), rel=1e-4)


def test_sentences_are_embedded_as_by_sentence_transformers(tmp_path: Path) -> None:
    import sentence_transformers

    folder = SUITE.checkpoint(tmp_path / "checkpoint", "ElectraModel")
    modules = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Normalize", "models.Normalize")]
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 160, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "2_Normalize").mkdir()
    export(str(folder), tmp_path / "bundle", max_sizes={"B": 3})  # not export_to, which knows a trace by its weights
    expected = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    with load(tmp_path / "bundle") as bundle:
        np.testing.assert_allclose(bundle.embed(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["ElectraTokenizer", "ElectraTokenizerFast"])
@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.txt",)])
def test_tokenizers_of_electra_are_read(kind: str, files: tuple[str, ...], tmp_path: Path) -> None:
    folder = SUITE.checkpoint(tmp_path, "ElectraForMaskedLM")
    getattr(transformers, kind).from_pretrained(folder, do_lower_case=True).save_pretrained(folder)
    for name in {"tokenizer.json", "vocab.txt"} - {*files}:
        (folder / name).unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))
    tokenizer = read(folder).open_tokenizer()
    assert tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "The PEOPLE of Paris, [MASK] unheard-of!"]:
        found = tokenizer.encode([text], ["a pair"], truncate=False)
        expected = theirs(text, "a pair")
        assert found.input_ids[0].tolist() == expected["input_ids"]
        assert found.token_type_ids[0].tolist() == expected["token_type_ids"]
