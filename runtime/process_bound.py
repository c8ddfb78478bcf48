"""What belongs to the process that made it: sessions, what runs in them, and what waits for them."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from transom.runtime.errors import BackendError


class ProcessBound:
    """Base of objects around a library's handles, which neither pickle nor copy can carry to anywhere else."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # of pickle, copy.copy and copy.deepcopy alike
        raise BackendError(
            f"{type(self).__name__} can be neither pickled nor copied: it belongs to a bundle that this process "
            "loaded. Call load(path) in each process; threads may share what it returns."
        )
