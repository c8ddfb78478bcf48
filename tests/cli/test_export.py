"""Test `transom export`: options, stages, summary, and an interruption."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from command_line import document, error_line, process, transom
from transom.cli.export import next_commands
from transom.cli.failures import Terminated


def error_line_after_stages(result: Result) -> str:
    """Return the last line of stderr; those before it are the stages."""
    assert (result.exit_code, result.stdout) == (1, "")
    *stages, line = result.stderr.splitlines()
    assert all(stage.endswith(" ...") for stage in stages)
    return str(line)


def test_export_hands_every_option_of_quantisation_on(monkeypatch: pytest.MonkeyPatch, vit_bundle: Path) -> None:
    from transom.export.quantization.options import QuantizeOptions
    from transom.runtime.bundle import Bundle

    received: dict[str, Any] = {}

    def record(source: str, out: Path, **options: Any) -> Any:
        received.update(options)
        return Bundle(vit_bundle).manifest

    monkeypatch.setattr("transom.export.pipeline.export", record)
    options = "--precision int8 --calibration-data a.txt --calibration-data b --method minmax --no-smooth-quant"
    options += " --activations static --weight-bits 7 --block-size 64 --also residual --ranges r.json --no-gate"
    options += " --rank --no-resume"
    assert transom("export", "some/model", "--out", vit_bundle, *options.split()).exit_code == 0
    assert received["precision"] == "int8"
    assert received["quantize"] == QuantizeOptions(
        ("a.txt", "b"), "minmax", False, "static", 7, 64, ("residual",), Path("r.json"), False, True, False
    )


def test_export_hands_every_option_on(monkeypatch: pytest.MonkeyPatch, vit_bundle: Path, tmp_path: Path) -> None:
    from transom.export.quantization.options import QuantizeOptions
    from transom.runtime.bundle import Bundle

    received: dict[str, Any] = {}

    def record(source: str, out: Path, **options: Any) -> Any:
        received.update(source=source, out=out, **options)
        shutil.copytree(vit_bundle, out)
        print("what a library prints")
        options["progress"]("tracing", 0, 2)
        options["progress"]("tracing", 0, 2)
        options["progress"]("done", 2, 2)
        return Bundle(out).manifest

    monkeypatch.setattr("transom.export.pipeline.export", record)
    options = "--precision fp16 --task fill-mask --max S=8 --max B=2 --image-size 32x48 --ignore-unused --force"
    result = transom("export", "some/model", "--out", tmp_path / "a b", *options.split())
    assert result.exit_code == 0
    assert received.pop("progress")
    assert received.pop("quantize") == QuantizeOptions()
    assert received == {
        "source": "some/model",
        "out": tmp_path / "a b",
        "precision": "fp16",
        "task": "fill-mask",
        "max_sizes": {"S": 8, "B": 2},
        "image_size": (32, 48),
        "ignore_unused": True,
        "force": True,
        "made_for": "both",
    }
    assert result.stderr == "what a library prints\ntracing ...\n"
    assert result.stdout.splitlines()[0].startswith(f"{tmp_path}/a b: vit, image-classification, fp32, ")
    assert f"  transom run '{tmp_path}/a b' photo.png" in result.stdout.splitlines()

    document(transom("export", "some/model", "--out", tmp_path / "c", "--json"))
    assert (received["task"], received["max_sizes"], received["image_size"]) == (None, {}, None)


def test_export_prints_one_document_and_leaves_one_folder(shallow_bert: Path, tmp_path: Path) -> None:
    done = process(tmp_path, "export", shallow_bert, "--out", "new/büro 1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert (printed["bundle"], printed["family"], printed["task"]) == ("new/büro 1", "bert", "feature-extraction")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["büro 1"]


@pytest.mark.usefixtures("traced_once")
def test_export_prints_its_stages_and_ends_in_a_summary(bert_checkpoint: Path, tmp_path: Path) -> None:
    result = transom("export", bert_checkpoint, "--out", tmp_path / "new")
    assert result.exit_code == 0
    assert "tracing the module to ONNX ..." in result.stderr.splitlines()
    assert re.search(r"^worst error against PyTorch: \d\.\d\de-\d\d of 2e-05 allowed$", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-3].startswith(f"  transom run {tmp_path}/new 'A sentence.'")


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("GPT2LMHeadModel", "'1 2 3'"),
        ("MarianMTModel", "'1 2 3'"),
        ("BertForTokenClassification", "'Ada Lovelace lived in London.'"),
    ],
)
def test_the_first_command_to_try_works(
    architecture: str, words: str, exported: Callable[..., tuple[Path, Path]]
) -> None:
    from transom.runtime.bundle import Bundle

    _, bundle = exported(architecture)
    commands = next_commands(bundle, Bundle(bundle).manifest)
    assert commands[0] == f"transom run {bundle} {words}"
    assert transom(*shlex.split(commands[0])[1:]).exit_code == 0


def test_export_refuses_an_out_that_exists(bert_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    line = error_line(transom("export", bert_checkpoint, "--out", tmp_path / "there"))
    assert "transom.runtime.errors.ExportError: --out " in line
    assert "--force" in line


def test_export_of_nothing_is_one_clear_error(tmp_path: Path) -> None:
    line = error_line_after_stages(transom("export", tmp_path / "nothing", "--out", tmp_path / "new"))
    assert line.startswith("transom.runtime.errors.CheckpointError: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_export_interrupted_in_its_last_stage_leaves_nothing(
    bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    seen: list[str] = []

    def interrupt(*arguments: Any, **options: Any) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise error

    monkeypatch.setattr("transom.export.pipeline.score_both", interrupt)
    result = transom("export", bert_checkpoint, "--out", tmp_path / "new")
    assert (result.exit_code, result.stdout) == (status, "")
    assert len(seen) == 1  # the temporary folder was there
    assert list(tmp_path.iterdir()) == []
