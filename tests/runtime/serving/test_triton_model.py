"""What a model of Triton does without Triton: its settings, and the bundles that it refuses to load."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paths import KEPT
from transom.runtime.errors import BundleError, InputError
from transom.runtime.host import usable_cores
from transom.runtime.serving import triton_model
from transom.runtime.serving.triton_model import Settings, opened, parameters_of, release, settings_of, until

PARAMETERS = {
    "bundle": "bundle",
    "bundle_sha256": "ab",
    "runtime_version": "0.1.0",
    "kind": "task",
    "device": "cpu",
    "threads": "2",
    "instances": "1",
}


def arguments(parameters: dict[str, str]) -> dict[str, str]:
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    return {"model_config": json.dumps(config), "model_repository": "/models/minilm", "model_version": "1"}


def test_settings() -> None:
    bundle = Path("/models/minilm/1/bundle")
    assert settings_of(arguments(PARAMETERS)) == Settings(bundle, "ab", "0.1.0", "task", "", "cpu", 2, 1)
    stream = {**PARAMETERS, "kind": "stream", "streams": "3"}
    assert settings_of(arguments(stream)) == Settings(bundle, "ab", "0.1.0", "stream", "", "cpu", 2, 3)
    tensors = {**PARAMETERS, "kind": "tensors", "graph": "encoder"}
    assert settings_of(arguments(tensors)) == Settings(bundle, "ab", "0.1.0", "tensors", "encoder", "cpu", 2, 1)


def test_instances_share_the_cores() -> None:
    free = {name: value for name, value in PARAMETERS.items() if name != "threads"}
    assert settings_of(arguments(free)).threads == usable_cores()
    assert settings_of(arguments({**free, "instances": "1000"})).threads == 1


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "tasks"},
        {"kind": "stream"},
        {"kind": "stream", "streams": "0"},
        {"kind": "tensors"},
        {"threads": "0"},
        {"threads": "many"},
        {"instances": "0", "threads": None},
        {"bundle": None},
        {"bundle_sha256": None},
        {"device": None},
    ],
)
def test_settings_that_are_none(change: dict[str, str | None]) -> None:
    values = {name: value for name, value in {**PARAMETERS, **change}.items() if value is not None}
    with pytest.raises(BundleError, match=r"/models/minilm/config\.pbtxt are not those that this Transom reads"):
        settings_of(arguments(values))


@pytest.fixture
def model(tmp_path: Path) -> Settings:
    """The settings of a model whose bundle is here."""
    shutil.copytree(KEPT / "bert-fp32", tmp_path / "bundle")
    sha256 = hashlib.sha256((tmp_path / "bundle" / "bundle.json").read_bytes()).hexdigest()
    return Settings(tmp_path / "bundle", sha256, "1.2.0", "task", "", "cpu", 1, 1)


@pytest.mark.parametrize("here", ["1.2.0", "1.2.0+local", "1.10.0", "2.0.0", "unknown"])
def test_a_model_of_this_transom_is_opened(model: Settings, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_model, "our_version", lambda: here)
    with opened(model) as bundle:
        assert bundle.manifest.family == "bert"


def test_a_model_whose_transom_had_no_version_is_opened(model: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_model, "our_version", lambda: "0.1.0")
    with opened(replace(model, runtime_version="")) as bundle:
        assert bundle.manifest.family == "bert"


@pytest.mark.parametrize("here", ["0.1.0", "1.1.9", "1.1.10"])
def test_a_model_of_a_newer_transom_is_refused(model: Settings, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_model, "our_version", lambda: here)
    with pytest.raises(BundleError, match=rf"written by Transom 1\.2\.0, and here is {here}\. Upgrade with `pip"):
        opened(model)


def test_another_bundle_than_was_put_there_is_refused(model: Settings) -> None:
    """A whole and sound one, too."""
    shutil.rmtree(model.bundle)
    shutil.copytree(KEPT / "vit-fp32", model.bundle)
    with pytest.raises(BundleError, match=r"bundle\.json does not have the SHA-256 that config\.pbtxt says"):
        opened(replace(model, runtime_version=""))


def test_a_changed_file_is_refused(model: Settings) -> None:
    data = (model.bundle / "model.onnx").read_bytes()
    (model.bundle / "model.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"model\.onnx does not have the SHA-256 that bundle\.json says"):
        opened(replace(model, runtime_version=""))


def test_releases() -> None:
    assert release("0.1.0") == (0, 1, 0)
    assert release("10.2.3rc1+4.5") == (10, 2, 3)
    assert release("") == ()


def test_parameters_of_the_protocol_are_none_of_the_requests() -> None:
    assert parameters_of('{"triton_enable_empty_final_response": true, "top_k": 2}') == {"top_k": 2}
    assert parameters_of("") == {}


def test_a_client_that_is_gone_costs_no_more_steps() -> None:
    made: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    found: list[Any] = []
    for piece in until(lambda: len(found) == 2, pieces()):
        found.append(piece)
    assert (found, made) == ([0, 1], [0, 1])
    assert list(until(lambda: False, pieces())) == [0, 1, 2, 3, 4]


def test_an_error_of_a_stream_is_raised() -> None:
    def pieces() -> Iterator[int]:
        yield 1
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        list(until(lambda: False, pieces()))
