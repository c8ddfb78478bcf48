"""Name the families of this version, and import what a package says of one.

A family is `models/<family>.py`, `runtime/tasks/<family>.py`, `export/families/<family>.py` and its name in FAMILIES.
This module imports nothing of Transom, and every package may import it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

FAMILIES = (
    "bert",
    "vit",
    "gpt",
    "transformer",
    "clip",
    "electra",
    "seq2seq",
    "show_attend_tell",
    "swin",
    "swinv2",
    "perceiver",
    "vit_hybrid",
    "flamingo",
)


def family_record(package: str, family: str) -> Any:
    """Import ``transom.<package>.<family>`` and return its FAMILY; no other family's module is imported.

    ``package`` is "models" (a Family), "runtime.tasks" (a FamilyTasks) or "export.families" (an ExportFamily);
    ``family`` is one of FAMILIES.
    """
    return import_module(f"transom.{package}.{family}").FAMILY
