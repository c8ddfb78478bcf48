"""Small lists of operators and their graphs: an encoder with a mask, a decoder with caches, an encoder of images.

Weights are random, sizes small enough to follow by hand: 8 columns, 2 heads of 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from operator_reference import tensors_of
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.native.operators import (
    COLUMN,
    EVERY,
    FIRST,
    INDICES,
    LAYER,
    POSITIONS,
    SEQUENCES,
    TOKENS,
    Attention,
    Embed,
    Epilogue,
    Linear,
    Norm,
    OperatorList,
    Patches,
    Pool,
    Prepend,
    Quantized,
    Select,
    Table,
    Unpack,
)

WORDS, HIDDEN, HEADS, SIZE, FFN, PLACES = 32, 8, 2, 4, 16, 64
NORM = Norm(LAYER, 1e-5, "norm", "norm.bias")

ENCODER = Graph(
    "model",
    (
        Tensor("input_ids", "int64", ("B", "S"), exclusive_max=WORDS),
        Tensor("attention_mask", "int64", ("B", "S"), default=1, exclusive_max=2),
    ),
    (
        Tensor("last_hidden_state", "float32", ("B", "S", HIDDEN)),
        Tensor("pooler_output", "float32", ("B", HIDDEN)),
        Tensor("mean", "float32", ("B", HIDDEN)),
    ),
)


def cache(name: str) -> Tensor:
    return Tensor(name, "float32", ("B", HEADS, "C", SIZE), default=0, state=True)


DECODER = Graph(
    "decoder",
    (
        Tensor("input_ids", "int64", ("B", "S"), exclusive_max=WORDS),
        Tensor("write_indices", "int64", ("B",), default=0),
        Tensor("logits_positions", "int64", ("B", "P"), default="arange"),
        cache("key_cache.0"),
        cache("value_cache.0"),
    ),
    (
        Tensor("logits", "float32", ("B", "P", WORDS)),
        Tensor("key_cache.0.out", "float32", ("B", HEADS, "C", SIZE), state=True, aliases="key_cache.0"),
        Tensor("value_cache.0.out", "float32", ("B", HEADS, "C", SIZE), state=True, aliases="value_cache.0"),
    ),
)
VISION = Graph(
    "vision",
    (Tensor("pixel_values", "float32", ("B", 3, 4, 6)),),
    (Tensor("last_hidden_state", "float32", ("B", 7, HIDDEN)), Tensor("logits", "float32", ("B", 5))),
)


def random_arrays(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Weights by name, float32 and int8, all of one width."""
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / 2).astype(np.float32)

    def whole(*shape: int) -> NDArray[np.int8]:
        return rng.integers(-127, 128, shape, np.int8)

    found: dict[str, NDArray[Any]] = {
        "words": floats(WORDS, HIDDEN).astype(np.float16),
        "places": floats(PLACES, HIDDEN),
        "norm": 1 + floats(HIDDEN) / 4,
        "norm.bias": floats(HIDDEN),
        "up": whole(FFN, HIDDEN),
        "up.scale": np.asarray(0.004, np.float32),
        "up.bias": floats(FFN),
        "down": whole(FFN, HIDDEN),
        "down.scale": np.abs(floats(HIDDEN)) / 50,
        "square": floats(HIDDEN, HIDDEN),
        "square.half": floats(HIDDEN, HIDDEN).astype(np.float16),
        "wide": floats(HIDDEN, 3 * HIDDEN),
        "head": floats(5, HIDDEN),
        "first": floats(HIDDEN),
        "image.places": floats(7, HIDDEN),
        "patch": floats(HIDDEN, 12),
    }
    for part in "qkv":
        found |= {f"w{part}": whole(HIDDEN, HIDDEN), f"b{part}": floats(HIDDEN)}
        found[f"s{part}"] = np.abs(floats(HIDDEN)) / 50
    return found


def list_with(graph: str, ids: str, *operators: Any, **fields: Any) -> tuple[OperatorList, bytes]:
    tensors, data = tensors_of(random_arrays())
    return OperatorList(graph, "model.weights", ids, fields.pop("mask", None), operators, tensors, **fields), data


