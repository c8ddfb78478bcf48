"""A server of KServe for all tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serving_engines import BUNDLES, SERVED, server

if TYPE_CHECKING:  # where kserve is not installed, the files of tests are not read
    from kserve_requests import Running


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of every kept FP32 bundle and one of FP16, their tensors too, and of one that fails its hashes, torn."""
    from kserve_requests import GRPC, HALF, REST, Running

    folder = tmp_path_factory.mktemp("kserve")
    torn = Path(shutil.copytree(BUNDLES[0], folder / "torn"))
    graph = next(torn.glob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    found, command = Running.command(folder / "log", *BUNDLES, HALF, torn, "--tensors")
    with server(command, lambda: found.ready(REST, "bert-fp32") and found.ready(GRPC, "bert-fp32"), found.log):
        yield found


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, reference_bundles: Path) -> Iterator[Running]:
    """A server of the reference bundles, which have tokenizers, longer texts and more rows."""
    from kserve_requests import GRPC, Running

    paths = [reference_bundles / name for name in SERVED]
    found, command = Running.command(tmp_path_factory.mktemp("references") / "log", *paths)
    with server(command, lambda: found.ready(GRPC, SERVED[-1]), found.log):
        yield found
