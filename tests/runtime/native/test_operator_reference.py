"""The numpy oracle of fused operators, on numbers that a reader can check."""

from __future__ import annotations

import numpy as np
import pytest

from operator_reference import list_of, run_operators
from transom.runtime.native import operators as ops

IDS = np.array([[1, 2, 0], [2, 0, 0]])
MASK = np.array([[1, 1, 0], [1, 0, 0]])
TABLE = np.array([[9, 9], [1, 2], [3, -4]], np.float32)


def embed(**then: object) -> ops.Embed:
    return ops.Embed((ops.Table("table", "input_ids"),), ops.Epilogue(**then))  # type: ignore[arg-type]


def test_rows_are_those_that_the_mask_keeps() -> None:
    made, data = list_of({"table": TABLE}, embed(out="x"), ops.Unpack("x", "hidden"), mask="attention_mask")
    registers: dict[str, np.ndarray] = {}
    out = run_operators(made, data, {"input_ids": IDS, "attention_mask": MASK}, registers=registers)
    assert registers["x"].tolist() == [[1, 2], [3, -4], [3, -4]]
    assert out["hidden"].tolist() == [[[1, 2], [3, -4], [0, 0]], [[3, -4], [0, 0], [0, 0]]]


def test_an_integer_linear_gives_what_its_steps_mean() -> None:
    weight = np.array([[2, 0], [0, -3]], np.int8)
    arrays = {"table": TABLE, "w": weight, "scale": np.array([0.5, 2], np.float32), "b": np.array([1, 0], np.float32)}
    made, data = list_of(
        arrays,
        embed(quantized=ops.Quantized("q", 0.5, 10)),
        ops.Linear("q", ops.TOKENS, ("w",), ops.Epilogue(bias=("b",), out="y"), scales=("scale",)),
    )
    registers: dict[str, object] = {}
    run_operators(made, data, {"input_ids": np.array([[1, 2]])}, registers=registers)
    assert registers["q"].values.tolist() == [[12, 14], [16, 2]]  # type: ignore[attr-defined]
    # 1 * 2 * 0.5 + 1, 2 * -3 * 2; 3 * 2 * 0.5 + 1, -4 * -3 * 2
    assert registers["y"].tolist() == [[2, -12], [4, 24]]  # type: ignore[attr-defined]


def test_rows_by_their_own_scale_have_128_for_zero() -> None:
    made, data = list_of({"table": TABLE}, embed(quantized=ops.Quantized("q", None, 128)))
    registers: dict[str, object] = {}
    run_operators(made, data, {"input_ids": np.array([[2]])}, registers=registers)
    assert registers["q"].values.tolist() == [[223, 1]]  # type: ignore[attr-defined]  # 3 * 127 / 4 = 95.25


@pytest.mark.parametrize(("causal", "first"), [(False, 2.0), (True, 1.0)])
def test_attention_of_equal_scores_is_the_mean_of_what_a_row_sees(causal: bool, first: float) -> None:
    x = ops.Table("table", "input_ids")
    made, data = list_of(
        {"table": np.array([[0, 0, 0], [0, 0, 1], [0, 0, 3]], np.float32)},
        ops.Embed((x,), ops.Epilogue(out="x")),
        ops.Attention("x", ops.Epilogue(out="y"), 1, 1, 1, 1.0, "x", "x", 0, 1, 2, causal=causal),
        mask="attention_mask",
    )
    registers: dict[str, np.ndarray] = {}
    run_operators(made, data, {"input_ids": IDS, "attention_mask": MASK}, registers=registers)
    assert registers["y"].tolist() == [[first], [2.0], [3.0]]


def test_a_cache_is_written_from_where_it_ends() -> None:
    cache = np.zeros((1, 1, 4, 1), np.float32)
    cache[0, 0, 0] = 5
    made, data = list_of(
        {"table": np.array([[0, 0, 0], [0, 0, 1], [0, 0, 3]], np.float32)},
        ops.Embed((ops.Table("table", "input_ids"),), ops.Epilogue(out="x")),
        ops.Attention(
            "x", ops.Epilogue(out="y"), 1, 1, 1, 1.0, "x", "x", 0, 1, 2, key_cache="key_cache.0",
            value_cache="value_cache.0",
        ),
    )  # fmt: skip
    feeds = {"input_ids": np.array([[1, 2]]), "write_indices": np.array([1]), "key_cache.0": cache * 0}
    registers: dict[str, np.ndarray] = {}
    out = run_operators(made, data, {**feeds, "value_cache.0": cache}, registers=registers)
    assert out["value_cache.0"].reshape(-1).tolist() == [5, 1, 3, 0]
    assert registers["y"].tolist() == [[3.0], [3.0]]  # (5 + 1) / 2, (5 + 1 + 3) / 3


def test_a_chosen_row_that_is_masked_out_is_computed_on_demand() -> None:
    made, data = list_of(
        {"table": TABLE},
        embed(out="x"),
        ops.Select("x", ops.SEQUENCES, ops.FIRST, ops.Epilogue(out="first")),
        ops.Pool("x", ops.Epilogue(out="mean")),
        mask="attention_mask",
        outputs={"first": "first_row", "mean": "mean_row"},
    )
    feeds = {"input_ids": np.array([[0, 1, 2]]), "attention_mask": np.array([[0, 1, 1]])}
    out = run_operators(made, data, feeds, compute_masked=True)
    assert out["first_row"].tolist() == [[9, 9]]
    assert out["mean_row"].tolist() == [[2, -1]]
