"""Checkpoints that are accepted, and the error of each that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edited_checkpoints import edit_weights, read
from transom.export.checkpoint import load_checkpoint
from transom.runtime.errors import CheckpointError, ExportError

MakeCheckpoint = Callable[..., Path]


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    words = json.loads((folder / name).read_text())
    change(words)
    (folder / name).write_text(json.dumps(words))


@pytest.fixture
def bert(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("BertForSequenceClassification", num_labels=3)


def test_sharded_weights_load(make_checkpoint: MakeCheckpoint) -> None:
    whole, sharded = make_checkpoint("BertModel"), make_checkpoint("BertModel", shard="400KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for ours, theirs in zip(read(whole).module.parameters(), read(sharded).module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_names_from_tensorflow_load(bert: Path) -> None:
    before = read(bert).module.state_dict()
    edit_weights(
        bert,
        lambda t: [
            t.__setitem__(n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"), t.pop(n))
            for n in list(t)
            if "LayerNorm" in n
        ],
    )
    assert all(torch.equal(before[name], value) for name, value in read(bert).module.state_dict().items())


def test_names_of_transformers_5_load(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("ViTModel")
    before = read(folder).module.state_dict()
    newer = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = name
            for old, replacement in newer.items():
                new = new.replace(old, replacement)
            tensors[new] = tensors.pop(name)
        assert "layers.0.attention.q_proj.weight" in tensors

    edit_weights(folder, rename)
    assert all(torch.equal(before[name], value) for name, value in read(folder).module.state_dict().items())


def test_missing_unused_and_misshapen_weights_are_reported_together(bert: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["bert.encoder.layer.1.output.dense.weight"]
        del tensors["classifier.bias"]
        tensors["bert.encoder.layer.7.output.dense.weight"] = torch.zeros(2)
        tensors["bert.pooler.dense.bias"] = torch.zeros(5)

    edit_weights(bert, spoil)
    with pytest.raises(CheckpointError) as caught:
        read(bert)
    message = str(caught.value)
    assert "missing: bert.encoder.layer.1.output.dense.weight, classifier.bias" in message
    assert "unused: bert.encoder.layer.7.output.dense.weight" in message
    assert "bert.pooler.dense.bias has shape (5,), config.json asks for (160,)" in message


def test_unused_weights_are_an_error_unless_allowed(bert: Path) -> None:
    edit_weights(bert, lambda tensors: tensors.update(adapter=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"unused: adapter\. .*--ignore-unused"):
        read(bert)
    assert read(bert, ignore_unused=True).left_out == ["adapter"]


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5])
def test_truncated_safetensors(bert: Path, keep: float) -> None:
    path = bert / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read(bert)


def test_missing_safetensors(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read(bert)


def test_pickled_weights_are_never_opened(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    trap = bert / "opened"
    payload = f"cbuiltins\nopen\n(S'{trap}'\nS'w'\ntR.".encode()
    (bert / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        read(bert)
    assert not trap.exists()


def test_missing_shard_and_shard_outside(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertModel", shard="400KB")
    index = "model.safetensors.index.json"
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    moved = shard.rename(folder.parent / shard.name)
    with pytest.raises(CheckpointError, match=f"missing here: {shard.name}"):
        read(folder)
    edit(folder, lambda words: words["weight_map"].update({"embeddings.LayerNorm.bias": f"../{moved.name}"}), index)
    with pytest.raises(CheckpointError, match=r"must be a .safetensors file beside it"):
        read(folder)


def test_not_finite_and_integer_weights(bert: Path) -> None:
    edit_weights(bert, lambda tensors: tensors["classifier.bias"].__setitem__(1, float("nan")))
    with pytest.raises(CheckpointError, match=r"classifier\.bias holds NaN"):
        read(bert)
    edit_weights(bert, lambda tensors: tensors.update({"classifier.bias": torch.zeros(3, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"classifier\.bias is stored as torch\.int8"):
        read(bert)


def test_unknown_architectures_are_told_ours(bert: Path) -> None:
    edit(bert, lambda words: words.update(model_type="llama", architectures=["LlamaForCausalLM"]))
    with pytest.raises(CheckpointError, match=r"'llama'.*Defined are: bert \(BertModel.*vit \(ViTModel"):
        read(bert)
    edit(bert, lambda words: words.update(model_type="bert", architectures=["BertLMHeadModel"]))
    with pytest.raises(CheckpointError, match=r"'BertLMHeadModel'.*Choose a head with --task"):
        read(bert)
    with pytest.raises(CheckpointError, match=r"'summarization'; a checkpoint of bert offers feature-extraction"):
        read(bert, task="summarization")


@pytest.mark.parametrize(
    ("model_type", "difference"),
    [("roberta", "counts positions from pad_token_id"), ("distilbert", "no token types and no pooler")],
)
def test_relatives_are_told_what_differs(bert: Path, model_type: str, difference: str) -> None:
    edit(bert, lambda words: words.update(model_type=model_type))
    with pytest.raises(CheckpointError, match=difference):
        read(bert)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": 7}, "no multiple of num_attention_heads 7"),
        ({"hidden_act": "mish", "layer_norm_eps": "x"}, "hidden_act is 'mish'.*layer_norm_eps is 'x'"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' is defined"),
        ({"is_decoder": True}, "exported as an encoder"),
        ({"vocab_size": 10**9}, "config.json asks for"),
    ],
)
def test_configs_that_cannot_be_used(bert: Path, change: dict[str, Any], message: str) -> None:
    edit(bert, lambda words: words.update(change))
    with pytest.raises(CheckpointError, match=message):
        read(bert)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "nul"])
def test_damaged_config(bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read(bert)


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        read(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        read(tmp_path / "file")


def test_bounds_of_axes(bert: Path) -> None:
    assert read(bert, max_sizes={"S": 33, "B": 100}).axes["S"].max == 33
    with pytest.raises(ExportError, match=r"S=68 is out of range; this model allows 1\.\.67"):
        read(bert, max_sizes={"S": 68})
    with pytest.raises(ExportError, match="axis 'T'; this model has B, S"):
        read(bert, max_sizes={"T": 1})
    with pytest.raises(ExportError, match="--image-size"):
        read(bert, image_size=(8, 8))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
    ],
)
def test_sentence_transformers_folders(bert: Path, pooling: dict[str, Any], expected: str) -> None:
    modules = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Normalize", "models.Normalize")]
    listed = [{"idx": i, "path": path, "type": f"sentence_transformers.{t}"} for i, (path, t) in enumerate(modules)]
    (bert / "modules.json").write_text(json.dumps(listed))
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    config = read(bert, task="feature-extraction").config
    assert (config.pooling, config.normalize) == (expected, True)
    edit(bert, lambda words: words.update(pooling_mode="weightedmean"), "1_Pooling/config.json")
    with pytest.raises(CheckpointError, match="'weightedmean'; defined are mean and cls"):
        read(bert, task="feature-extraction")
    listed.append({"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (bert / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="'dense' module"):
        read(bert)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": ["gelu"]}, r"hidden_act is \['gelu'\]"),
        ({"model_type": ["bert"]}, r"model_type \['bert'\]"),
    ],
)
def test_fields_of_another_type(bert: Path, change: dict[str, Any], message: str) -> None:
    edit(bert, lambda words: words.update(change))
    with pytest.raises(CheckpointError, match=message):
        read(bert)


@pytest.mark.parametrize("size", ["x", -3, 2.5])
def test_pooler_sizes_that_are_none(make_checkpoint: MakeCheckpoint, size: Any) -> None:
    folder = make_checkpoint("ViTModel")
    edit(folder, lambda words: words.update(pooler_output_size=size))
    with pytest.raises(CheckpointError, match="pooler_output_size is"):
        read(folder)


@pytest.mark.parametrize("source", ["~nosuchuser/model", "a" * 5_000, "nul\0"])
def test_sources_that_cannot_be_paths(source: str) -> None:
    with pytest.raises(CheckpointError):
        load_checkpoint(source, task=None, max_sizes={}, image_size=None, ignore_unused=False)


def test_what_sentence_transformers_settings_would_change_is_refused(bert: Path) -> None:
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    (bert / "modules.json").write_text(json.dumps(modules))
    (bert / "1_Pooling").mkdir()
    pooling, settings = bert / "1_Pooling" / "config.json", bert / "config_sentence_transformers.json"
    pooling.write_text(json.dumps({"pooling_mode": ["mean"], "include_prompt": False}))
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    settings.write_text(json.dumps(prompts))
    with pytest.raises(CheckpointError, match="leaves out the prompt 'query: '"):
        read(bert, task="feature-extraction")
    pooling.write_text(json.dumps({"pooling_mode": ["mean"]}))
    assert read(bert, task="feature-extraction").options == {"prompt": "query: "}
    settings.write_text(json.dumps({**prompts, "truncate_dim": 8}))
    with pytest.raises(CheckpointError, match="truncate_dim is 8"):
        read(bert, task="feature-extraction")
    settings.write_text(json.dumps(prompts))
    pooling.write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    with pytest.raises(CheckpointError, match=r"'cls\+mean'; defined are mean and cls"):
        read(bert, task="feature-extraction")
