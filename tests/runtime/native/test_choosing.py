"""Which graphs the native kernels execute: what load chooses, says and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from native_bundles import EARLIER, change_list, with_lists
from transom.runtime import load
from transom.runtime.errors import BackendError, BundleError
from transom.runtime.native import library
from transom.runtime.selftest import selftest

IDS = {"input_ids": np.array([[1, 2, 3, 4], [5, 6, 0, 0]]), "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]])}
NATIVE = pytest.mark.skipif(
    library.native_library() is None, reason=f"no native kernels run here: {library.status().reason}"
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_lists("bert-fp32", tmp_path_factory.mktemp("native") / "bert")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_lists("transformer-fp32", tmp_path_factory.mktemp("native") / "transformer")


@pytest.fixture
def own(bert: Path, tmp_path: Path) -> Path:
    """A copy of the BERT that a test may change."""
    return Path(shutil.copytree(bert, tmp_path / "bert"))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(library.NATIVE_ISA, library.NO_KERNELS)
    library.forget()
    yield
    monkeypatch.undo()
    library.forget()


@NATIVE
def test_auto_takes_the_native_kernels(bert: Path) -> None:
    with load(bert) as loaded, load(bert, kernels="onnxruntime") as other:
        assert loaded.kernels["model"].kernels == "native"
        assert loaded.kernels["model"].reason.startswith("kernels for ")
        assert (other.kernels["model"].kernels, other.kernels["model"].reason) == ("onnxruntime", "it was asked for")
        ours, theirs = (each.run(IDS, ["sentence_embedding"])["sentence_embedding"] for each in (loaded, other))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.usefixtures("no_library")
def test_without_the_library_onnxruntime_runs_it_and_native_is_an_error(bert: Path) -> None:
    with load(bert) as loaded:
        assert loaded.kernels["model"].kernels == "onnxruntime"
        assert "TRANSOM_NATIVE_ISA=none" in loaded.kernels["model"].reason
    with pytest.raises(BackendError, match=r"'model' cannot run so: TRANSOM_NATIVE_ISA=none turns them off\. Load"):
        load(bert, kernels="native")


def test_without_a_list_onnxruntime_runs_it_and_native_is_an_error() -> None:
    with load(EARLIER / "bert-fp32") as loaded:
        assert loaded.kernels["model"].reason == "the bundle has no list of operators for it"
    with pytest.raises(BackendError, match="no list of operators"):
        load(EARLIER / "bert-fp32", kernels="native")


def test_an_unknown_word_is_refused(bert: Path) -> None:
    with pytest.raises(BackendError, match="kernels is 'own'; expected one of auto, native, onnxruntime"):
        load(bert, kernels="own")


@NATIVE
def test_a_damaged_list_is_an_error_and_no_fallback(own: Path) -> None:
    change_list(own, "model", lambda value: value["operators"][1].update(operator="softmax"))
    with pytest.raises(BundleError, match=r"operators\[1\] is 'softmax'.*kernels='onnxruntime'"):
        load(own)
    with load(own, kernels="onnxruntime") as loaded:
        loaded.run(IDS)


@NATIVE
def test_a_list_that_is_not_the_bundles_is_refused(own: Path) -> None:
    path = own / "model.operators.json"
    path.write_text(path.read_text().replace('"scale": 0.', '"scale": 1.', 1))
    with pytest.raises(BundleError, match="SHA-256"):
        load(own)


@NATIVE
def test_weights_that_changed_are_refused(own: Path) -> None:
    path = own / "model.weights"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        load(own)


@NATIVE
def test_graphs_are_chosen_one_by_one(transformer: Path, tmp_path: Path) -> None:
    """An encoder by ONNX Runtime gives its keys to a native decoder: tokens are those of both by either."""
    mixed = Path(shutil.copytree(transformer, tmp_path / "mixed"))
    words = json.loads((mixed / "bundle.json").read_text())
    del words["graphs"][0]["files"]["native"]
    from native_bundles import sign

    sign(mixed, words)
    with load(mixed) as loaded, load(transformer, kernels="onnxruntime") as other, load(transformer) as native:
        assert {name: choice.kernels for name, choice in loaded.kernels.items()} == {
            "encoder": "onnxruntime",
            "decoder": "native",
        }
        sources = [[3, 4, 5, 6, 7], [8, 9]]
        expected = other.generate(sources, max_new_tokens=6)
        assert loaded.generate(sources, max_new_tokens=6) == expected
        assert native.generate(sources, max_new_tokens=6) == expected
        assert native.generate(sources, max_new_tokens=6, num_beams=2) == other.generate(
            sources, max_new_tokens=6, num_beams=2
        )


@NATIVE
@pytest.mark.parametrize("name", ["bert-fp32", "electra-fp32", "vit-fp32", "clip-fp32", "gpt-fp32", "transformer-fp32"])
def test_selftest_holds_the_native_kernels(name: str, tmp_path: Path) -> None:
    report = selftest(with_lists(name, tmp_path / name), kernels="native")
    assert report.worst.error <= report.tolerance


@NATIVE
def test_texts_give_the_same_bits_together_and_alone(bert: Path) -> None:
    with load(bert) as loaded:
        if loaded.manifest.tokenizer is None:
            pytest.skip("the bundle has no tokenizer")
        texts = ["a", "a b c d", "", "a b"][:2] * 40
        together = loaded.embed(texts)
        for text, vector in zip(texts[:2], together, strict=False):
            np.testing.assert_array_equal(loaded.embed(text), vector)
