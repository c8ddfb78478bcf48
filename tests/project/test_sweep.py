"""The sweep: every bad input in one table, through the Python API and through the command line.

Whatever was wrong is told in one line under the error's full name, with no traceback and a status that is not 0, and
nothing is written, changed or left behind. Damage that nobody thought of is in test_fuzz.py; full disks and killed
processes are in tests/export/test_bundle_writer.py.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bad_bundles import BUNDLES, Row, nothing
from bad_inputs import CALLS, CHECKPOINTS, COMMANDS, Command
from command_line import ANSI, transom
from conftest import listing, save_checkpoint
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, TransomError

ARCHITECTURES = {  # of what is damaged
    "bert checkpoint": "BertModel",
    "vit checkpoint": "ViTForImageClassification",
    "gpt checkpoint": "GPT2LMHeadModel",
    "clip checkpoint": "CLIPModel",
}
Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, exported: Any, once: Any) -> Whole:
    """``whole("gpt")`` -> a bundle or checkpoint that is as it should be."""

    def get(on: str) -> Path:
        if on in ARCHITECTURES:
            name = ARCHITECTURES[on]
            return Path(once(f"whole-{name}", lambda folder: save_checkpoint(folder, name)))
        if on in ("gpt", "marian", "clip"):
            made: Path = exported({"gpt": "GPT2LMHeadModel", "marian": "MarianMTModel", "clip": "CLIPModel"}[on])[1]
            return made
        return Path(request.getfixturevalue(f"{on}_bundle"))

    return get


@pytest.fixture(scope="module")
def loaded(whole: Whole) -> Iterator[Callable[[str], Any]]:
    """A bundle that is as it should be, loaded once for all that is asked of it."""
    kept: dict[str, Any] = {}
    with ExitStack() as stack:

        def get(on: str) -> Any:
            if on not in kept:
                kept[on] = stack.enter_context(load(whole(on), threads=1))
            return kept[on]

        yield get


def told(result: Any, status: int = 1) -> str:
    """The last line on stderr, the only one but for stages of an export; nothing else was printed."""
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    *stages, line = result.stderr.splitlines()
    assert all(re.fullmatch(r"(reading|tracing|making) .* \.\.\.", stage) for stage in stages), result.stderr
    assert "Traceback" not in result.stderr
    assert ANSI not in result.stderr
    return str(line)


def agree(error: TransomError, line: str, row: Row) -> None:
    """Both ways told the same, in words that the table names."""
    assert re.search(row.said, str(error)), f"{row.said!r} is not in {error}"
    assert "\n" not in str(error)
    assert line.startswith(f"transom.runtime.errors.{type(error).__name__}: "), line
    assert re.search(row.said, line), line


def names(rows: Any) -> list[str]:
    return [f"{row.on}-{row.what}" for row in rows]


def test_the_table_says_each_thing_once() -> None:
    for rows in (BUNDLES, CHECKPOINTS, CALLS):
        assert len(set(names(rows))) == len(rows)


@pytest.mark.parametrize("row", BUNDLES, ids=names(BUNDLES))
def test_damaged_bundles(row: Row, whole: Whole, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(whole(row.on), tmp_path / "bundle"))
    row.damage(bundle)
    before = listing(tmp_path)
    with pytest.raises(row.error) as caught, load(bundle, threads=1, kernels=row.kernels) as model:  # noqa: PT012
        assert row.call is not None, "it was loaded, and nothing is asked of it"
        row.call(model)
    arguments = ("run", bundle, "--kernels", row.kernels, *row.arguments) if row.arguments is not None else None
    if arguments is not None:
        line = told(transom(*arguments))
        agree(caught.value, line, row)
    assert re.search(row.said, str(caught.value))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("row", CHECKPOINTS, ids=names(CHECKPOINTS))
def test_damaged_checkpoints(row: Row, whole: Whole, tmp_path: Path) -> None:
    from transom.export.pipeline import export

    checkpoint = Path(shutil.copytree(whole(row.on), tmp_path / "checkpoint"))
    row.damage(checkpoint)
    before, entries = listing(tmp_path), sorted(os.listdir(tmp_path))
    with pytest.raises(row.error) as caught:
        export(str(checkpoint), tmp_path / "new" / "bundle")
    agree(caught.value, told(transom("export", checkpoint, "--out", tmp_path / "new" / "bundle")), row)
    assert (listing(tmp_path), sorted(os.listdir(tmp_path))) == (before, entries)


@pytest.mark.parametrize("row", CALLS, ids=names(CALLS))
def test_bad_requests(
    row: Row, loaded: Callable[[str], Any], whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row.damage is nothing
    assert row.call is not None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(row.error) as caught:
        row.call(loaded(row.on))
    assert type(caught.value) is row.error
    assert re.search(row.said, str(caught.value)), str(caught.value)
    if row.arguments is not None:
        if row.arguments == ("{npz}",):
            (defaults,) = (
                cell.cell_contents for cell in row.call.__closure__ or () if isinstance(cell.cell_contents, dict)
            )
            np.savez("in.npz", **defaults)
        before = listing(tmp_path)
        arguments = [argument.format(npz="in.npz") for argument in row.arguments]
        agree(caught.value, told(transom("run", whole(row.on), *arguments)), row)
        assert listing(tmp_path) == before


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are not what their names say."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "folder.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")
    (folder / "text.npz").write_text("no arrays")
    np.savez(folder / "pickle.npz", input_ids=np.array([{}], object))
    with zipfile.ZipFile(folder / "zeros.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("input_ids.npy", "w") as file:
            file.write(b"\x93NUMPY")
        archive.infolist()[0].file_size = 4_295_000_000  # what the directory of the archive says
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.arguments)[:70])
def test_bad_commands(command: Command, whole: Whole, work: Path) -> None:
    places = {"bundle": whole("bert"), "checkpoint": whole("bert checkpoint"), "work": work}
    before, entries = listing(work), sorted(os.listdir(work))
    result = transom(*(argument.format(**places) for argument in command.arguments))
    assert (result.exit_code, result.stdout) == (command.status, ""), result.output
    assert "Traceback" not in result.stderr
    if command.status == 1:
        line = told(result)
        assert line.startswith("transom.runtime.errors.")
        assert re.search(command.said, line), line
    else:
        assert re.search(command.said, result.stderr), result.stderr
    assert (listing(work), sorted(os.listdir(work))) == (before, entries)


def test_a_link_inside_the_folder_is_fine(bert_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bert_bundle, tmp_path / "bundle"))
    shutil.move(bundle / "model.onnx", bundle / "stored.onnx")
    (bundle / "model.onnx").symlink_to("stored.onnx")
    load(bundle).close()


def test_what_is_read_is_what_was_hashed(bert_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bert_bundle, tmp_path / "bundle"))
    opened = Bundle(bundle)
    (bundle / "tokenizer.json").write_bytes(bytes(opened.manifest.files["tokenizer.json"].size))
    with pytest.raises(BundleError, match="SHA-256"):
        opened.read("tokenizer.json")
