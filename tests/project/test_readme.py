"""The README and the documents: their commands and code run, every page is linked, every path and identifier exists."""

from __future__ import annotations

import importlib
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
from transom.export.datasets import heldout_compositions, heldout_questions
from transom.runtime.bundle import Bundle
from transom.runtime.families import FAMILIES

DOCUMENTS = ("docs", "export/data", "calib/datasets", "tests/bundles")
PAGES = sorted([REPO / "README.md", *(page for name in DOCUMENTS for page in (REPO / name).glob("*.md"))])
PACKAGES = "models|export|runtime|calib|cli|tests|examples|benchmarks|docs"
ARCHITECTURE = REPO / "docs/architecture.md"
TRIED = ("README.md", "docs/usage.md")  # pages whose commands and code run
WIDEST = 150  # characters of a line, 140 when written; a row of a table and a line of code may have more

pytestmark = pytest.mark.skipif(not (REPO / "README.md").is_file(), reason="the repository is not at hand")


def blocks(language: str) -> list[str]:
    """The code blocks of the README and of the page on usage, in their order."""
    pages = [(REPO / page).read_text(encoding="utf-8") for page in TRIED]
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]


def commands() -> list[list[str]]:
    """Every `transom` command of these pages, as words."""
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("transom ")]


def of_integers(command: list[str]) -> bool:
    """These take a minute together; test_quantize.py and test_debug.py do what they do."""
    return command[1] in ("calibrate", "debug") or "int8" in command


def of_engines(command: list[str]) -> bool:
    return command[1] in ("build", "remove-engine") or "tensorrt" in command


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory,
    vit_bundle: Path,
    clip_bundle: Path,
    gpt_bundle: Path,
    dates_bundle: Path,
    lists_bundle: Path,
    captions_bundle: Path,
    bytes_bundle: Path,
    flamingo_bundle: Path,
) -> Path:
    """A folder in which somebody ran `make export`, minilm left out, then the README's commands but those of INT8."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "bundles").mkdir()
    (folder / "docs").symlink_to(REPO / "docs")
    made = {"vit": vit_bundle, "clip": clip_bundle, "gpt": gpt_bundle, "transformer": dates_bundle}
    made |= {"seq2seq": lists_bundle, "show_attend_tell": captions_bundle, "perceiver_bytes": bytes_bundle}
    made["flamingo"] = flamingo_bundle
    for name, bundle in made.items():
        (folder / "bundles" / name).symlink_to(bundle)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)).save(folder / "digit.png")
    scans, compositions = heldout_compositions()
    shown = next(each for each in compositions if each.caption == "a seven above a three")
    Image.fromarray(shown.draw(scans)).save(folder / "digits.png")
    scans, questions = heldout_questions()
    for name, number in (("threes", 17), ("sevens", 2)):
        Image.fromarray(questions[number].draw(scans)).save(folder / f"{name}.png")
    plain = [command for command in commands() if not (of_integers(command) or of_engines(command))]
    assert [command[1] for command in plain] == ["export", "selftest", *["run"] * 6, "report", "bench", "repository"]
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


def test_the_commands_and_the_code_of_the_readme_run(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, object] = {"pixels": np.zeros((1, 3, 8, 8), np.float32)}
    first, second, rest = blocks("python")
    for block in (first, second):
        assert len([line for line in block.splitlines() if line]) <= 5  # on the first screen
    exec(first, {})
    capsys.readouterr()
    exec(second, {})
    assert capsys.readouterr().out == "two\nsix\n"  # as the README says
    exec(rest, names)
    vectors, logits = names["vectors"], names["logits"]
    assert isinstance(vectors, np.ndarray)
    assert isinstance(logits, np.ndarray)
    assert (vectors.dtype, vectors.shape, logits.shape) == (np.float32, (2, 384), (1, 10))
    assert names["dates"] == ["1979-05-03", "1921-03-02"]
    assert names["lists"] == "1979-05-03 1921-03-02"
    assert names["caption"] == "a seven above a three"
    assert [names[name] for name in ("count", "shown", "first", "then")] == ["three", "three", "three", "zero"]
    assert names["batch"] == ["three", "two"]
    assert names["told"] == ["top one three, bottom three three", "top seven nothing, bottom seven nothing"]
    byte, probability = names["gap"][0]
    assert (byte, round(probability, 2)) == ("o", 0.95)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    links = links_of(page)
    assert all((page.parent / link).exists() for link in links), [x for x in links if not (page.parent / x).exists()]
    code = re.findall(rf"`((?:{PACKAGES})/[\w/.]+\.\w+)`", page.read_text("utf-8"))
    assert all((REPO / path).exists() for path in code), [path for path in code if not (REPO / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_to_headings_lead_to_one(page: Path) -> None:
    linked = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text("utf-8"))
    missing = [f"{name}#{heading}" for name, heading in linked if heading not in headings(page.parent / name, page)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_identifiers_in_the_documents_exist(page: Path) -> None:
    named = set(re.findall(r"`(transom(?:\.\w+)+)`", page.read_text("utf-8")))
    assert [name for name in sorted(named) if not found(name)] == []


def test_the_table_of_what_to_change_names_what_is_there() -> None:
    """Of each row: the words in its last column, but for paths, are names in its file; relatives are passed over."""
    rows = re.findall(
        r"^\| [^|]+ \| `([\w/]+/[\w.<>]+\.py)` \| (.+) \|$", ARCHITECTURE.read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 20
    missing = []
    for path, words in rows:
        own = re.split(r"[;:]", words)[0]  # what follows is elsewhere
        names = re.findall(r"`(\w+)`", own)
        for file in [path.replace("<family>", family) for family in FAMILIES] if "<" in path else [path]:
            text = (REPO / file).read_text("utf-8")
            if re.search(r"replace\(\s*\w+\.FAMILY", text):  # a relative takes another family's record
                continue
            missing += [f"{file}: {name}" for name in names if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    pending = [REPO / "README.md"]
    while pending:
        page = pending.pop()
        if page not in seen:
            seen.add(page)
            pending += [(page.parent / link).resolve() for link in links_of(page) if link.endswith(".md")]
    assert sorted(str(page.relative_to(REPO)) for page in {*PAGES, *(REPO / "docs").rglob("*.md")} - seen) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_lines_are_no_longer_than_an_editor_shows(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > WIDEST and not line.startswith("|")]
    assert long == []


def links_of(page: Path) -> list[str]:
    """Links to other files, without the heading that some of them name."""
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))


def headings(linked: Path, page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a linked page, or of ``page`` itself where the link names none."""
    text = (page if linked == page.parent else linked).read_text("utf-8")
    words = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", word.lower()).replace(" ", "-") for word in words}


def found(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        return module != "" and hasattr(importlib.import_module(module), attribute) if module != "transom" else False
    return True
