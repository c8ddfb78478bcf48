"""The options of `transom debug accuracy`."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from command_line import error_line, transom
from transom.runtime.errors import ExportError


@pytest.mark.parametrize(
    ("arguments", "variant"),
    [((), "cpu"), (("--variant", "default"), "default"), (("--flavour", "default"), "default")],
)
def test_the_variant_has_its_earlier_name_too(
    arguments: tuple[str, ...], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(bundle: object, *, variant: str, **options: Any) -> NoReturn:
        raise ExportError(f"the variant is {variant}")

    monkeypatch.setattr("transom.export.debug.debug_accuracy", refuse)
    assert error_line(transom("debug", "accuracy", "bundle", *arguments)).endswith(f"the variant is {variant}")
    assert "--flavour" not in transom("debug", "accuracy", "--help").stdout
