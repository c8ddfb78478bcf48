"""What the runtime reads of a bundle's figures."""

from __future__ import annotations

from typing import Any

import pytest

from transom.runtime.manifest_sections import worst_error


@pytest.mark.parametrize(
    ("parity", "error"),
    [
        ({"worst": {"error": 0.25}}, 0.25),
        ({"worst": {"error": 0.0}}, 0.0),
        ({}, None),
        ({"worst": None}, None),
        ({"worst": {"error": "0.25"}}, None),
        ({"worst": {"error": True}}, None),
        ({"worst": {"error": -0.25}}, None),
    ],
    ids=str,
)
def test_the_worst_error_that_is_recorded(parity: dict[str, Any], error: float | None) -> None:
    """Anything else is a page of other people's, and counts as none."""
    assert worst_error(parity) == error
