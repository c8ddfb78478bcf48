"""Test `transom bench` and `table`: measurements, their output, and progress."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import ANSI, as_quantized, changed_bundle, command, document, error_line, transom
from transom.runtime.bench import example_feeds, sizes_of, timing_of
from transom.runtime.decoder import Decoder
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.graph_spec import Axis, Graph, Tensor
from transom.runtime.host import instruction_set, processor

SHORT = ("--runs", "3", "--warmup", "1")


def test_bench_measures_each_shape(bert_bundle: Path) -> None:
    printed = document(transom("bench", bert_bundle, "--shape", "B=2,S=5", "--shape", "S=3", *SHORT, "--json"))
    first, second = printed["timings"]
    assert first["sizes"] == {"B": 2, "S": 5}
    assert second["sizes"]["S"] == 3
    for timing in (first, second):
        assert timing["runs"] == 3
        assert 0 < timing["p50_ms"] <= timing["p95_ms"] <= timing["p99_ms"]
    assert 1e3 * 2 / first["p99_ms"] <= first["items_per_s"] * 1.000001
    assert 0 < printed["memory_before_mib"] <= printed["memory_peak_mib"]
    assert printed["load_s"] > 0
    assert printed["cpu"]
    assert printed["instruction_set"] == instruction_set()
    text = transom("bench", bert_bundle, *SHORT).stdout
    assert re.search(r"^peak memory +\d+ MiB, before loading \d+ MiB$", text, re.MULTILINE)
    assert ANSI not in text


def test_bench_stops_when_its_time_is_over(bert_bundle: Path) -> None:
    printed = document(transom("bench", bert_bundle, "--runs", "1000", "--seconds", "0", "--json"))
    assert printed["timings"][0]["runs"] == 1


def test_bench_refuses_axes_that_the_bundle_does_not_have(bert_bundle: Path) -> None:
    assert "InputError: unknown axis 'Q'; this bundle has B, S." in error_line(
        transom("bench", bert_bundle, "--shape", "Q=1")
    )
    line = error_line(transom("bench", bert_bundle, "--shape", "S=68"))
    assert "ShapeError: axis S is 68; this bundle allows 1..67. The model has 67 positions; give no more." in line


def test_bench_of_a_bundle_that_generates_measures_what_a_user_waits_for(
    exported: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gpt = exported("GPT2LMHeadModel")
    read: list[tuple[int, ...]] = []
    several, one = Decoder._step, Decoder.decode_step

    def count_several(self: Decoder, tokens: Any, *places: Any) -> Any:
        read.append(tokens.shape)
        return several(self, tokens, *places)

    def count_one(self: Decoder, tokens: Any) -> Any:
        read.append((len(tokens), 1))
        return one(self, tokens)

    monkeypatch.setattr(Decoder, "_step", count_several)
    monkeypatch.setattr(Decoder, "decode_step", count_one)
    printed = document(transom("bench", gpt, "--shape", "B=2,S=5", "--new-tokens", "4", *SHORT, "--json"))
    assert read == [(2, 5), (2, 1)] + 3 * [(2, 5), (2, 1), (2, 1), (2, 1)]  # the warm-up, then three generations
    prefill, decode = printed["timings"]
    for timing, name, runs, tokens in ((prefill, "prefill", 3, 10), (decode, "decode", 9, 2)):
        assert (timing["name"], timing["sizes"], timing["runs"]) == (name, {"B": 2, "S": 5, "new": 4}, runs)
        assert 0 < timing["p50_ms"] <= timing["p95_ms"] <= timing["p99_ms"]
        assert 1e3 * tokens / timing["p99_ms"] <= timing["items_per_s"] * 1.5
        assert timing["items"] == "tokens"
    lines = transom("bench", gpt, *SHORT).stdout.splitlines()
    assert lines[0].split() == ["step", "shape", "runs", "p50", "ms", "p95", "ms", "p99", "ms", "tokens/s"]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["prefill", "B=1,S=34,new=33", "3"],
        ["decode", "B=1,S=34,new=33", "96"],
    ]
    (only,) = document(transom("bench", gpt, "--new-tokens", "1", *SHORT, "--json"))["timings"]
    assert only["name"] == "prefill"


def test_bench_of_a_translation_counts_its_source_apart(exported: Callable[..., tuple[Path, Path]]) -> None:
    _, marian = exported("MarianMTModel")
    printed = document(transom("bench", marian, "--shape", "S=67", "--new-tokens", "66", "--runs", "1", "--json"))
    assert [timing["sizes"] for timing in printed["timings"]] == [{"B": 1, "S": 67, "new": 66}] * 2
    assert "a prompt of 1 tokens and 67 new ones make 68; the context holds 67" in error_line(
        transom("bench", marian, "--new-tokens", "67")
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--shape", "S=60", "--new-tokens", "8"),
            "a prompt of 60 tokens and 8 new ones make 68; the context holds 67",
        ),
        (("--shape", "C=60"), "unknown axis 'C'; a generation has B and S"),
        (("--shape", "S=68"), "axis S is 68; this bundle allows 1..67"),
        (("--shape", "B=4"), "axis B is 4; this bundle allows 1..3"),
    ],
)
def test_bench_refuses_what_a_generation_cannot_be(
    arguments: tuple[str, ...], said: str, exported: Callable[..., tuple[Path, Path]]
) -> None:
    assert said in error_line(transom("bench", exported("GPT2LMHeadModel")[1], *arguments))


def test_new_tokens_are_for_bundles_that_generate(vit_bundle: Path) -> None:
    line = error_line(transom("bench", vit_bundle, "--new-tokens", "3"))
    assert "new_tokens is 3, but a bundle for image-classification generates nothing" in line


IDS = Graph("g", (Tensor("ids", "int64", ("B", 4), exclusive_max=7), Tensor("mask", "int64", ("B", 4), default=1)), ())
AXES = {"B": Axis(1, 3, 8)}


def test_example_feeds_are_what_the_graph_declares() -> None:
    feeds = example_feeds(IDS, {"B": 500})
    assert (feeds["ids"].min(), feeds["ids"].max(), feeds["ids"].dtype) == (0, 6, np.int64)
    assert feeds["mask"].tolist() == [[1] * 4] * 500
    np.testing.assert_array_equal(feeds["ids"], example_feeds(IDS, {"B": 500})["ids"])


def test_sizes_default_to_opt() -> None:
    assert sizes_of(IDS, AXES, {}) == {"B": 3}
    assert sizes_of(IDS, AXES, {"B": 8}) == {"B": 8}
    with pytest.raises(ShapeError, match=r"axis B is 9; this bundle allows 1\.\.8"):
        sizes_of(IDS, AXES, {"B": 9})
    with pytest.raises(InputError, match="unknown axis 'S'"):
        sizes_of(IDS, AXES, {"S": 1})


@pytest.mark.parametrize(
    ("times_ms", "percentiles"),
    [([3.0], (3.0, 3.0, 3.0)), ([4.0, 1.0], (2.5, 3.85, 3.97)), ([5.0, 1.0, 4.0, 2.0, 3.0], (3.0, 4.8, 4.96))],
)
def test_percentiles_are_linear_between_ranks(times_ms: list[float], percentiles: tuple[float, ...]) -> None:
    found = timing_of("model", {}, times_ms, 1, "items")
    assert (found.p50_ms, found.p95_ms, found.p99_ms) == pytest.approx(percentiles, rel=1e-12)


def test_a_terminal_gets_a_bar_and_a_pipe_does_not(vit_bundle: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("bench", vit_bundle, "--runs", "50"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    ) as running:
        os.close(theirs)
        shown = b"".join(read_terminal(ours))
        assert running.stdout is not None
        piped = running.stdout.read().decode()
    os.close(ours)
    assert running.returncode == 0
    assert b"\x1b[" in shown
    assert b"50/50" in shown or b"/50" in shown
    assert ANSI not in piped
    assert "p50 ms" in piped


def read_terminal(descriptor: int) -> Iterator[bytes]:
    """Read a terminal until the other side closes it."""
    while select.select([descriptor], [], [], 60)[0]:
        try:
            data = os.read(descriptor, 4096)
        except OSError:  # Linux says EIO there
            return
        if not data:
            return
        yield data


def test_table_has_a_row_per_bundle(vit_bundle: Path, bert_bundle: Path) -> None:
    printed = document(transom("table", vit_bundle, bert_bundle, "--json"))["bundles"]
    assert [row["family"] for row in printed] == ["vit", "bert"]
    for row in printed:
        assert row["worst_error"] <= row["tolerance"]
        assert row["p50_ms"] > 0
    score = printed[0]["score"]
    assert score["pytorch"] == score["bundle"]

    lines = transom("table", vit_bundle, bert_bundle).stdout.splitlines()
    row = next(line for line in lines if line.startswith(str(vit_bundle)))
    assert row.count(f" {score['pytorch']['value']:.4f} ") == 2
    assert f"score: {score['name']} on {score['data']}, n = {score['n']}" in lines
    assert "fp32" in row
    assert not any("GPU format" in line for line in lines)


def test_a_table_shows_names_as_they_are(vit_bundle: Path, tmp_path: Path) -> None:
    """No markup, no emoji, nothing cut off."""
    path = tmp_path / f"[bold]x[{'y' * 100}] :smile: [MASK]"
    path.symlink_to(vit_bundle)
    assert f"\n{path}  vit " in transom("table", path).stdout


def test_table_times_the_tokens_of_a_bundle_that_generates(exported: Callable[..., tuple[Path, Path]]) -> None:
    _, gpt = exported("GPT2LMHeadModel")
    (row,) = document(transom("table", gpt, "--json"))["bundles"]
    assert (row["p50_of"], row["sizes"]) == ("decode", {"B": 1, "S": 34, "new": 33})
    assert f"p50 of {gpt}: each new token, B=1,S=34,new=33" in transom("table", gpt).stdout.splitlines()


def test_table_marks_gpu_formats(vit_bundle: Path, tmp_path: Path) -> None:
    def pretend(manifest: dict[str, Any]) -> None:
        manifest["precision"] = "fp16"

    text = transom("table", changed_bundle(vit_bundle, tmp_path, pretend)).stdout
    assert "fp16 (GPU format)" in text
    assert "GPU format: on a CPU its files are smaller, nothing is faster" in text


def test_table_prints_the_gate_of_quantised_bundles(vit_bundle: Path, tmp_path: Path) -> None:
    bundle = changed_bundle(vit_bundle, tmp_path, as_quantized)
    (row,) = document(transom("table", bundle, "--json"))["bundles"]
    assert (row["quantized"], row["gpu_format"], row["instruction_set"]) == (True, False, instruction_set())
    assert row["gate"]["cpu"]["found"] == 0.005
    text = transom("table", bundle, vit_bundle).stdout
    assert re.search(rf"^{re.escape(str(bundle))} +vit +int8 .* gate ", text, re.MULTILINE)
    assert f"p50 measured here, on {processor()}, onnxruntime {row['onnxruntime']}" in text
    assert f"{bundle}, built with avx512_vnni; accuracy gate: default holds (0.005 of 0.013 allowed" in text
    assert text.count("accuracy gate") == 1
    assert "GPU format" not in text


def test_table_with_a_bad_bundle_still_shows_the_good_one_and_exits_1(vit_bundle: Path, tmp_path: Path) -> None:
    result = transom("table", tmp_path, vit_bundle)
    assert result.exit_code == 1
    assert re.search(rf"^{re.escape(str(tmp_path))} +cannot be loaded", result.stdout, re.MULTILINE)
    assert re.search(rf"^{re.escape(str(vit_bundle))} +vit +fp32", result.stdout, re.MULTILINE)
    assert f"transom.runtime.errors.BundleError: {tmp_path} has no bundle.json" in result.stderr
    printed = transom("table", tmp_path, vit_bundle, "--json")
    assert printed.exit_code == 1
    assert [row.get("error", {}).get("type") for row in document(printed)["bundles"]] == ["BundleError", None]