def embed(*tables: Table) -> Embed:
    return Embed(tables, Epilogue(norm=NORM, out="hidden", quantized=Quantized("hidden.u8", None, 128)))


def encoder_list() -> tuple[OperatorList, bytes]:
    """INT8: rows quantised by their own scale, a static scale between the two products of the MLP."""
    return list_with(
        "model",
        "input_ids",
        embed(Table("words", "input_ids"), Table("places", COLUMN, 0.5)),
        Linear(
            "hidden.u8", TOKENS, ("wq", "wk", "wv"),
            Epilogue(("bq", "bk", "bv"), out="qkv"), False, ("sq", "sk", "sv"),
        ),
        Attention(
            "qkv", Epilogue(out="context"), HEADS, HEADS, SIZE, 0.5, "qkv", "qkv", key_column=8, value_column=16
        ),
        Linear(
            "hidden.u8", TOKENS, ("up",),
            Epilogue(("up.bias",), "gelu", quantized=Quantized("ffn.u8", 0.05, 7)), True, ("up.scale",),
        ),
        Linear(
            "ffn.u8", TOKENS, ("down",),
            Epilogue((), residual="context", sum="sum", norm=NORM, out="last"), False, ("down.scale",),
        ),
        Unpack("last", "last_hidden_state"),
        Select("last", SEQUENCES, FIRST, Epilogue(out="first row")),
        Linear("first row", SEQUENCES, ("square.half",), Epilogue(("bq",), "tanh", out="pooled")),
        Pool("last", Epilogue(norm=Norm("l2", 1e-12), out="pool")),
        mask="attention_mask",
        outputs={"pooled": "pooler_output", "pool": "mean"},
        counts={"attention": 1},
    )  # fmt: skip


def decoder_list() -> tuple[OperatorList, bytes]:
    """FP32 with tied embeddings."""
    return list_with(
        "decoder",
        "input_ids",
        Embed((Table("words", "input_ids"), Table("places", COLUMN)), Epilogue(sum="hidden", norm=NORM, out="normed")),
        Linear("normed", TOKENS, ("wide",), Epilogue(("bq", "bk", "bv"), out="qkv")),
        Attention(
            "qkv", Epilogue(out="context"), HEADS, HEADS, SIZE, 0.5, "qkv", "qkv", key_column=8, value_column=16,
            causal=True, key_cache="key_cache.0", value_cache="value_cache.0",
        ),
        Linear("context", TOKENS, ("square",), Epilogue(residual="hidden", out="last")),
        Select("last", POSITIONS, INDICES, Epilogue(norm=NORM, out="chosen"), "logits_positions"),
        Linear("chosen", POSITIONS, ("words",), Epilogue(out="logits"), True),
        outputs={"logits": "logits"},
    )  # fmt: skip


def vision_list() -> tuple[OperatorList, bytes]:
    return list_with(
        "vision",
        "pixel_values",
        Patches("pixel_values", 2, 2, Epilogue(out="patches")),
        Linear("patches", "patches", ("patch",), Epilogue(("bq",), out="embedded"), True),
        Prepend("embedded", "first", "image.places", Epilogue(sum="hidden", norm=NORM, out="normed")),
        Linear("normed", TOKENS, ("wide",), Epilogue(("bq", "bk", "bv"), out="qkv")),
        Attention("qkv", Epilogue(out="context"), HEADS, 1, SIZE, 0.5, "qkv", "qkv", key_column=8, value_column=16),
        Linear("context", TOKENS, ("square",), Epilogue(residual="hidden", out="last")),
        Select("last", TOKENS, EVERY, Epilogue(norm=NORM, out="final")),
        Unpack("final", "last_hidden_state"),
        Select("final", SEQUENCES, FIRST, Epilogue(out="first row")),
        Linear("first row", SEQUENCES, ("head",), Epilogue(out="logits"), True),
        outputs={"logits": "logits"},
    )
