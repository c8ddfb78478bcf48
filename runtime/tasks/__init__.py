"""What a loaded bundle can be asked for: one file per family, one line per file in FAMILIES."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from transom.runtime.errors import BundleError

if TYPE_CHECKING:
    from transom.runtime.session import LoadedBundle

FAMILIES = {  # family -> module here, class
    "bert": ("bert", "Bert"),
    "clip": ("clip", "Clip"),
    "gpt": ("gpt", "GPT"),
    "transformer": ("transformer", "Transformer"),
    "vit": ("vit", "ViT"),
}


def task_class(family: str) -> type[LoadedBundle]:
    """The class that serves a family; only that family's file is imported."""
    if family not in FAMILIES:
        raise BundleError(
            f"bundle.json has family {family!r:.60}; this Transom runs {', '.join(FAMILIES)}. "
            "Upgrade with `pip install --upgrade transom`."
        )
    module, name = FAMILIES[family]
    return getattr(importlib.import_module(f"transom.runtime.tasks.{module}"), name)  # type: ignore[no-any-return]
