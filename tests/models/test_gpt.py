"""GPT-2's definition against transformers': same weights, same inputs, FP32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from decoder_definitions import (
    SMALL_MARIAN,
    MakeCheckpoint,
    assert_close,
    decode,
    edit,
    empty_caches,
    logits_of,
    ours_of,
)
from edited_checkpoints import edit_weights
from transom.runtime.errors import CheckpointError

SMALL = {"n_embd": 26, "n_layer": 2, "n_head": 2, "n_inner": 31}  # for what needs no awkward size


@pytest.mark.parametrize(
    ("B", "S", "chunks"),
    [(1, 1, None), (3, 67, None), (2, 13, None), (2, 13, [5, 1, 7]), (1, 67, [66, 1]), (2, 7, [1] * 7)],
)
def test_gpt2_equals_transformers(gpt2: tuple[Any, Any], B: int, S: int, chunks: list[int] | None) -> None:
    theirs, loaded = gpt2
    torch.manual_seed(S)
    ids = torch.randint(0, 101, (B, S))
    assert_close(decode(loaded, ids, chunks), logits_of(theirs, input_ids=ids))
    assert_close(decode(loaded, ids, chunks, C=67), logits_of(theirs, input_ids=ids))


@pytest.fixture(scope="module")
def gpt2(make_checkpoint: MakeCheckpoint) -> tuple[Any, Any]:
    folder = make_checkpoint("GPT2LMHeadModel")
    return transformers.GPT2LMHeadModel.from_pretrained(folder), ours_of(folder)


def test_rows_of_a_batch_stand_where_they_like(gpt2: tuple[Any, Any]) -> None:
    """Prompts of 7, 1 and 4 tokens padded with another token each, then 3 more tokens at their own ends."""
    theirs, loaded = gpt2
    torch.manual_seed(1)
    ids, lengths = torch.randint(0, 101, (3, 10)), torch.tensor([7, 1, 4])
    caches, module = empty_caches(loaded, 3, 13), loaded.parts()["decoder"]
    with torch.no_grad():
        last = module(ids[:, :7], torch.zeros(3, dtype=torch.long), (lengths - 1)[:, None], *caches)[0]
        new = torch.stack([row[n : n + 3] for row, n in zip(ids, lengths, strict=True)])
        more = module(new, lengths, torch.arange(3).expand(3, 3), *caches)[0]
    for row, n in enumerate(lengths.tolist()):
        alone = logits_of(theirs, input_ids=ids[row : row + 1, : n + 3])[0]
        assert_close(last[row, 0], alone[n - 1])
        assert_close(more[row], alone[n:])


def test_logits_come_in_the_order_asked_for(gpt2: tuple[Any, Any]) -> None:
    theirs, loaded = gpt2
    ids = torch.arange(22).reshape(2, 11)
    wanted = torch.tensor([[10, 0, 3], [4, 4, 9]])
    with torch.no_grad():
        found = loaded.module(ids, torch.zeros(2, dtype=torch.long), wanted, *empty_caches(loaded, 2, 11))[0]
    expected = logits_of(theirs, input_ids=ids)
    assert_close(found, torch.stack([expected[row, wanted[row]] for row in range(2)]))


@pytest.mark.parametrize(
    "config",
    [
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"n_inner": None},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "tanh"},
        {"layer_norm_epsilon": 0.03},
        {"n_head": 26},
        {"reorder_and_upcast_attn": True},  # a matter of rounding in half precision alone
    ],
    ids=lambda config: "-".join(f"{name}={value}" for name, value in config.items()),
)
def test_gpt2_settings(make_checkpoint: MakeCheckpoint, config: dict[str, Any]) -> None:
    folder = make_checkpoint("GPT2LMHeadModel", **{**SMALL, **config})
    theirs, loaded = transformers.GPT2LMHeadModel.from_pretrained(folder), ours_of(folder)
    ids = torch.arange(26).reshape(2, 13)
    assert_close(decode(loaded, ids, [6, 7]), logits_of(theirs, input_ids=ids))


def test_gpt2_as_older_checkpoints_store_it(make_checkpoint: MakeCheckpoint) -> None:
    """Without the prefix, with the causal masks, with a copy of the tied head: the hub's gpt2 is such a one."""
    folder = make_checkpoint("GPT2LMHeadModel", **SMALL)
    before = {name: value.clone() for name, value in ours_of(folder).module.state_dict().items()}

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 67, 67).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_weights(folder, age)
    edit(folder, tie_word_embeddings="absent", n_inner=31)
    loaded = ours_of(folder)
    assert loaded.left_out == [
        "h.0.attn.bias", "h.0.attn.masked_bias", "h.1.attn.bias", "h.1.attn.masked_bias", "lm_head.weight",
    ]  # fmt: skip
    found = loaded.module.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(before[name], found[name]) for name in before)


def test_boolean_masks_of_older_checkpoints(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("GPT2LMHeadModel", **SMALL)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 67, 67, dtype=torch.uint8).tril() for i in range(2)}
    edit_weights(folder, lambda tensors: tensors.update(masks))
    assert sorted(ours_of(folder).left_out) == sorted(masks)


def test_biases_of_the_projections_are_no_masks(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("GPT2LMHeadModel", **SMALL)
    edit_weights(folder, lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.bias"))
    with pytest.raises(CheckpointError, match=r"missing: transformer\.h\.1\.attn\.c_attn\.bias"):
        ours_of(folder)


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.decoder.embed_tokens.weight"])
def test_copies_of_one_weight_that_differ_are_refused(make_checkpoint: MakeCheckpoint, stored: str) -> None:
    """transformers would load both and not tie them, whatever config.json says."""
    if stored == "lm_head.weight":
        folder, original = make_checkpoint("GPT2LMHeadModel", **SMALL), "transformer.wte.weight"
    else:
        folder, original = make_checkpoint("MarianMTModel", **SMALL_MARIAN), "model.shared.weight"
    edit_weights(folder, lambda tensors: tensors.update({stored: tensors[original] + 1e-3}))
    with pytest.raises(CheckpointError, match=f"{stored} differs from {original}, though by config.json they are one"):
        ours_of(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 7}, "n_embd 26 is no multiple of n_head 7"),
        ({"n_embd": "26"}, "n_embd is '26', expected an integer"),
        ({"n_embd": None}, "n_embd is None, expected an integer"),
        ({"n_positions": 0}, "n_positions is 0"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, expected an integer in 1..1000"),
        ({"n_inner": -1}, "n_inner is -1"),
        ({"n_inner": "big"}, "n_inner is 'big'"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"activation_function": "mish"}, "activation_function is 'mish', expected one of gelu"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"scale_attn_weights": "yes"}, "scale_attn_weights is 'yes', expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "'GPT2DoubleHeadsModel'.*GPT2LMHeadModel"),
        ({"n_inner": 32}, r"c_fc\.weight has shape \(26, 31\), config\.json asks for \(26, 32\)"),
        ({"vocab_size": 102}, r"wte\.weight has shape \(101, 26\), config\.json asks for \(102, 26\)"),
        ({"n_layer": 3}, r"missing: transformer\.h\.2\.ln_1\.weight"),
        ({"n_layer": 1}, r"unused: transformer\.h\.1\.attn\.c_attn\.bias"),
    ],
)
def test_gpt2_configs_that_cannot_be_used(
    make_checkpoint: MakeCheckpoint, changes: dict[str, Any], message: str
) -> None:
    folder = make_checkpoint("GPT2LMHeadModel", **SMALL)
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ours_of(folder)
    assert "\n" not in str(caught.value)
