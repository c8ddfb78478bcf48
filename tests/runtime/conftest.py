"""Fixtures of the tests of the runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from paths import KEPT


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[str], Path]:
    """Return ``kept(name)`` -> a copy of a kept bundle, to be damaged."""
    return lambda name: Path(shutil.copytree(KEPT / name, tmp_path / name))
