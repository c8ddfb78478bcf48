"""What the README and the documents promise: their commands run, their code runs, their links lead somewhere."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from command_line import transom
from paths import REPO
from rtx import needs_rtx
from transom.calib.builtin_sets import NAMES
from transom.calib.scales import METHODS
from transom.calib.table import RANGES
from transom.cli.main import app
from transom.runtime.bundle import Bundle

DOCUMENTS = ("docs", "export/data", "calib/sets")
PAGES = sorted([REPO / "README.md", *(page for name in DOCUMENTS for page in (REPO / name).glob("*.md"))])
PACKAGES = "models|export|runtime|calib|cli|tests|examples|benchmarks|docs"

pytestmark = pytest.mark.skipif(not (REPO / "README.md").is_file(), reason="the repository is not at hand")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    """Every `transom` command of the README, as words."""
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("transom ")]


def of_integers(command: list[str]) -> bool:
    """These take a minute together; test_quantize.py and test_debug.py do what they do."""
    return command[1] in ("calibrate", "debug") or "int8" in command


def of_engines(command: list[str]) -> bool:
    return command[1] in ("build", "remove-engine") or "tensorrt" in command


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, vit_bundle: Path, clip_bundle: Path, gpt_bundle: Path, dates_bundle: Path
) -> Path:
    """A folder in which somebody ran `make export`, minilm left out, then the README's commands but those of INT8."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "bundles").mkdir()
    made = {"vit": vit_bundle, "clip": clip_bundle, "gpt": gpt_bundle, "transformer": dates_bundle}
    for name, bundle in made.items():
        (folder / "bundles" / name).symlink_to(bundle)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)).save(folder / "digit.png")
    plain = [command for command in commands() if not (of_integers(command) or of_engines(command))]
    assert [command[1] for command in plain] == ["export", "selftest", *["run"] * 4, "report", "bench"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("transom.export.pipeline.score_both", lambda *sides: None)  # 4,000 texts; test_scores.py has some
        for command in plain:
            done = transom(*command[1:])
            assert done.exit_code == 0, f"{shlex.join(command)}: {done.stderr}"
    return folder


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^make ([a-z-]+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert {"export", "test"} <= set(named) <= targets


def test_the_commands_and_the_code_of_the_readme_run(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, object] = {"pixels": np.zeros((1, 3, 8, 8), np.float32)}
    (code,) = blocks("python")
    exec(code, names)
    vectors, logits = names["vectors"], names["logits"]
    assert isinstance(vectors, np.ndarray)
    assert isinstance(logits, np.ndarray)
    assert (vectors.dtype, vectors.shape, logits.shape) == (np.float32, (2, 384), (1, 10))
    assert names["dates"] == ["1979-05-03", "1921-03-02"]
    assert isinstance(names["text"], str)
    assert -1 <= float(str(names["similar"])) <= 1
    assert 1 < float(str(names["perplexity"])) < 1000


def test_the_commands_of_int8_are_understood() -> None:
    """Parsed, and their words looked up, but not run."""
    integers = [command for command in commands() if of_integers(command)]
    assert [command[1] for command in integers] == ["export", "debug", "calibrate", "export"]
    parsed = []
    for command in integers:
        found: Any = get_command(app)
        words = command[1:]
        while hasattr(found, "commands"):
            found = found.commands[words.pop(0)]
        parsed.append(found.make_context(found.name, words).params)
    first, debugged, calibrated, second = parsed
    assert first["calibration_data"][0] in NAMES
    assert (debugged["bundle"], second["out"]) == (first["out"], first["out"])
    assert second["ranges"] == calibrated["bundle"] / RANGES
    assert second["method"].value in METHODS


@needs_rtx
def test_the_commands_of_engines_run(int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines are built; where there is no GPU to run them, the last command says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(int8_bundle, tmp_path / "bundles/vit-int8")
    built, narrower, removed, tested = [transom(*command[1:]) for command in commands() if of_engines(command)]
    assert (built.exit_code, narrower.exit_code, removed.exit_code) == (0, 0, 0)
    assert "attention 3 of 3" in built.stdout
    assert "rtx-sm89" in built.stdout
    (left,) = Bundle(tmp_path / "bundles/vit-int8").manifest.engines.values()
    assert left["axes"]["B"]["max"] == 4
    assert tested.exit_code == 0 or "no NVIDIA GPU can be used here" in tested.stderr or "this GPU is" in tested.stderr


@needs_rtx
def test_the_commands_of_polygraphy_run(tmp_path: Path) -> None:
    """As far as they can without a GPU: the engine's to the driver, that of ONNX to its end."""
    text = (REPO / "docs/tensorrt.md").read_text(encoding="utf-8")
    bundle = Path(shutil.copytree(REPO / "tests/bundles/0.1.0/vit-int8", tmp_path / "bundle"))
    assert transom("build", bundle, "--target", "rtx-sm89").exit_code == 0
    libraries = Path(str(importlib.metadata.distribution("polygraphy").locate_file("")))  # lib/python3.x/site-packages
    folders = [Path(sys.executable).parent, libraries.parents[2] / "bin", os.environ["PATH"]]
    engine, onnx = (
        subprocess.run(
            ["bash", "-c", line.strip().replace("BUNDLE", str(bundle))],
            env={**os.environ, "PATH": os.pathsep.join(map(str, folders))},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        for line in re.findall(r"^  (?:POLYGRAPHY_|polygraphy).* inspect model .*$", text, re.MULTILINE)
    )
    said = engine.stdout + engine.stderr
    assert "Loading bytes from" in said, said
    assert "could not be imported" not in said
    assert engine.returncode == 0 or re.search(r"deserializeCudaEngine.*(driver|device)", said), said
    assert (onnx.returncode, "Graph Input" in onnx.stdout) == (0, True), onnx.stdout + onnx.stderr


def test_the_command_of_trtexec_names_every_input() -> None:
    text = (REPO / "docs/tensorrt.md").read_text(encoding="utf-8")
    (shapes,) = re.findall(r"`trtexec .*--shapes=(\S+) ", text)
    (graph,) = Bundle(REPO / "tests/bundles/0.1.0/bert-fp32").manifest.graphs
    assert [shape.split(":")[0] for shape in shapes.split(",")] == [tensor.name for tensor in graph.graph.inputs]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert all((page.parent / link).exists() for link in links), [x for x in links if not (page.parent / x).exists()]
    code = re.findall(rf"`((?:{PACKAGES})/[\w/.]+\.\w+)`", page.read_text("utf-8"))
    assert all((REPO / path).exists() for path in code), [path for path in code if not (REPO / path).exists()]
