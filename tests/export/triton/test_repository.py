"""Repositories of models around the runtime: their files, what is refused, and what an interruption leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model_config import read_config
from paths import FP32, KEPT
from time_limits import PATIENCE_S
from transom.export.triton import repository as module
from transom.export.triton.models import KINDS
from transom.export.triton.repository import MODEL_PY, Options, write_repository
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, ExportError

BERT, GPT, CLIP = (KEPT / f"{family}-fp32" for family in ("bert", "gpt", "clip"))


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def models(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bundle_at(path: Path, source: Path = BERT) -> Path:
    return Path(shutil.copytree(source, path))


@pytest.mark.parametrize("name", [*(path.name for path in FP32), "bert-int8-native", "transformer-int8"])
def test_the_files_of_a_repository(tmp_path: Path, name: str) -> None:
    """Every model around the runtime has the bundle as it was; one for Triton's ONNX Runtime the file and weights."""
    written = write_repository(tmp_path / "models", [KEPT / name], Options(kinds=KINDS))
    assert models(tmp_path / "models") == sorted(each.model.name for each in written)
    assert models(tmp_path) == ["models"]
    own = listing(KEPT / name)
    for each in written:
        files = listing(each.folder)
        config = read_config(files.pop("config.pbtxt").decode())
        assert (config["name"], each.folder) == (each.model.name, tmp_path / "models" / each.model.name)
        assert each.size == sum(path.stat().st_size for path in each.folder.rglob("*") if path.is_file())
        if each.model.kind == "onnx":
            (graph,) = (file for file in Bundle(KEPT / name).manifest.graphs if file.graph.name == each.model.graph)
            weights = {} if graph.weights is None else {f"1/{graph.weights}": own[graph.weights]}
            assert files == {"1/model.onnx": own[graph.file_for("cpu")], **weights}
            continue
        assert files.pop("1/model.py") == MODEL_PY.encode()
        assert {key.removeprefix("1/bundle/"): data for key, data in files.items()} == own
        copy = each.folder / "1" / config["parameters"]["bundle"]
        assert Bundle(copy).manifest == Bundle(KEPT / name).manifest
        assert config["parameters"]["bundle_sha256"] == hashlib.sha256(own["bundle.json"]).hexdigest()


def test_models_of_one_bundle_share_its_files(tmp_path: Path) -> None:
    write_repository(tmp_path / "models", [GPT], Options(kinds=["task", "stream", "tensors"]))
    weights = [tmp_path / "models" / name / "1/bundle/decoder.onnx" for name in ("gpt-fp32", "gpt-fp32_stream")]
    assert weights[0].samefile(weights[1])
    assert not weights[0].samefile(GPT / "decoder.onnx")  # a change of the bundle is none of the repository


def test_a_file_system_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    write_repository(tmp_path / "models", [GPT])
    first, second = (tmp_path / "models" / name / "1/bundle" for name in ("gpt-fp32", "gpt-fp32_stream"))
    assert listing(first) == listing(second) == listing(GPT)
    assert not (first / "decoder.onnx").samefile(second / "decoder.onnx")


