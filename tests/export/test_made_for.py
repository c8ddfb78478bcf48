"""Bundles for the CPU alone and for TensorRT alone: what ships, what is measured, and what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from bad_bundles import rewritten
from command_line import transom
from paths import TESTS
from transom.export.engine.build import build
from transom.export.engine.targets import find_targets
from transom.export.pipeline import check_options
from transom.export.quantization.options import DEFAULTS, QuantizeOptions
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, ExportError
from transom.runtime.loading import load

KEPT = TESTS / "bundles" / "0.1.0"


def cpu_alone(words: dict[str, Any]) -> None:
    """Leave bundle.json the graphs for the CPU."""
    for graph in words["graphs"]:
        del words["files"][graph["files"].pop("default")]


@pytest.fixture
def for_cpu(tmp_path: Path) -> Path:
    """A bundle of an earlier version, as `--for cpu` would have written it."""
    folder = tmp_path / "for-cpu"
    shutil.copytree(KEPT / "bert-int8", folder)
    rewritten(cpu_alone)(folder)
    rewritten(lambda words: words.update({"for": "cpu"}))(folder)
    return folder


def test_inspect_says_what_a_bundle_is_for(for_cpu: Path) -> None:
    assert "CPU alone: no graph for TensorRT" in transom("inspect", for_cpu).stdout
    assert json.loads(transom("inspect", for_cpu, "--json").stdout)["for"] == "cpu"
    assert "CPU and TensorRT" in transom("inspect", KEPT / "bert-int8").stdout


def test_no_engine_is_built_of_a_bundle_for_the_cpu(for_cpu: Path) -> None:
    """The error has the command that exports it for both."""
    with pytest.raises(ExportError, match="was exported with --for cpu") as caught:
        build(Bundle(for_cpu), find_targets(["rtx-sm89"]), allow_unfused=False, tell=lambda step: None)
    command = str(caught.value).partition("Export it again: ")[2]
    manifest = Bundle(for_cpu).manifest
    assert shlex.split(command) == [
        *("transom", "export", manifest.source["checkpoint"], "--out", str(for_cpu), "--force"),
        *("--precision", "int8", "--task", manifest.task, "--for", "both"),
        *("--calibration-data", manifest.quantization["data"]["name"].partition(" (")[0]),
    ]
    refused = transom("build", for_cpu, "--target", "rtx-sm89")
    assert refused.exit_code == 1
    assert "--for both" in refused.stderr


def test_other_devices_are_refused(for_cpu: Path) -> None:
    with pytest.raises(BackendError, match="was exported with --for cpu and has no graph for TensorRT"):
        load(for_cpu, device="tensorrt")
    with pytest.raises(BackendError, match="the graph 'model' has no file for cuda"):
        Bundle(for_cpu).manifest.graphs[0].file_for("cuda")
    with load(for_cpu, device="auto") as loaded:
        assert loaded.device == "cpu"
        assert "was exported with --for cpu" in loaded.choice.passed_over["tensorrt"]


def test_debug_searches_what_is_there(for_cpu: Path) -> None:
    refused = transom("debug", "accuracy", for_cpu, "--variant", "default")
    assert refused.exit_code == 1
    assert "has no graph for TensorRT" in refused.stderr


@pytest.mark.parametrize(
    ("precision", "made_for", "options", "problem"),
    [
        ("fp32", "gpu", DEFAULTS, "--for is 'gpu'; expected one of both, cpu, tensorrt"),
        ("bf16", "cpu", DEFAULTS, "which a CPU can only emulate"),
        ("int4", "tensorrt", DEFAULTS, "of which no engine is built"),
        ("int8", "tensorrt", QuantizeOptions(activations="none"), "of which no engine is built"),
    ],
)
def test_what_contradicts_itself_is_refused(
    precision: str, made_for: str, options: QuantizeOptions, problem: str
) -> None:
    with pytest.raises(ExportError, match=problem):
        check_options(precision, "vit", options, made_for)


def test_a_bundle_without_a_default_file_says_so(for_cpu: Path) -> None:
    """Of the kept bundles: as they are, they are for both; the same without its default file is refused."""
    assert Bundle(KEPT / "bert-int8").manifest.made_for == "both"
    with load(for_cpu) as loaded:
        assert loaded.manifest.made_for == "cpu"
    rewritten(lambda words: words.update({"for": "everything"}))(for_cpu)
    assert "bundle.json.for is 'everything', expected one of both, cpu, tensorrt" in transom("inspect", for_cpu).stderr
    rewritten(lambda words: words.pop("for"))(for_cpu)
    assert 'one of them "default"' in transom("inspect", for_cpu).stderr
