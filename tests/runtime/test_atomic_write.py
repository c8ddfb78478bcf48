"""A file is replaced whole or not at all, and a failed write leaves nothing beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from transom.runtime.atomic_write import replacing, write_bytes


def test_the_bytes_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [*tmp_path.iterdir()] == [path]


def test_a_write_that_fails_leaves_the_old_bytes_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:  # noqa: PT012
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "none" / "a", b"")
