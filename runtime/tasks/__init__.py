"""Tasks of loaded bundles: one file per family, which ends in its FAMILY."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transom.runtime.errors import BundleError
from transom.runtime.families import FAMILIES, family_record

if TYPE_CHECKING:
    from transom.runtime.session import LoadedBundle
    from transom.runtime.tasks.task import FamilyTasks


def family_tasks(family: str) -> FamilyTasks:
    """Return the class and the tasks of a family; BundleError for one that this version does not know."""
    if family not in FAMILIES:
        raise BundleError(
            f"bundle.json has family {family!r:.60}; this Transom runs {', '.join(sorted(FAMILIES))}. "
            "Upgrade with `pip install --upgrade transom`."
        )
    tasks: FamilyTasks = family_record("runtime.tasks", family)
    return tasks


def task_class(family: str, task: str) -> type[LoadedBundle]:
    """Return the class that serves a family's ``task``; BundleError for a family that this version does not know."""
    found = family_tasks(family)
    return found.by_task.get(task, found.bundle)
