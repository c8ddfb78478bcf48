"""``transom repository``: what it prints, its help and completion, and how it fails."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import Result

from command_line import document, process, transom
from model_config import read_config
from paths import KEPT
from transom.cli.repository import Kind
from transom.export.triton.models import KINDS

BERT, GPT = KEPT / "bert-fp32", KEPT / "gpt-fp32"


def last_line(result: Result) -> str:
    """The error that a failed command ends with, below lines of progress."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    *steps, line = result.stderr.splitlines()
    assert all(step.endswith(" ...") for step in steps)
    return line


def test_the_models_are_listed_and_how_to_serve_them(tmp_path: Path) -> None:
    out = tmp_path / "my models"
    result = transom("repository", BERT, GPT, "--out", out)
    assert result.exit_code == 0, result.stderr
    lines = [re.split(r" {2,}", line.strip()) for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == ["model", "kind", "inputs", "outputs", "rows", "size"]
    assert [line[:5] for line in lines[2:5]] == [
        ["bert-fp32", "task", "text, pair?", "label, score", "2"],
        ["gpt-fp32", "task", "input_ids", "generated_ids", "2"],
        ["gpt-fp32_stream", "stream", "input_ids", "generated_ids", "1"],
    ]
    assert lines[5] == [f"tritonserver --model-repository {shlex.quote(str(out))}"]
    assert f"reading {BERT} ..." in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [line[0] for line in lines[2:5]]


def test_the_tensors_of_many_caches_are_counted(tmp_path: Path) -> None:
    result = transom("repository", KEPT / "transformer-fp32", "--out", tmp_path / "m", "--kind", "tensors")
    assert "decoder_input_ids, attention_mask?, write_indices?, logits_positions?, 4 more" in result.stdout
    result = transom("repository", KEPT / "flamingo-fp32", "--out", tmp_path / "m", "--kind", "tensors")
    assert re.search(r"flamingo-fp32_decoder +tensors .* – ", result.stdout)


def test_json_describes_every_model(tmp_path: Path) -> None:
    out = tmp_path / "models"
    result = transom("repository", BERT, "--out", out, "--name", "sentiment", "--json", "--kind", "task")
    assert result.stderr == ""
    found = document(result)
    (model,) = found["models"]
    size = model.pop("bytes")
    assert found["repository"] == str(out)
    assert model == {
        "name": "sentiment",
        "kind": "task",
        "graph": None,
        "bundle": str(BERT),
        "folder": str(out / "sentiment"),
        "max_batch_size": 2,
        "inputs": [
            {"name": "text", "dtype": "bytes", "shape": [1], "optional": False},
            {"name": "pair", "dtype": "bytes", "shape": [1], "optional": True},
        ],
        "outputs": [
            {"name": "label", "dtype": "bytes", "shape": [None], "optional": False},
            {"name": "score", "dtype": "float32", "shape": [None], "optional": False},
        ],
        "parameters": ["top_k", "truncate"],
    }
    assert size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def test_every_option_is_in_the_configuration(tmp_path: Path) -> None:
    options = "--kind stream --kind tensors --instances 2 --threads 3 --max-batch 16 --queue-delay 250 --streams 5"
    result = transom("repository", GPT, "--out", tmp_path / "m", *options.split(), "--device", "tensorrt")
    assert result.exit_code == 0, result.stderr
    stream, tensors = (
        read_config((tmp_path / "m" / name / "config.pbtxt").read_text())
        for name in ("gpt-fp32_stream", "gpt-fp32_decoder")
    )
    for config in (stream, tensors):
        assert config["instance_group"] == [{"count": 2, "kind": "KIND_MODEL"}]
        assert (config["parameters"]["threads"], config["parameters"]["device"]) == ("3", "tensorrt")
    assert stream["parameters"]["streams"] == "5"
    assert tensors["max_batch_size"] == 16
    assert tensors["dynamic_batching"] == {"max_queue_delay_microseconds": 250}


def test_errors_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    out = tmp_path / "models"
    assert "BundleError: nowhere is no folder" in last_line(transom("repository", "nowhere", "--out", out))
    said = last_line(transom("repository", BERT, KEPT / "../0.1.0/bert-fp32", "--out", out))
    assert said.startswith("transom.runtime.errors.ExportError: ")
    assert "are both called 'bert-fp32'" in said
    said = last_line(transom("repository", BERT, "--out", out, "--device", "gpu"))
    assert "--device is 'gpu'; expected one of cpu, cuda, tensorrt, auto." in said
    said = document(transom("repository", BERT, "--out", out, "--kind", "stream", "--json"))
    assert said["error"]["type"] == "ExportError"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_is_an_error(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(BERT, tmp_path / "bundle"))
    (bundle / "tokenizer.json").write_bytes(b"{}")
    said = last_line(transom("repository", GPT, bundle, "--out", tmp_path / "models"))
    assert "tokenizer.json has 2 bytes, bundle.json says" in said
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing argument 'BUNDLE'"),
        (("b",), "Missing option '--out'"),
        (("b", "--out", "m", "--kind", "plan"), "'plan' is not one of 'task', 'stream', 'tensors', 'onnx'"),
        (("b", "--out", "m", "--instances", "0"), "'--instances'"),
        (("b", "--out", "m", "--queue-delay", "-1"), "'--queue-delay'"),
        (("b", "--out", "m", "--max-batch", "1000000"), "'--max-batch'"),
    ],
)
def test_a_wrong_call_exits_2(arguments: tuple[str, ...], said: str) -> None:
    result = transom("repository", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_help_says_what_each_kind_is() -> None:
    text = transom("repository", "--help").stdout
    for kind in KINDS:
        assert re.search(rf"^ +{kind} +minilm\w* ", text, re.MULTILINE)
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings[:2] == ["Arguments", "Options"]
    assert text.index("--json") < text.index(f"{headings[2]}:") < text.index("--instances N")
    words = " ".join(text.split())
    assert "[default: (task and stream; tensors where there is no task)]" in words
    assert "transom repository bundles/minilm bundles/gpt --out models" in words


def test_completion_knows_the_kinds(tmp_path: Path) -> None:
    assert tuple(Kind) == KINDS
    for words, expected in (
        ("transom repos", ["repository"]),
        ("transom repository b --kind t", ["task", "tensors"]),
        ("transom repository b --device t", ["tensorrt"]),
    ):
        asked = {"_TRANSOM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert process(tmp_path, env={**os.environ, **asked}).stdout.split() == expected
