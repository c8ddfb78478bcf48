"""Loaded bundles: raw runs, threads, devices, and what a wrong input is told."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import changed_bundle
from paths import KEPT
from transom.runtime import load
from transom.runtime.errors import BackendError, BundleError, InputError, ShapeError


def feeds(B: int, S: int, seed: int = 0) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(0, 90, (B, S))
    mask = np.ones((B, S), np.int64)
    mask[0, S // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((B, S), np.int64)}


def test_run_gives_every_output_with_its_declared_shape(bert_bundle: Path) -> None:
    with load(bert_bundle) as bert:
        outputs = bert.run(feeds(2, 7))
    assert {name: (array.shape, array.dtype) for name, array in outputs.items()} == {
        "pooler_output": ((2, 160), np.float32),
        "last_hidden_state": ((2, 7, 160), np.float32),
        "sentence_embedding": ((2, 160), np.float32),
    }


def test_outputs_can_be_chosen_and_inputs_left_out(bert_bundle: Path) -> None:
    given = feeds(2, 7)
    ones = {**given, "attention_mask": np.ones((2, 7), np.int64)}
    with load(bert_bundle) as bert:
        alone = bert.run({"input_ids": given["input_ids"]}, ["pooler_output"])
        assert list(alone) == ["pooler_output"]
        np.testing.assert_array_equal(alone["pooler_output"], bert.run(ones)["pooler_output"])


def test_outputs_are_copies(bert_bundle: Path) -> None:
    with load(bert_bundle) as bert:
        first = bert.run(feeds(2, 7))["pooler_output"]
        kept = first.copy()
        bert.run(feeds(2, 7, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_padding_and_neighbours_do_not_change_a_row(bert_bundle: Path) -> None:
    given = feeds(3, 13)
    length = int(given["attention_mask"][0].sum())
    with load(bert_bundle) as bert:
        together = bert.run(given)["sentence_embedding"][0]
        alone = bert.run({"input_ids": given["input_ids"][:1, :length]})["sentence_embedding"][0]
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max()


def test_not_contiguous_and_read_only_inputs(bert_bundle: Path) -> None:
    given = feeds(4, 13)
    strided = {name: np.asfortranarray(array)[::2] for name, array in given.items()}
    for array in strided.values():
        array.flags.writeable = False
    with load(bert_bundle) as bert:
        expected = bert.run({name: array[::2].copy() for name, array in given.items()})
        np.testing.assert_array_equal(bert.run(strided)["pooler_output"], expected["pooler_output"])


def test_32_threads_get_the_serial_answers(bert_bundle: Path) -> None:
    requests = [feeds(1 + i % 5, 1 + i % 19, seed=i) for i in range(160)]
    with load(bert_bundle, threads=1) as bert:
        serial = [bert.run(request) for request in requests]
        with ThreadPoolExecutor(32) as pool:
            threaded = list(pool.map(bert.run, requests))
        submitted = [future.result() for future in [bert.submit(request) for request in requests]]
    for one, two, three in zip(serial, threaded, submitted, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
            np.testing.assert_array_equal(one[name], three[name])


def test_a_submitted_error_comes_out_of_the_future(bert_bundle: Path) -> None:
    with load(bert_bundle) as bert, pytest.raises(InputError):
        bert.submit({"input_ids": [1]}).result()


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([1, 2], InputError, "expected a dict"),
        ({}, InputError, "'input_ids' is missing"),
        (
            {"ids": np.zeros((1, 1), np.int64)},
            InputError,
            "unknown input 'ids'; this bundle takes input_ids, attention",
        ),
        ({"input_ids": [[1]]}, InputError, "is a list; expected a numpy array of int64"),
        ({"input_ids": np.zeros((1, 1), np.int32)}, InputError, r"dtype int32; expected int64.*astype\(np\.int64\)"),
        ({"input_ids": np.zeros((1, 1), np.float32)}, InputError, "dtype float32; expected int64"),
        ({"input_ids": np.zeros((1, 1), ">i8")}, InputError, "dtype >i8; expected int64"),
        ({"input_ids": np.zeros(4, np.int64)}, ShapeError, r"shape \(4,\); expected 2 axes \(B, S\)"),
        (
            {"input_ids": np.zeros((1, 68), np.int64)},
            ShapeError,
            r"axis S allows 1\.\.67\. The model has 67 positions; give no more",
        ),
        ({"input_ids": np.zeros((17, 1), np.int64)}, ShapeError, r"axis B allows 1\.\.16\. .*--max B=17"),
        ({"input_ids": np.zeros((0, 3), np.int64)}, ShapeError, r"axis B allows 1\.\.16"),
        ({"input_ids": np.full((1, 1), 10**6)}, InputError, r"holds 1000000; expected values in 0\.\.\d+"),
        ({"input_ids": np.full((1, 1), -1)}, InputError, "holds -1"),
        (
            {"input_ids": np.zeros((2, 3), np.int64), "attention_mask": np.zeros((2, 4), np.int64)},
            ShapeError,
            "another input has S=3",
        ),
    ],
)
def test_wrong_inputs(bert_bundle: Path, inputs: Any, error: type[Exception], message: str) -> None:
    with load(bert_bundle) as bert, pytest.raises(error, match=message):
        bert.run(inputs)


def test_a_wrong_fixed_size_and_an_unknown_output(vit_bundle: Path) -> None:
    with load(vit_bundle) as vit:
        with pytest.raises(ShapeError, match=r"\(1, 3, 9, 8\); expected \(B, 3, 8, 8\): this axis is fixed at 8"):
            vit.run({"pixel_values": np.zeros((1, 3, 9, 8), np.float32)})
        with pytest.raises(InputError, match="unknown output 'probs'; this bundle has logits, last_hidden_state"):
            vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}, ["probs"])


def test_a_closed_bundle_says_so(bert_bundle: Path) -> None:
    bert = load(bert_bundle)
    bert.close()
    bert.close()
    for call in (bert.run, bert.submit):
        with pytest.raises(BackendError, match="closed; load it again"):
            call(feeds(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "'cuda' was asked for; onnxruntime .* offers .*CPUExecutionProvider"),
        ({"device": "tpu"}, "device is 'tpu'; this version runs on cpu, cuda, tensorrt, auto"),
        ({"threads": 0}, r"threads is 0; expected 1\.\.1024"),
        ({"threads": "2"}, "threads is '2'"),
    ],
)
def test_devices_and_threads_that_are_not_there(bert_bundle: Path, options: Any, message: str) -> None:
    import onnxruntime

    if options.get("device") == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(BackendError, match=message):
        load(bert_bundle, **options)


def test_auto_is_the_cpu_where_nothing_else_is(bert_bundle: Path) -> None:
    import onnxruntime

    expected = "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    with load(bert_bundle, device="auto") as bert:
        assert bert.device == expected


BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "huggingface_hub"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transom.runtime import load
with load(sys.argv[1]) as bert:
    print(bert.embed(["the first word", "a city in france"]).shape)
with load(sys.argv[2]) as vit:
    import numpy as np
    print(len(vit.classify(np.zeros((8, 8, 3), np.uint8))))
from transom.runtime.selftest import selftest
print(len(selftest(sys.argv[1]).cases) > 0)
import os
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


def test_the_runtime_works_where_torch_and_onnx_are_absent(bert_bundle: Path, vit_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(bert_bundle), str(vit_bundle)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:4] == ["(2, 160)", "5", "True", "1"]


def test_a_graph_has_the_names_and_dtypes_of_bundle_json(tmp_path: Path) -> None:
    def renamed(words: dict[str, Any]) -> None:
        (logits,) = (each for each in words["graphs"][0]["outputs"] if each["name"] == "logits")
        logits["name"] = "scores"

    kept = KEPT / "vit-fp32"
    with pytest.raises(BundleError, match=r"model\.onnx and bundle\.json disagree about logits, scores\. Export"):
        load(changed_bundle(kept, tmp_path, renamed), threads=1)
