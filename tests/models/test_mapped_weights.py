"""Weights that share the memory of their mapped file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transom.models.mapped_weights import MappedWeights
from transom.runtime.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, made)
    return made


def test_tensors_are_those_of_the_file(path: Path) -> None:
    mapped = MappedWeights(path)
    assert sorted(mapped) == ["a", "b"]
    assert mapped.tensor("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert mapped.tensor("b").tolist() == [0, 1, 2, 3]
    mapped.require_unchanged()
    mapped.give_back()
    assert mapped.tensor("a").sum() == 15


def edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(1, 1))  # a clock that is coarse could show the time of before


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [edit, replace, Path.unlink])
def test_a_file_that_changes_is_noticed(path: Path, change: Callable[[Path], None]) -> None:
    mapped = MappedWeights(path)
    change(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was exported; expected the same"):
        mapped.require_unchanged()
