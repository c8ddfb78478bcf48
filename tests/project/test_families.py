"""A family is three files and a line: each package has its record, and the records agree with each other."""

from __future__ import annotations

import importlib
import json

import pytest

from paths import REPO
from transom.calib.data import open_calibration_data
from transom.export.families.base import ExportFamily, export_family
from transom.export.metrics import Accuracy
from transom.export.quantization.fidelity import Fidelity, RelativeError
from transom.export.quantization.gate import gate_result
from transom.export.quantization.gate_result import AGREEMENT, GROWTH
from transom.export.reference_models import REFERENCE_MODELS, reference_folder
from transom.models.family import Family
from transom.models.registry import FAMILIES as DEFINITIONS
from transom.runtime.families import FAMILIES
from transom.runtime.tasks import family_tasks, task_class
from transom.runtime.tasks.task import FamilyTasks

PACKAGES = {"models": Family, "runtime.tasks": FamilyTasks, "export.families": ExportFamily}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_package_has_a_file_that_ends_in_the_familys_record(name: str, package: str) -> None:
    module = importlib.import_module(f"transom.{package}.{name}")
    assert isinstance(module.FAMILY, PACKAGES[package])


def test_no_family_is_left_out_of_the_line() -> None:
    """A file of tasks that ends in a record, but for names in FAMILIES, would be loaded by nobody."""
    for package, record in PACKAGES.items():
        folder = REPO / package.replace(".", "/")
        modules = [path.stem for path in sorted(folder.glob("[a-z]*.py"))]
        found = [importlib.import_module(f"transom.{package}.{name}") for name in modules]
        ends = {module.__name__.rsplit(".", 1)[1] for module in found if isinstance(vars(module).get("FAMILY"), record)}
        assert ends == set(FAMILIES), package


@pytest.mark.parametrize("name", FAMILIES)
def test_every_task_of_a_definition_can_be_asked(name: str) -> None:
    record = family_tasks(name)
    assert record.tasks.keys() == set(DEFINITIONS[name].tasks)
    assert all(task.example.strip() for task in record.tasks.values())
    assert record.bundle.GRAPHS


def test_no_model_type_is_claimed_twice() -> None:
    claimed = [model_type for family in DEFINITIONS.values() for model_type in family.model_types]
    assert len(claimed) == len(set(claimed))


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_lead_to_tasks(name: str) -> None:
    family = DEFINITIONS[name]
    assert family.name == name
    assert set(family.architectures.values()) <= set(family.tasks)


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_runs_graphs_that_the_family_has(name: str) -> None:
    for task in DEFINITIONS[name].tasks:
        graphs = export_family(name, task).samples.graphs
        assert graphs
        assert graphs.keys() <= task_class(name, task).GRAPHS.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_records_by_task_are_of_the_familys_tasks(name: str) -> None:
    tasks = set(DEFINITIONS[name].tasks)
    assert export_family(name).by_task.keys() <= tasks
    assert family_tasks(name).by_task.keys() <= tasks


@pytest.mark.parametrize("name", FAMILIES)
def test_every_gate_has_a_limit(name: str) -> None:
    """Of points, or of perplexity's growth in each mode of activations."""
    limits = export_family(name).gate
    ninety = Fidelity(Accuracy("same top-1", "", (90,), (100,)), False, "logits", RelativeError((1.0,), (4.0,)))
    for activations in ("static", "dynamic", "weight-only"):
        judged = gate_result(limits, activations, ninety, None)
        assert judged.criterion == (AGREEMENT if limits.growth is None else GROWTH)
        assert 0.01 <= judged.allowed <= 0.05


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_every_reference_model_has_data_for_each_graph(name: str) -> None:
    model = REFERENCE_MODELS[name]
    config = json.loads((reference_folder(name) / "config.json").read_text())
    (family,) = [family.name for family in DEFINITIONS.values() if config["model_type"] in family.model_types]
    assert model.task in DEFINITIONS[family].tasks
    data = open_calibration_data([model.calibration_set])
    held_out = [sample.kinds for sample in model.held_out()]
    for graph, kinds in export_family(family, model.task).samples.graphs.items():
        assert data.kinds & {*kinds}, graph
        assert any(found & {*kinds} for found in held_out), graph
