"""Read raw arrays from a .npz file, write them into one, or summarise them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.runtime.errors import InputError

if TYPE_CHECKING:
    from transom.runtime.backends.base import Array


MAX_BYTES = 4 << 30  # unpacked; 7,000 images of 224x224 pixels


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the arrays of a .npz file by name. Raises InputError when it is none, or holds pickled objects."""
    import numpy as np

    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise ValueError("it is no regular file")
        with (
            path.open("rb") as opened,
            np.load(opened, allow_pickle=False) as file,
        ):  # which would leave a damaged one open
            size = sum(entry.file_size for entry in file.zip.infolist())
            if size > MAX_BYTES:  # a few kilobytes of a file can hold any number of zeros
                raise ValueError(f"it unpacks to {size} bytes, at most {MAX_BYTES} are read")
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy's header parser raise a dozen types
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"{path} cannot be read as a .npz file of plain arrays: {reason}. Write it with np.savez(file, name=array)."
        ) from None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a .npz file under another name first, then rename it: the old file or the whole new one is there."""
    import numpy as np

    from transom.runtime.atomic_write import replacing

    try:
        with replacing(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror or error}. Give another file.") from None


def array_json(array: Array, *, values: bool) -> dict[str, Any]:
    """Return dtype and shape of an array, and its values where they are wanted."""
    found: dict[str, Any] = {"dtype": str(array.dtype), "shape": array.shape}
    return {**found, "values": array} if values else found


def array_line(name: str, array: Array) -> str:
    """Return ``logits float32 (1, 10)  min -2.1  mean 0.03  max 8.5  first -0.6132 0.1200 ...``."""
    from transom.runtime.tasks.task import first_numbers

    head = f"{name} {array.dtype} {array.shape}"
    if not array.size:
        return head
    figures = f"min {array.min():.5g}  mean {array.mean():.5g}  max {array.max():.5g}"
    return f"{head}  {figures}  first {first_numbers(array.ravel())}"
