"""The tables that know the families by name, held against each other: a line that is missing has a name here."""

from __future__ import annotations

import json

import pytest

from transom.calib.data import open_calibration_data
from transom.calib.run_samples import FEED, PUT, READS
from transom.cli.answers import TASKS
from transom.export.metrics import Accuracy
from transom.export.quantization import fidelity as agreement
from transom.export.quantization.fidelity import Fidelity, RelativeError
from transom.export.quantization.gate import POINTS, gate_result
from transom.export.quantization.gate_result import AGREEMENT, GROWTH
from transom.export.quantization.heldout import reference_samples
from transom.export.quantization.options import REFERENCE_DATA
from transom.export.report.figures.families import PICTURES
from transom.export.scores import SCORES
from transom.models.references import REFERENCES, reference_folder
from transom.models.registry import FAMILIES, RELATIVES
from transom.runtime.tasks import FAMILIES as CLASSES
from transom.runtime.tasks import task_class
from transom.runtime.tasks.bert import Bert


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


def test_every_family_can_be_calibrated() -> None:
    assert READS.keys() == PUT.keys() == FEED.keys() == FAMILIES.keys()
    for family in FAMILIES:
        assert READS[family].keys() <= task_class(family).GRAPHS.keys()
        assert READS[family]


def test_every_family_is_asked_about_held_out_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no branch in ``questions`` is asked as BERT is."""
    for name in [name for name in vars(agreement) if name.endswith("_questions")]:
        monkeypatch.setattr(agreement, name, lambda *_, name=name: name)
    for family in FAMILIES:
        bundle = object.__new__(task_class(family))
        asked = str(agreement.questions(bundle, [], 1))
        assert asked != "text_questions" or isinstance(bundle, Bert), family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_gate(name: str) -> None:
    """By points, or by perplexity as GPT."""
    ninety = Fidelity(Accuracy("same top-1", "", (90,), (100,)), False, "logits", RelativeError((1.0,), (4.0,)))
    judged = gate_result(name, "static", ninety, None)
    assert judged.criterion == (AGREEMENT if name in POINTS else GROWTH)
    assert 0.01 <= judged.allowed <= 0.05


@pytest.mark.parametrize("name", REFERENCES)
def test_every_reference_model_has_data_to_calibrate_on_and_inputs_held_out(name: str) -> None:
    assert REFERENCE_DATA.keys() == REFERENCES.keys()
    config = json.loads((reference_folder(name) / "config.json").read_text())
    (family,) = [family.name for family in FAMILIES.values() if config["model_type"] in family.model_types]
    data = open_calibration_data([REFERENCE_DATA[name]])
    held_out = [sample.kinds for sample in reference_samples(name)]
    for graph, kinds in READS[family].items():
        assert data.kinds & {*kinds}, graph
        assert any(found & {*kinds} for found in held_out), graph


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_lead_to_tasks(name: str) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert set(family.architectures.values()) <= set(family.tasks)
