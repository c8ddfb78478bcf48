"""The encoder-decoder's definition against transformers' Marian and torch.nn.Transformer: same weights, FP32."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from decoder_definitions import (
    SMALL_MARIAN,
    MakeCheckpoint,
    assert_close,
    edit,
    logits_of,
    ours_of,
    translate,
)
from edited_checkpoints import edit_weights
from transom.models.transformer import sinusoids
from transom.runtime.errors import CheckpointError

# ------------------------------------------------------------------------------------------------- Marian


def batch(seed: int, B: int, S: int, T: int, sources: int = 100, targets: int = 100) -> tuple[torch.Tensor, ...]:
    """Source ids with row 0 padded to half, their mask, and target ids that begin with the padding token 100."""
    torch.manual_seed(seed)
    ids, target = torch.randint(0, sources, (B, S)), torch.randint(0, targets, (B, T))
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, S // 2 + 1 :] = 0
    target[:, 0] = min(100, targets)
    return torch.where(mask == 1, ids, sources), mask, target


@pytest.fixture(scope="module")
def marian(make_checkpoint: MakeCheckpoint) -> tuple[Any, Any]:
    folder = make_checkpoint("MarianMTModel")
    return transformers.MarianMTModel.from_pretrained(folder), ours_of(folder)


@pytest.mark.parametrize(
    ("B", "S", "T", "chunks"),
    [(1, 1, 1, None), (3, 67, 67, None), (2, 13, 7, None), (2, 13, 7, [3, 1, 3]), (2, 5, 11, [1] * 11)],
)
def test_marian_equals_transformers(marian: tuple[Any, Any], B: int, S: int, T: int, chunks: list[int] | None) -> None:
    theirs, loaded = marian
    ids, mask, target = batch(S, B, S, T)
    expected = logits_of(theirs, input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    assert_close(translate(loaded, ids, mask, target, chunks), expected)


def test_the_encoder_gives_transformers_hidden_state(marian: tuple[Any, Any]) -> None:
    theirs, loaded = marian
    ids, mask, _ = batch(3, 3, 11, 1)
    with torch.no_grad():
        expected = theirs.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        found = loaded.parts()["encoder"](ids, mask)[0]
    assert_close(found[mask == 1], expected[mask == 1])


def check_marian(folder: Path, sources: int = 100, targets: int = 100) -> Any:
    theirs, loaded = transformers.MarianMTModel.from_pretrained(folder), ours_of(folder)
    ids, mask, target = batch(5, 2, 13, 7, sources, targets)
    expected = logits_of(theirs, input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    assert_close(translate(loaded, ids, mask, target, [4, 3]), expected)
    return loaded


@pytest.mark.parametrize(
    "config",
    [
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "silu"},
        {"scale_embedding": False},
        {"encoder_attention_heads": 13},
        {"d_model": 27, "encoder_attention_heads": 3, "decoder_attention_heads": 1},  # one sine more than cosines
        {"encoder_layers": 2, "decoder_layers": 3},
    ],
    ids=lambda config: "-".join(f"{name}={value}" for name, value in config.items()),
)
def test_marian_settings(make_checkpoint: MakeCheckpoint, config: dict[str, Any]) -> None:
    check_marian(make_checkpoint("MarianMTModel", **{**SMALL_MARIAN, **config}))


@pytest.mark.parametrize("tied", [True, False])
def test_marian_with_a_vocabulary_for_each_side(make_checkpoint: MakeCheckpoint, tied: bool) -> None:
    folder = make_checkpoint(
        "MarianMTModel",
        **SMALL_MARIAN,
        share_encoder_decoder_embeddings=False,
        decoder_vocab_size=53,
        decoder_start_token_id=52,
        pad_token_id=52,
        tie_word_embeddings=tied,
    )
    loaded = check_marian(folder, targets=52)
    encoder, decoder = loaded.graphs
    assert (encoder.inputs[0].exclusive_max, decoder.inputs[0].exclusive_max) == (101, 53)
    assert decoder.outputs[0].shape == ("B", "P", 53)


def test_positions_that_a_checkpoint_stores_win(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("MarianMTModel", **SMALL_MARIAN)
    torch.manual_seed(0)
    tables = {f"model.{side}.embed_positions.weight": torch.randn(67, 26) for side in ("encoder", "decoder")}
    edit_weights(folder, lambda tensors: tensors.update(tables))
    module = ours_of(folder).module
    assert torch.equal(module.encoder.embed_positions.weight, tables["model.encoder.embed_positions.weight"])
    assert torch.equal(module.decoder.embed_positions.weight, tables["model.decoder.embed_positions.weight"])


def test_an_untied_head_on_a_shared_embedding(make_checkpoint: MakeCheckpoint) -> None:
    """Both sides read one embedding, the head is another; transformers stores the embedding three times then."""
    folder = make_checkpoint("MarianMTModel", **SMALL_MARIAN, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight differs from model\.shared\.weight"):
        ours_of(folder)  # with random weights it is three embeddings

    def share(tensors: dict[str, torch.Tensor]) -> None:
        for side in ("encoder", "decoder"):
            tensors[f"model.{side}.embed_tokens.weight"] = tensors["model.shared.weight"].clone()

    edit_weights(folder, share)
    check_marian(folder)


def test_a_final_bias_that_is_missing_or_flat(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("MarianMTModel", **SMALL_MARIAN)
    bias = ours_of(folder).module.final_logits_bias.clone()
    assert bias.shape == (1, 101)
    assert bias.abs().max() > 0.5
    edit_weights(folder, lambda tensors: tensors.update(final_logits_bias=tensors["final_logits_bias"][0].clone()))
    assert torch.equal(ours_of(folder).module.final_logits_bias, bias)
    edit_weights(folder, lambda tensors: tensors.pop("final_logits_bias"))
    assert torch.equal(ours_of(folder).module.final_logits_bias, torch.zeros(1, 101))


EMBEDDINGS = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")


@pytest.mark.parametrize("stored", [(name,) for name in (*EMBEDDINGS, "lm_head.weight")] + [EMBEDDINGS])
def test_a_shared_embedding_under_any_of_its_names(make_checkpoint: MakeCheckpoint, stored: tuple[str, ...]) -> None:
    folder = make_checkpoint("MarianMTModel", **SMALL_MARIAN)
    before = ours_of(folder).module.shared.weight.clone()

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in (*EMBEDDINGS, "lm_head.weight"):
            tensors.pop(name, None)
        tensors.update({name: before.clone() for name in stored})

    edit_weights(folder, move)
    loaded = ours_of(folder)
    assert torch.equal(loaded.module.shared.weight, before)
    assert len(loaded.left_out) == len(stored) - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_attention_heads": 5}, "d_model 26 is no multiple of decoder_attention_heads 5"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads is 0"),
        ({"d_model": 26.0}, r"d_model is 26\.0, expected an integer"),
        ({"decoder_layers": 1001}, "decoder_layers is 1001"),
        ({"activation_function": None}, "activation_function is None"),
        ({"scale_embedding": "true"}, "scale_embedding is 'true'"),
        ({"share_encoder_decoder_embeddings": 0}, "share_encoder_decoder_embeddings is 0"),
        ({"decoder_vocab_size": -3}, "decoder_vocab_size is -3, expected a positive integer"),
        ({"decoder_vocab_size": "x"}, "decoder_vocab_size is 'x', expected a positive integer"),
        ({"max_position_embeddings": 68}, r"embed_positions"),
        ({"architectures": ["MarianForCausalLM"]}, "'MarianForCausalLM'.*MarianMTModel"),
        ({"decoder_start_token_id": 101}, "decoder_start_token_id"),
        ({"tie_word_embeddings": False}, r"missing: lm_head\.weight"),
    ],
)
def test_marian_configs_that_cannot_be_used(
    make_checkpoint: MakeCheckpoint, changes: dict[str, Any], message: str
) -> None:
    folder = make_checkpoint("MarianMTModel", **SMALL_MARIAN)
    if "max_position_embeddings" in changes:  # only where the table is stored can it be too short
        table = torch.zeros(67, 26)
        edit_weights(folder, lambda tensors: tensors.update({"model.encoder.embed_positions.weight": table}))
    if "decoder_start_token_id" in changes:
        (folder / "generation_config.json").unlink()
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ours_of(folder)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- the paper's Transformer


PAPER = {
    "model_type": "transformer",
    "architectures": ["TransformerForConditionalGeneration"],
    "vocab_size": 37,
    "max_position_embeddings": 19,
    "d_model": 26,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 31,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 31,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def copied_weights(theirs: torch.nn.Transformer) -> dict[str, torch.Tensor]:
    """torch.nn.Transformer's weights under our names; its q, k, v are packed in one matrix."""
    norms = {
        "encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
        "decoder": {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"},
    }
    parts = {"linear1": "fc1", "linear2": "fc2", "self_attn": "self_attn", "multihead_attn": "encoder_attn"}
    found: dict[str, torch.Tensor] = {}
    for name, value in theirs.state_dict().items():
        side, _, rest = name.partition(".")
        _, layer, part, *leaf = rest.split(".")
        stem = f"{side}.layers.{layer}.{(parts | norms[side])[part]}"
        if leaf[0].startswith("in_proj_"):
            for projection, chunk in zip("qkv", value.chunk(3), strict=True):
                found[f"{stem}.{projection}_proj.{leaf[0].removeprefix('in_proj_')}"] = chunk.clone()
        else:
            found[f"{stem}.{'.'.join(leaf)}"] = value.clone()
    return found


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Transformer, torch.Tensor, Path]:
    torch.manual_seed(0)
    theirs = torch.nn.Transformer(26, 2, 2, 3, 31, dropout=0.0, batch_first=True).eval()
    theirs.encoder.use_nested_tensor = False  # a prototype, and it warns
    theirs.encoder.norm = theirs.decoder.norm = None  # post-norm: nothing is left to normalise at the end
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    embedding = torch.randn(37, 26) * 0.2
    tensors = copied_weights(theirs) | {"shared.weight": embedding}
    return theirs, embedding, write_checkpoint(tmp_path_factory.mktemp("paper"), PAPER, tensors)


