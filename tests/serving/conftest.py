"""The engines' tests run in environments of their own: `make serving-env`, then `make test-serving`.

Elsewhere, so in `make test`, they are skipped, and pytest shows why. No torch and no onnx here: what is served needs
neither.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving_engines import BUNDLES, REFERENCES, SERVED
from transom.runtime import load
from transom.runtime.session import LoadedBundle

ENGINES = {"triton": "pytriton", "ray": "ray", "kserve": "kserve"}  # folder of tests -> module that it needs


class Skipped(pytest.Module):
    """A file of tests that is not read, since it imports what is not installed."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        engine = self.path.parent.name
        pytest.skip(f"no {engine} here: run make serving-env and make test-serving", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """pytest's hook."""
    module = ENGINES.get(module_path.parent.name)
    if module is None or importlib.util.find_spec(module):
        return None
    skipped: Skipped = Skipped.from_parent(parent, path=module_path)
    return skipped


@pytest.fixture(params=BUNDLES, ids=lambda path: path.name)
def kept(request: pytest.FixtureRequest) -> Iterator[LoadedBundle]:
    """Each small bundle in FP32, one of every family at least; loaded, with one thread."""
    with load(request.param, threads=1) as bundle:
        yield bundle


@pytest.fixture(scope="session")
def reference_bundles() -> Path:
    """The folder of the exported reference bundles SERVED; `make test-serving` makes them."""
    missing = [name for name in SERVED if not (REFERENCES / name / "bundle.json").is_file()]
    if missing:
        pytest.skip(f"{REFERENCES} has no {missing[0]}: run make test-serving")
    return REFERENCES
