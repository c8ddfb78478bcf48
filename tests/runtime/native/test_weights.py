"""Weights are the same by every way of reading them, and refused where the file is another."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leases import leases
from native_graphs import Files, libraries
from operator_lists import ENCODER, encoder_list, random_arrays
from transom.runtime.errors import BundleError
from transom.runtime.leased_file import LeasedFile
from transom.runtime.native import weights as weights_module
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.operator_list import registers_of
from transom.runtime.native.operators import OperatorList
from transom.runtime.native.weights import Weights

ALL = pytest.mark.parametrize("library", libraries()[:1])
FILE = "model.weights"


def packed(operators: OperatorList, size: int, library: NativeLibrary, read: Any) -> Weights:
    return Weights(operators, registers_of(operators, ENCODER, size), library, read)


def same(one: Weights, other: Weights) -> None:
    np.testing.assert_array_equal(one.memory.bytes, other.memory.bytes)
    assert one.vectors.keys() == other.vectors.keys()
    for name, vector in one.vectors.items():
        np.testing.assert_array_equal(vector, other.vectors[name])
    for index, panels in one.panels.items():
        np.testing.assert_array_equal(panels.column_sum, other.panels[index].column_sum)


class Leased(Files):
    """Files on a disk, each given under a lease."""

    def __init__(self, folder: Path, files: dict[str, bytes], sums: dict[str, str]) -> None:
        super().__init__(files)
        self.folder, self.sums, self.given = folder, sums, 0

    def leased(self, name: str) -> Any:
        from contextlib import closing

        path = self.folder / name
        source = path.open("rb", buffering=0)
        self.given += 1

        def compare() -> None:
            if sha256(path.read_bytes()).hexdigest() != self.sums[name]:
                raise BundleError(f"{name} does not have the SHA-256 that bundle.json says")

        from transom.runtime.leased_file import take_lease

        assert take_lease(source.fileno())
        return closing(LeasedFile(source, compare))


@ALL
@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_pieces_of_any_size_give_what_the_whole_file_gives(library: NativeLibrary, piece: int) -> None:
    operators, data = encoder_list()
    whole = packed(operators, len(data), library, {FILE: data}.__getitem__)
    same(whole, packed(operators, len(data), library, Files({FILE: data}, piece)))


@ALL
@leases
@pytest.mark.parametrize("mapped", [1, 1 << 30])
def test_a_lease_gives_what_the_whole_file_gives(
    library: NativeLibrary, tmp_path: Path, mapped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of so many bytes are mapped, smaller ones are read."""
    monkeypatch.setattr(weights_module, "MAPPED", mapped)
    operators, data = encoder_list()
    (tmp_path / FILE).write_bytes(data)
    read = Leased(tmp_path, {}, {FILE: sha256(data).hexdigest()})
    whole = packed(operators, len(data), library, {FILE: data}.__getitem__)
    same(whole, packed(operators, len(data), library, read))
    assert read.given == 1


@ALL
@leases
@pytest.mark.parametrize("mapped", [1, 1 << 30])
@pytest.mark.parametrize("size", [None, 100])
def test_another_file_under_a_lease_is_refused(
    library: NativeLibrary, tmp_path: Path, size: int | None, mapped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is too short for its tensors."""
    monkeypatch.setattr(weights_module, "MAPPED", mapped)
    operators, data = encoder_list()
    (tmp_path / FILE).write_bytes(data[:size] if size else data[:-1] + b"\0")
    with pytest.raises(BundleError, match="SHA-256"):
        packed(operators, len(data), library, Leased(tmp_path, {}, {FILE: sha256(data + b"x").hexdigest()}))


@ALL
def test_tensors_that_share_bytes_are_read_once_each(library: NativeLibrary) -> None:
    """Two names of the same place, and one that overlaps another: the whole file serves these."""
    operators, data = encoder_list()
    tensors = dict(operators.tensors)
    tensors["wk"] = tensors["wq"]
    tied = replace(operators, tensors=tensors)
    same(
        packed(tied, len(data), library, {FILE: data}.__getitem__),
        packed(tied, len(data), library, Files({FILE: data}, 100)),
    )
    tensors["wk"] = replace(tensors["wq"], offset=tensors["wq"].offset + 8)
    shifted = replace(operators, tensors=tensors)
    same(
        packed(shifted, len(data), library, {FILE: data}.__getitem__),
        packed(shifted, len(data), library, Files({FILE: data}, 100)),
    )


@ALL
def test_tables_stay_as_they_are_and_vectors_become_float32(library: NativeLibrary) -> None:
    operators, data = encoder_list()
    weights, arrays = packed(operators, len(data), library, Files({FILE: data})), random_arrays()
    words = arrays["words"].tobytes()  # float16
    place = weights.table("words") - weights.memory.address
    assert weights.memory.bytes[place : place + len(words)].tobytes() == words
    np.testing.assert_array_equal(weights.vectors["norm"], arrays["norm"])
    assert weights.vectors["up.scale"].tolist() == [np.float32(0.004)]
    assert weights.memory.address % 64 == 0
    assert all(weights.address(panels) % 64 == 0 for panels in weights.panels.values())
    sums = np.concatenate([arrays[name].astype(np.int64).sum(0) for name in ("wq", "wk", "wv")])
    np.testing.assert_array_equal(weights.panels[1].column_sum, sums)
