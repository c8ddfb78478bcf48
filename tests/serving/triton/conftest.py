"""One real server for all tests of this folder, on a repository that `transom repository` would write."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paths import KEPT
from serving_engines import BUNDLES, REFERENCES

if TYPE_CHECKING:
    from triton_requests import Triton

INTEGERS = [KEPT / name for name in ("bert-int8", "gpt-int8", "vit-int8")]
MAX_BATCH, QUEUE_DELAY_US = 8, 100_000  # long: requests that threads send at once are put together
BROKEN = ("changed_file", "changed_manifest", "newer_runtime")


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """The server: each small bundle in FP32, some in INT8, the reference GPT where it is, and BROKEN ones of BERT."""
    from transom.export.triton.repository import Options, write_repository
    from triton_requests import running

    folder = tmp_path_factory.mktemp("triton")
    models = folder / "models"
    settings = {"threads": 1, "instances": 1, "max_batch": MAX_BATCH, "queue_delay_us": QUEUE_DELAY_US}
    write_repository(models, BUNDLES, Options(kinds=("task", "stream", "tensors"), **settings))
    references = [path for path in (REFERENCES / "gpt",) if (path / "bundle.json").is_file()]
    write_repository(models, [*INTEGERS, *references], Options(kinds=("task", "stream"), **settings))
    break_models(models)
    with running(models, log=folder / "server.log") as server:
        yield server


def break_models(models: Path) -> None:
    """Add models like bert-fp32, each with something wrong that the server must notice when it starts."""
    for name in BROKEN:
        shutil.copytree(models / "bert-fp32", models / name)  # copies: the original is hard-linked
        change(models / name / "config.pbtxt", 'name: "bert-fp32"', f'name: "{name}"')
    graph = models / "changed_file" / "1" / "bundle" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    manifest = models / "changed_manifest" / "1" / "bundle" / "bundle.json"
    manifest.write_text(manifest.read_text() + "\n")
    config = models / "newer_runtime" / "config.pbtxt"
    change(config, f'string_value: "{version_in(config)}"', 'string_value: "99.0.0"')


def version_in(config: Path) -> str:
    """Return the runtime_version that a config.pbtxt names."""
    return config.read_text().split('key: "runtime_version"')[1].split('string_value: "')[1].split('"')[0]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))
