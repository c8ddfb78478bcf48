"""Refuse to pickle or copy objects that belong to one process: sessions, their runs and futures."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from transom.runtime.errors import BackendError


class ProcessBound:
    """Base of objects around a library's handles, which can be neither pickled nor copied."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # of pickle, copy.copy and copy.deepcopy alike
        raise BackendError(
            f"{type(self).__name__} can be neither pickled nor copied: it belongs to a bundle that this process "
            "loaded. Call load(path) in each process; threads may share what it returns."
        )
