"""What exports write where the native kernels run, and leave out where they do not."""

from __future__ import annotations

from transom.runtime.native.library import native_library


def if_lists_are_made(*names: str) -> set[str]:
    """Return ``names`` where exports write lists of fused operators: an export proves a list or makes none."""
    return {*names} if native_library() is not None else set()
