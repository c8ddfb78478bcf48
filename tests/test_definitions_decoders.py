"""The decoders' definitions against transformers' and torch.nn.Transformer: same weights, same inputs, FP32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from transom.export.source import load_source
from transom.models.transformer import sinusoids
from transom.runtime.errors import CheckpointError

WORST = 1e-5  # max|ours - theirs| / max|theirs|
MakeCheckpoint = Callable[..., Path]
SMALL = {"n_embd": 26, "n_layer": 2, "n_head": 2, "n_inner": 31}  # for what needs no awkward size
SMALL_MARIAN = {
    "d_model": 26, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 31, "decoder_ffn_dim": 29,
}  # fmt: skip


def ours_of(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"task": None, "max_sizes": {}, "image_size": None, "ignore_unused": False}
    return load_source(str(folder), **{**defaults, **options})


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None takes one out."""
    words = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in words.items() if value != "absent"}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def empty_caches(loaded: Any, B: int, C: int) -> list[torch.Tensor]:
    return [
        torch.zeros(B, tensor.shape[1], C, tensor.shape[3])
        for tensor in loaded.graphs[-1].inputs
        if "_cache." in tensor.name
    ]


def decode(
    loaded: Any,
    ids: torch.Tensor,
    chunks: Sequence[int] | None = None,
    source: Sequence[torch.Tensor] = (),
    C: int | None = None,
) -> torch.Tensor:
    """Logits (B, S, V) behind every token, read in chunks of these lengths; ``source`` is the mask and cross pairs."""
    B, S = ids.shape
    caches = empty_caches(loaded, B, C or S)
    module = loaded.parts()["decoder"]
    mask, cross = source[:1], source[1:]
    found, first = [], 0
    for n in chunks or [S]:
        begin, wanted = torch.full((B,), first), torch.arange(n).expand(B, n)
        with torch.no_grad():
            logits, *written = module(ids[:, first : first + n], *mask, begin, wanted, *cross, *caches)
        for new, cache in zip(written, caches, strict=True):
            assert new.data_ptr() == cache.data_ptr()  # in place
        found.append(logits)
        first += n
    assert first == S
    return torch.cat(found, dim=1)


def translate(
    loaded: Any, ids: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, chunks: Any = None
) -> torch.Tensor:
    with torch.no_grad():
        _, *cross = loaded.parts()["encoder"](ids, mask)
    return decode(loaded, target, chunks, (mask, *cross))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= WORST * float(expected.abs().max())


def logits_of(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- GPT-2


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
    assert (encoder.inputs[0].below, decoder.inputs[0].below) == (101, 53)
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