def test_names_are_the_folders_or_one_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle_at(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    write_repository(Path("../models"), [Path(".")])
    write_repository(Path("../models"), [Path(".")], name="yours")
    write_repository(Path("../models"), [CLIP, GPT])
    Path("../link").symlink_to(BERT)
    write_repository(Path("../models"), [Path("../link")])
    assert models(tmp_path / "models") == ["clip-fp32", "gpt-fp32", "gpt-fp32_stream", "link", "mine", "yours"]
    with pytest.raises(ExportError, match=r"--name is 'x', and 2 bundles were given; expected one\. Leave it out"):
        write_repository(Path("../models"), [CLIP, GPT], name="x")


def test_two_bundles_of_one_name(tmp_path: Path) -> None:
    first, second = (bundle_at(tmp_path / folder / "minilm") for folder in "ab")
    with pytest.raises(ExportError, match=rf"{first} and {second} are both called 'minilm', and so would their models"):
        write_repository(tmp_path / "models", [first, second])
    other = bundle_at(tmp_path / "minilm_model")
    with pytest.raises(ExportError, match="two models would be called 'minilm_model'; give one of their bundles"):
        write_repository(tmp_path / "models", [first, other], Options(kinds=["task", "tensors"]))
    assert not (tmp_path / "models").exists()


def test_a_bundle_that_fails_its_hashes_is_not_written(tmp_path: Path) -> None:
    bundle = bundle_at(tmp_path / "bundle")
    (bundle / "model.onnx").write_bytes(b"x" * (bundle / "model.onnx").stat().st_size)
    with pytest.raises(BundleError, match=r"model\.onnx does not have the SHA-256 that bundle\.json says"):
        write_repository(tmp_path / "models", [CLIP, bundle])
    assert models(tmp_path) == ["bundle"]


@pytest.mark.parametrize("changed", ["model.onnx", "bundle.json"])
def test_a_bundle_that_changes_while_it_is_copied_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    bundle = bundle_at(tmp_path / "bundle")
    found = module.models_of if changed == "model.onnx" else module.Bundle

    def change(*arguments: object) -> object:
        result = found(*arguments)  # type: ignore[arg-type]
        data = (bundle / changed).read_bytes()
        other = (KEPT / "vit-fp32/bundle.json").read_bytes() if changed == "bundle.json" else data[:-1] + b"x"
        (bundle / changed).write_bytes(other)
        return result

    monkeypatch.setattr(module, found.__name__, change)
    with pytest.raises(BundleError, match=f"{changed} does not have the SHA-256 that bundle.json says"):
        write_repository(tmp_path / "models", [bundle])
    assert models(tmp_path) == ["bundle"]


def test_what_exists_is_replaced_by_force_alone(tmp_path: Path) -> None:
    out = tmp_path / "models"
    write_repository(out, [GPT, BERT])
    before = listing(out)
    with pytest.raises(ExportError, match=r"gpt-fp32 exists; give --force to replace it, or another --name or --out"):
        write_repository(out, [CLIP, GPT], Options(streams=9))
    assert listing(out) == before
    write_repository(out, [CLIP, GPT], Options(streams=9), force=True)
    after = listing(out)
    assert models(out) == ["bert-fp32", "clip-fp32", "gpt-fp32", "gpt-fp32_stream"]
    assert after["bert-fp32/config.pbtxt"] == before["bert-fp32/config.pbtxt"]
    assert read_config(after["gpt-fp32_stream/config.pbtxt"].decode())["parameters"]["streams"] == "9"
    assert models(tmp_path) == ["models"]


@pytest.mark.parametrize("kind", ["file", "full", "link to a model", "link to nothing"])
def test_force_replaces_nothing_but_models(tmp_path: Path, kind: str) -> None:
    out, taken = tmp_path / "models", tmp_path / "models/bert-fp32"
    out.mkdir()
    match kind:
        case "file":
            taken.write_text("a thesis")
        case "full":
            taken.mkdir()
            (taken / "thesis.txt").write_text("years of work")
        case "link to a model":
            write_repository(tmp_path / "others", [BERT])
            taken.symlink_to(tmp_path / "others/bert-fp32")
        case _:
            taken.symlink_to(tmp_path / "nothing")
    with pytest.raises(ExportError, match="exists and is no model; --force replaces only models"):
        write_repository(out, [BERT], force=True)
    with pytest.raises(ExportError, match="exists; give --force"):
        write_repository(out, [BERT])
    assert os.path.lexists(taken)


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model = module.write_model

    def meanwhile(*arguments: object) -> int:
        monkeypatch.undo()
        write_repository(tmp_path / "models", [BERT], Options(max_batch=77))
        return write_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_model", meanwhile)
    with pytest.raises(ExportError, match="bert-fp32 exists; give --force"):
        write_repository(tmp_path / "models", [BERT])
    config = read_config((tmp_path / "models/bert-fp32/config.pbtxt").read_text())
    assert (config["max_batch_size"], models(tmp_path)) == (77, ["models"])


def test_a_place_that_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        with pytest.raises(ExportError, match=rf"--out .*{name} is no folder; give that of a model repository"):
            write_repository(tmp_path / name, [BERT])
    bundle = bundle_at(tmp_path / "bundle")
    with pytest.raises(ExportError, match=r"--out .*bundle is a bundle; give the folder of a model repository"):
        write_repository(bundle, [BERT])
    before = models(bundle)
    (tmp_path / "inside").symlink_to(bundle, target_is_directory=True)
    for inside in (bundle / "models", bundle / "graphs/models", tmp_path / "inside/models"):
        with pytest.raises(ExportError, match=r"models is in the bundle .*bundle; give the folder of a model reposit"):
            write_repository(inside, [BERT])
    assert models(bundle) == before
    for place in ("", ".", "/", "x/.."):
        with pytest.raises(ExportError, match="expected the path of a folder, such as models"):
            write_repository(Path(place), [BERT])
    with pytest.raises(ExportError, match=r"cannot write into .*file/models: File exists\. Check the folder"):
        write_repository(tmp_path / "file/models", [BERT])
    with pytest.raises(ExportError, match=r"cannot write into .*: File name too long"):
        write_repository(tmp_path / ("x" * 300), [BERT])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    out = tmp_path / "models"
    out.mkdir()
    out.chmod(0o500)
    with pytest.raises(ExportError, match=r"cannot write into .*models: Permission denied"):
        write_repository(out, [BERT])


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """The kernel refuses writes past a limit: as near to a full disk as a test gets."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # bytes: bundle.json fits, model.onnx does not
    try:
        with pytest.raises(ExportError, match=r"cannot write into .*models: File too large\. Check the folder"):
            write_repository(tmp_path / "new/models", [BERT])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


WRITING = """
import os, signal, sys
from pathlib import Path
from transom.export.triton.repository import write_repository

def end(*arguments):
    os.kill(os.getpid(), signal.SIG{number})

rename = Path.rename

def aside(self, target):
    Path.rename = end  # the next one would put the new model in its place
    return rename(self, target)

if {when!r} == "copying":
    os.link = end
else:
    Path.rename = aside if {when!r} == "between" else end
write_repository(Path("models"), [Path(path) for path in sys.argv[1:]], force=True)
"""
Ended = Callable[[str, str], int]


@pytest.fixture
def ended(tmp_path: Path) -> Ended:
    """Return ``ended(number, when)``: writes GPT's models with --force, and ends itself by a signal in the middle."""

    def run(number: str, when: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", WRITING.format(number=number, when=when), str(GPT)],
            cwd=tmp_path,
            capture_output=True,
            timeout=PATIENCE_S,
        )
        return done.returncode

    return run


@pytest.mark.parametrize("when", ["copying", "renaming"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, ended: Ended, when: str) -> None:
    assert ended("INT", when) == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["copying", "renaming"])
def test_killed_in_the_middle_there_is_no_half_of_a_model(tmp_path: Path, ended: Ended, when: str) -> None:
    """SIGKILL cannot be cleaned up after: the next write does."""
    assert ended("KILL", when) == -signal.SIGKILL
    (rest,) = models(tmp_path)
    assert rest.startswith(".transom-")
    write_repository(tmp_path / "models", [GPT])
    assert models(tmp_path) == ["models"]
    before = listing(tmp_path / "models")
    assert ended("KILL", when) == -signal.SIGKILL
    assert {name: data for name, data in listing(tmp_path / "models").items() if not name.startswith(".")} == before
    write_repository(tmp_path / "models", [GPT], force=True)
    assert models(tmp_path) == ["models"]
    assert listing(tmp_path / "models") == before


def test_killed_while_a_model_is_replaced_the_old_one_comes_back(tmp_path: Path, ended: Ended) -> None:
    write_repository(tmp_path / "models", [GPT])
    before = listing(tmp_path / "models")
    assert ended("KILL", "between") == -signal.SIGKILL
    assert "gpt-fp32" not in models(tmp_path / "models")
    write_repository(tmp_path / "models", [BERT])
    assert models(tmp_path / "models") == ["bert-fp32", "gpt-fp32", "gpt-fp32_stream"]
    assert before.items() < listing(tmp_path / "models").items()
    assert models(tmp_path) == ["models"]


WITHOUT = """
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "triton", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from transom.export.triton.models import KINDS
from transom.export.triton.repository import Options, write_repository
print(len(write_repository(Path("models"), [Path(path) for path in sys.argv[1:]], Options(kinds=KINDS))))
"""


def test_it_is_written_without_torch_and_onnx(tmp_path: Path) -> None:
    bundles = [GPT, CLIP, KEPT / "seq2seq-int8"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, bundles)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{3 + 5 + 5}\n")
