"""Test `transom inspect`, `selftest` and `verify`: a bundle's contents, and its outputs compared with PyTorch's."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import ANSI, QUANTIZATION, as_quantized, changed_bundle, document, error_line, transom
from transom.cli.describe import gate_line
from transom.runtime.compare import Comparison
from transom.runtime.errors import ParityError
from transom.runtime.format import bytes_text
from transom.runtime.manifest import MANIFEST


def test_inspect_shows_what_the_manifest_says(vit_bundle: Path) -> None:
    printed = document(transom("inspect", vit_bundle, "--json"))
    manifest = json.loads((vit_bundle / MANIFEST).read_text())
    for name in ("family", "task", "precision", "axes", "files", "labels", "source", "tools", "parity"):
        assert printed[name] == manifest[name], name
    assert printed["graphs"][0]["inputs"][0]["name"] == "pixel_values"
    assert printed["size_bytes"] == sum(file.stat().st_size for file in vit_bundle.iterdir())

    text = transom("inspect", vit_bundle).stdout
    for word in ("image-classification", "fp32", "pixel_values float32 (B, ", "allowed", "golden.safetensors"):
        assert word in text
    assert all(file["sha256"] in text for file in manifest["files"].values())  # in a pipe nothing is cut off
    assert ANSI not in text


def test_inspect_shows_how_a_bundle_generates(exported: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, gpt = exported("GPT2LMHeadModel")
    printed = document(transom("inspect", gpt, "--json"))
    assert printed["generation"] == {"eos_token_id": [100], "bos_token_id": 1}
    assert printed["tokenizer"] is None
    lines = re.sub(" +", " ", transom("inspect", gpt).stdout).splitlines()
    for line in (
        "prompts token ids: the checkpoint had no tokenizer",
        "generation eos_token_id [100], bos_token_id 1",
        "decoder input logits_positions int64 (B, P), 0, 1, 2, ... if left out",
        "decoder input key_cache.0..2 float32 (B, 2, C, 80), 0 if left out",  # one line for three layers
        "decoder output value_cache.0..2.written float32 (B, 2, C, 80), in place",
    ):
        assert line in lines
    assert sum("cache" in line for line in lines) == 4

    def tie(manifest: dict[str, Any]) -> None:
        manifest["parity"]["greedy_near_ties"] = [{"row": 1, "step": 3, "ours": 8, "theirs": 9, "margin": 2e-7}]

    text = transom("inspect", changed_bundle(gpt, tmp_path, tie)).stdout
    assert "greedy token 3 of row 1 is 8, PyTorch's is 9: its margin is 2.00e-07, a near tie" in text


def test_inspect_shows_how_a_bundle_was_quantised(vit_bundle: Path, tmp_path: Path) -> None:
    bundle = changed_bundle(vit_bundle, tmp_path, as_quantized)
    assert document(transom("inspect", bundle, "--json"))["quantization"] == QUANTIZATION
    lines = re.sub(" +", " ", transom("inspect", bundle).stdout).splitlines()
    for line in (
        "precision int8",
        "weights 7 bits",
        "activations static in model; ranges by mse",
        "calibrated on digits, 400 samples",
        "built with avx512_vnni",
        "excluded layers 1 of 4",
        "excluded layer.3: 0.02 lost",
        "gate cpu holds (0.005 of 0.013 allowed, judged by top-1 accuracy, n = 540), score 0.985, in FP32 0.99, "
        "same top-1 0.9963, relative error 0.02",
    ):
        assert line in lines
    (parity,) = (line for line in lines if line.startswith("parity "))
    assert parity.endswith("; the gate judges accuracy")
    assert document(transom("inspect", vit_bundle, "--json"))["quantization"] is None


def test_inspect_shows_the_engines_and_what_fused(vit_bundle: Path, tmp_path: Path) -> None:
    """No plan is loaded: any file of the bundle can stand for one. The fusion counts in bundle.json are unchecked."""
    decode = {
        "profile": "decode",
        "attention": {"fused": 3, "of": 4, "unfused": ["attend"]},
        "gelu": {"fused": 0, "of": 0},
        "int8": {"products": 13, "of": 17, "dequantized": []},
        "kernels": 54,
    }
    engine = {"library": "TensorRT-RTX", "version": "1.7.1.116", "plans": {"model": "golden.safetensors"}}

    def built(words: dict[str, Any]) -> None:
        words["engines"] = {
            "rtx-sm86": {**engine, "graphs": {"model": {"profiles": [{**decode, "profile": "prefill"}, decode]}}},
            "rtx-sm89": {**engine, "graphs": {"model": {"profiles": [None, {"profile": 7, "attention": "x\x1b"}]}}},
            "tensorrt": {**engine, "graphs": "x"},
        }

    bundle = changed_bundle(vit_bundle, tmp_path, built)
    assert document(transom("inspect", bundle, "--json"))["engines"]["rtx-sm86"]["plans"] == engine["plans"]
    lines = re.sub(" +", " ", transom("inspect", bundle).stdout).splitlines()
    size = bytes_text((bundle / "golden.safetensors").stat().st_size)
    start = f"TensorRT-RTX 1.7.1.116 model golden.safetensors {size}"
    said = "attention 3 of 4, INT8 13 of 17, 54 kernels"
    rows = [line.strip() for line in lines[-3:]]
    assert rows[0] == f"rtx-sm86 {start} – prefill: {said}; decode: {said}"
    assert rows[1] == f"rtx-sm89 {start} – –: – kernels; 7: – kernels"
    assert rows[2] == f"tensorrt {start} – –"
    assert "target library graph plan size takes fused" in [line.strip() for line in lines]
    assert document(transom("inspect", vit_bundle, "--json"))["engines"] == {}
    assert " fused" not in transom("inspect", vit_bundle).stdout


def test_the_gate_in_one_line() -> None:
    result = "holds (0.005 of 0.013 allowed, judged by top-1 accuracy, n = 540), score 0.985, in FP32 0.99, "
    result += "same top-1 0.9963, relative error 0.02"
    assert gate_line(QUANTIZATION) == f"accuracy gate: default {result}; cpu {result}"
    assert gate_line({}) == gate_line({"gate": "x"}) == "accuracy gate: not recorded"
    nats = {"lower_is_better": True, "fp32": {"value": 2.0}, "int8": {"value": 2.01}}
    words = {"measure": "perplexity", "found": 0.01, "allowed": 0.03, "n": 9, "holds": False, "score": nats}
    expected = "FAILS (0.01 of 0.03 allowed, judged by perplexity, n = 9), perplexity 7.463, in FP32 7.389"
    assert gate_line({"gate": {"cpu": words}}) == f"accuracy gate: cpu {expected}"
    words["repeated"] = {"calibrations": 3, "found": 0.02, "n": 27}
    assert gate_line({"gate": {"cpu": words}}) == f"accuracy gate: cpu {expected}, over 3 calibrations 0.02, n = 27"


def test_inspect_refuses_a_changed_byte(vit_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(vit_bundle, copy)
    with (copy / "golden.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert "golden.safetensors does not have the SHA-256" in error_line(transom("inspect", copy))


def test_selftest_agrees_with_pytorch(vit_bundle: Path) -> None:
    printed = document(transom("selftest", vit_bundle, "--threads", "1", "--json"))
    assert 0 <= printed["worst"]["error"] <= printed["tolerance"]
    for case in printed["cases"]:
        tensors = {each["tensor"] for each in case["against_pytorch"]}
        assert tensors == {each["tensor"] for each in case["against_build"]} == {"logits", "last_hidden_state"}
    text = transom("selftest", vit_bundle).stdout
    assert "agrees with PyTorch: worst error" in text
    assert ANSI not in text


def test_selftest_of_a_quantised_bundle(vit_bundle: Path, tmp_path: Path) -> None:
    bundle = changed_bundle(vit_bundle, tmp_path, as_quantized)
    printed = document(transom("selftest", bundle, "--threads", "1", "--kernels", "onnxruntime", "--json"))
    assert (printed["side"], printed["tolerance"]) == ("bundle", 0.1)
    text = transom("selftest", bundle, "--threads", "1", "--kernels", "onnxruntime").stdout
    assert re.search(r"^agrees with its build: worst error \S+ of 0\.1 allowed$", text, re.MULTILINE)
    assert re.search(r"^agrees with PyTorch: worst error \S+ of 0\.5 allowed$", text, re.MULTILINE)
    assert "compared not bit for bit: " in text
    assert "what makes integer sums exact is" in text
    assert "at the export it was not recorded" in text


def test_selftest_beyond_tolerance_exits_1_with_the_worst_element(vit_bundle: Path, tmp_path: Path) -> None:
    def tighten(manifest: dict[str, Any]) -> None:
        manifest["parity"]["tolerance"] = 1e-12

    line = error_line(transom("selftest", changed_bundle(vit_bundle, tmp_path, tighten), "--kernels", "onnxruntime"))
    assert re.search(r"ParityError: .* logits\[\d+, \d+\] is \S+, expected \S+ \(error .*allows 1e-12", line)


def test_verify_compares_with_the_checkpoint(bert_bundle: Path, bert_checkpoint: Path) -> None:
    printed = document(transom("verify", bert_bundle, "--source", bert_checkpoint, "--json"))
    shapes = [case["shape"] for case in printed["cases"]]
    assert {"B": 1, "S": 1} in shapes
    assert max(c["error"] for case in printed["cases"] for c in case["comparisons"]) < 2e-5
    text = transom("verify", bert_bundle).stdout
    assert re.search(r"^B=1,S=1 +sentence_embedding +\d\.\d\de-\d\d +\[0, \d+\]", text, re.MULTILINE)
    assert "agrees with PyTorch" in text


def test_verify_shows_the_worst_of_the_tokens_fed_one_by_one(exported: Callable[..., tuple[Path, Path]]) -> None:
    _, gpt = exported("GPT2LMHeadModel")
    cases = document(transom("verify", gpt, "--json"))["cases"]
    ours = [case for case in cases if not case["native"]]
    steps = [case for case in ours if case["shape"]["prompt"] == 3 and case["shape"]["chunk"] > 0]
    assert len(steps) == 64
    worst = max(case["comparisons"][0]["error"] for case in steps)
    lines = transom("verify", gpt).stdout.splitlines()
    assert len(lines) < 40  # as many again by fused operators, where there are kernels
    steps = [line for line in lines if line.startswith("B=2,prompt=3,chunk=1..64,tokens=1 ")]
    (line,) = (line for line in steps if "tokens=1 fused" not in line)
    assert float(line.split()[2]) == pytest.approx(worst, rel=0.01)
    assert any(line.startswith("B=2,prompt=5,chunk=1,tokens=5 ") for line in lines)


def test_selftest_generates_again(exported: Callable[..., tuple[Path, Path]]) -> None:
    printed = document(transom("selftest", exported("GPT2LMHeadModel")[1], "--json"))
    assert [case["name"] for case in printed["cases"]] == ["generation"]
    assert printed["worst"]["error"] <= printed["tolerance"]


def test_verify_beyond_tolerance_exits_1(bert_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worst = Comparison("logits", (1, 2), 0.5, 1.0, (0, 1), 1.5, 1.0)

    def differ(*arguments: Any, **options: Any) -> None:
        raise ParityError(f"it differs: {worst}")

    monkeypatch.setattr("transom.export.verification.verify", differ)
    line = error_line(transom("verify", bert_bundle))
    assert line == "transom.runtime.errors.ParityError: it differs: logits[0, 1] is 1.5, expected 1 (error 5.00e-01)"