def paper_positions(length: int) -> torch.Tensor:
    """Section 3.5, cell by cell: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos of the same."""
    table = [
        [(math.cos if j % 2 else math.sin)(pos / 10000 ** ((j - j % 2) / 26)) for j in range(26)]
        for pos in range(length)
    ]
    return torch.tensor(table)


@pytest.mark.parametrize(("S", "T", "chunks"), [(1, 1, None), (19, 19, None), (7, 5, [2, 1, 2])])
def test_the_paper_equals_torch_nn_transformer(paper: Any, S: int, T: int, chunks: list[int] | None) -> None:
    theirs, embedding, folder = paper
    loaded = ours_of(folder)
    torch.manual_seed(S)
    ids, target = torch.randint(3, 37, (2, S)), torch.randint(3, 37, (2, T))
    mask = torch.ones(2, S, dtype=torch.long)
    mask[1, S // 2 + 1 :] = 0
    with torch.no_grad():
        source, read = (embedding[tokens] * 26**0.5 + paper_positions(tokens.shape[1]) for tokens in (ids, target))
        hidden = theirs(
            source,
            read,
            tgt_mask=torch.ones(T, T).tril() == 0,
            src_key_padding_mask=mask == 0,
            memory_key_padding_mask=mask == 0,
        )
        expected = hidden @ embedding.T
    assert_close(translate(loaded, ids, mask, target, chunks), expected)


def test_sinusoids_by_hand() -> None:
    """d_model 4 has the frequencies 1 and 1/100; position 1 is at 1 and 0.01 radians, position 2 at twice that."""
    expected = {
        "interleaved": [
            [0.0, 1.0, 0.0, 1.0],
            [0.8414710, 0.5403023, 0.0099998, 0.9999500],
            [0.9092974, -0.4161468, 0.0199987, 0.9998000],
        ],
        "halves": [
            [0.0, 0.0, 1.0, 1.0],
            [0.8414710, 0.0099998, 0.5403023, 0.9999500],
            [0.9092974, 0.0199987, -0.4161468, 0.9998000],
        ],
    }
    for layout, table in expected.items():
        torch.testing.assert_close(sinusoids(3, 4, layout), torch.tensor(table), atol=1e-7, rtol=0)
    assert sinusoids(2, 3, "interleaved").shape == sinusoids(2, 3, "halves").shape == (2, 3)


def test_the_papers_layout_is_ours_alone(paper: Any, tmp_path: Path) -> None:
    """The same weights in Marian's layout: other positions, so other answers."""
    _, _, folder = paper
    tensors = load_file(folder / "model.safetensors")
    halves = write_checkpoint(tmp_path / "halves", {**PAPER, "position_layout": "halves"}, tensors)
    tables = [ours_of(place).module.encoder.embed_positions.weight for place in (folder, halves)]
    assert torch.equal(tables[0], sinusoids(19, 26, "interleaved"))
    assert torch.equal(tables[1], sinusoids(19, 26, "halves"))
    wrong = write_checkpoint(tmp_path / "wrong", {**PAPER, "position_layout": "rotated"}, tensors)
    with pytest.raises(CheckpointError, match="position_layout is 'rotated', expected one of interleaved, halves"):
        ours_of(wrong)


def test_the_papers_own_activation_and_scale_are_the_defaults(paper: Any) -> None:
    config = ours_of(paper[2]).config
    assert (config.activation_function, config.scale_embedding, config.position_layout) == ("relu", True, "interleaved")


def test_an_encoder_decoder_needs_its_first_token(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("MarianMTModel")
    for name in ("config.json", "generation_config.json"):
        words = json.loads((folder / name).read_text())
        words = {key: value for key, value in words.items() if key not in ("decoder_start_token_id", "bos_token_id")}
        (folder / name).write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=r"neither .* has a decoder_start_token_id, .* is its pad_token_id\."):
        ours_of(folder)
