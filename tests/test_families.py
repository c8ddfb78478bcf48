"""The tables that know the families by name, held against each other: a line that is missing has a name here."""

from __future__ import annotations

import pytest

from transom.calib.drive import PUT, READS
from transom.calib.named import NAMES
from transom.cli.answers import TASKS
from transom.export.quantization.gate import POINTS
from transom.export.quantization.options import REFERENCE_DATA
from transom.export.report.pictures.families import PICTURES
from transom.export.scores import SCORES
from transom.models.references import REFERENCES
from transom.models.registry import FAMILIES, RELATIVES
from transom.runtime.tasks import FAMILIES as CLASSES
from transom.runtime.tasks import task_class


def test_every_family_has_a_class_that_runs_it() -> None:
    assert CLASSES.keys() == FAMILIES.keys()
    for family in FAMILIES:
        assert task_class(family).GRAPHS


def test_transom_run_knows_every_task() -> None:
    assert TASKS.keys() == {(family.name, task) for family in FAMILIES.values() for task in family.tasks}
    for task in TASKS.values():
        assert task.example.strip()


def test_every_family_has_a_picture() -> None:
    assert PICTURES.keys() == FAMILIES.keys()


def test_a_family_is_no_relative_of_itself() -> None:
    known = {name for family in FAMILIES.values() for name in family.model_types}
    assert not known & RELATIVES.keys()
    assert len(known) == sum(len(family.model_types) for family in FAMILIES.values())  # nor is one claimed twice


def test_every_reference_model_is_scored_for_a_task_of_ours() -> None:
    assert SCORES.keys() == REFERENCES.keys()
    tasks = {task for family in FAMILIES.values() for task in family.tasks}
    assert {score.task for score in SCORES.values()} <= tasks


def test_every_family_can_be_calibrated_and_gated() -> None:
    assert READS.keys() == PUT.keys() == FAMILIES.keys()
    assert POINTS.keys() | {"gpt"} == FAMILIES.keys()  # whose gate is perplexity
    assert REFERENCE_DATA.keys() == REFERENCES.keys()
    assert set(REFERENCE_DATA.values()) <= set(NAMES)


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_lead_to_tasks(name: str) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert set(family.architectures.values()) <= set(family.tasks)
