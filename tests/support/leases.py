"""Mark tests that need a read lease on a file of the temporary folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from transom.runtime.leased_file import take_lease


def can_lease() -> bool:
    """Return whether a lease is granted there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "w")
        path.write_bytes(b"w")
        with path.open("rb") as file:
            return take_lease(file.fileno())


leases = pytest.mark.skipif(not can_lease(), reason="no read leases on the file system of the temporary folder")
