"""examples/ray_batch.py as its users run it: rows and their order, workers that die, runs that are interrupted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import served_requests
from command_line import changed_bundle
from paths import KEPT
from processes import descendants, listening_addresses
from serving_engines import example, free_port, server
from time_limits import PATIENCE_S
from transom.runtime import load

BERT, VIT, CLIP = KEPT / "bert-fp32", KEPT / "vit-fp32", KEPT / "clip-fp32"
WORDS = ("the", "a", "of", "in", "is", "man", "city", "paris", "water", "day", "eats", "sees", "red", "green", "blue")
ROWS, BLOCK = 2000, 40


def command(*arguments: str | Path | int) -> list[str]:
    return example("ray_batch.py", *arguments)


def run(*arguments: str | Path | int, status: int = 0) -> str:
    """Run it to its end, and return what it says on stderr."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def png(seed: int) -> bytes:
    return served_requests.png(np.random.default_rng(seed))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of all shards, in the order of the shards' names."""
    return [row for path in sorted(out.glob("part-*")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def answer_of(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    return list(zip(row["label"], row["score"], strict=True))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """2,000 sentences of one to five words, no two neighbours of the same length."""
    chosen = random.Random(23)
    return [" ".join(chosen.choices(WORDS, k=1 + number % 5)) for number in range(ROWS)]


@pytest.fixture(scope="module")
def lines(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences in two files of a folder."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "more").mkdir()
    (folder / "a.txt").write_text("\n".join(texts[:770]))  # the last line has no end
    (folder / "more" / "b.txt").write_text("".join(f"{text}\r\n" for text in texts[770:]))
    return folder


@pytest.fixture(scope="module")
def labelled(texts: list[str]) -> list[dict[str, Any]]:
    """The rows that a job of the 2,000 lines has to write: what one process answers."""
    ids = [("a.txt", number + 1) for number in range(770)] + [("more/b.txt", number + 1) for number in range(1230)]
    with load(BERT, threads=1) as bert:
        answers = bert.classify(texts)
    return [
        {"file": file, "line": line, "label": [label for label, _ in found], "score": [p for _, p in found]}
        | {"error": None}
        for (file, line), found in zip(ids, answers, strict=True)
    ]


def require_complete(out: Path, labelled: Sequence[Mapping[str, Any]]) -> None:
    """Fail unless every row is there once, in order, the same bit for bit, and nothing else is."""
    found = rows_of(out)
    assert len(found) == len(labelled)
    assert found == labelled
    shards = {f"part-{block:06d}.parquet" for block in range(ROWS // BLOCK)}
    assert {path.name for path in out.iterdir()} == shards | {"job.json", ".lock"}


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start it with some arguments, in a session of its own; what is left of it is killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path | int) -> subprocess.Popen[str]:
        running.append(subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shards_in(out: Path) -> list[Path]:
    return sorted(out.glob("part-*"))


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, title in descendants(process.pid).items() if "MapWorker" in title]


def test_workers_that_are_killed_lose_no_row_and_write_none_twice(
    lines: Path,
    labelled: list[dict[str, Any]],
    tmp_path: Path,
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    out = tmp_path / "out"
    process = started(BERT, lines, "--out", out, "--workers", 2, "--block", BLOCK, "--batch", 1)
    killed: list[int] = []

    def fresh() -> list[int]:
        return [pid for pid in workers_of(process) if pid not in killed]

    for shards in (1, 8):  # one worker, then one of those that are there after that
        wait_for(process, lambda shards=shards: len(shards_in(out)) >= shards and fresh() != [])  # type: ignore[misc]
        killed.append(fresh()[0])
        os.kill(killed[-1], signal.SIGKILL)
        assert len(shards_in(out)) < ROWS // BLOCK, "the kill came after the work"
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    require_complete(out, labelled)


def test_rows_that_kill_every_worker_end_the_job_and_keep_the_others(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """A pipe that nobody writes to holds the worker up, until it is killed."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "good").write_bytes(png(1))
    os.mkfifo(folder / "held")
    (folder / "a.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in ("good", "held", "good")))
    arguments = (VIT, folder, "--out", out, "--workers", 1, "--block", 1)
    process = started(*arguments)
    tries = out / ".part-000001.parquet.tries"
    for number in range(1, 5):
        wait_for(process, lambda number=number: tries.exists() and tries.stat().st_size == number)  # type: ignore[misc]
        os.kill(workers_of(process)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "ray_batch: a worker failed: 4 workers died at the rows from a.jsonl:2 on." in stderr
    assert "Traceback" not in stderr
    assert "part-000001.parquet" not in {path.name for path in shards_in(out)}
    assert list(out.glob(".part-*")) == []

    (folder / "held").unlink()
    (folder / "held").write_bytes(png(2))
    run(*arguments)
    with load(VIT, threads=1) as vit:
        assert [answer_of(row) for row in rows_of(out)] == vit.classify([png(1), png(2), png(1)])


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_ends_and_the_same_command_does_the_rest(
    kind: signal.Signals,
    status: int,
    lines: Path,
    labelled: list[dict[str, Any]],
    tmp_path: Path,
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    out = tmp_path / "out"
    arguments = (BERT, lines, "--out", out, "--workers", 2, "--block", BLOCK)
    process = started(*arguments, "--batch", 1)
    wait_for(process, lambda: len(workers_of(process)) == 2)
    workers = workers_of(process)
    wait_for(process, lambda: len(shards_in(out)) >= 2)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # else the work may be done before the signal comes
    below = set(descendants(process.pid))
    assert listening_addresses(below | {process.pid}) <= {"127.0.0.1"}
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # all of them, as a terminal does
    else:
        process.send_signal(kind)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    wait_until_gone(below)
    kept = {path: path.stat().st_mtime_ns for path in shards_in(out)}
    assert 2 <= len(kept) < ROWS // BLOCK
    assert list(out.glob(".part-*")) == []

    said = run(*arguments)
    assert f"{len(kept)} of {ROWS // BLOCK} shards are there already" in said
    assert f"{ROWS} rows in {ROWS // BLOCK} shards, 0 of them failed: {out}" in said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # those were not done again
    require_complete(out, labelled)

    before = {path: path.stat().st_mtime_ns for path in shards_in(out)}
    assert f"{ROWS // BLOCK} of {ROWS // BLOCK} shards are there already" in run(*arguments)
    assert {path: path.stat().st_mtime_ns for path in shards_in(out)} == before


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids):
        assert time.monotonic() < deadline, "processes of Ray are left"
        time.sleep(0.05)


def test_files_of_every_kind_and_rows_that_fail_alone(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good = ["the man", "a city is red", "paris", "water"]
    too_long = "the man eats the red city in paris"
    (folder / "a.txt").write_bytes(b"the man\n\n" + too_long.encode() + b"\na city is red\n\xff\xfe\nparis\n")
    objects = [json.dumps({"body": "water", "n": 1}), "{", "[]", json.dumps({"n": 2}), json.dumps({"body": 5})]
    (folder / "b.jsonl").write_text("\n".join([*objects, json.dumps({"body": "the man"})]) + "\n")
    table = pyarrow.table({"n": range(5), "body": ["paris", None, "the man", too_long, "water"]})
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=2)
    (folder / "ignored.md").write_text("the man\n")

    said = run(BERT, folder, "--column", "body", "--out", out, "--workers", 1, "--block", 4, "--batch", 3, status=1)
    found = rows_of(out)
    assert "17 rows in 5 shards, 9 of them failed" in said
    lines = {"a.txt": 6, "b.jsonl": 6, "c.parquet": 5}
    assert [(row["file"], row["line"]) for row in found] == [
        (file, line + 1) for file, count in lines.items() for line in range(count)
    ]
    with load(BERT, threads=1) as bert:
        answers = {text: bert.classify(text) for text in good}
    expected = {
        ("a.txt", 1): "the man", ("a.txt", 4): "a city is red", ("a.txt", 6): "paris", ("b.jsonl", 1): "water",
        ("b.jsonl", 6): "the man", ("c.parquet", 1): "paris", ("c.parquet", 3): "the man", ("c.parquet", 5): "water",
    }  # fmt: skip
    for row in found:
        if text := expected.get((row["file"], row["line"])):
            assert (answer_of(row), row["error"]) == (answers[text], None)
    errors = {(row["file"], row["line"]): row["error"] for row in found if row["error"]}
    assert errors.keys() == {(row["file"], row["line"]) for row in found} - expected.keys()
    assert all(row["label"] is row["score"] is None for row in found if row["error"])
    for place, said in {
        ("a.txt", 2): "the line is empty.",
        ("a.txt", 3): "at most 7 fit.",
        ("a.txt", 5): "text is not UTF-8 (byte 0)",
        ("b.jsonl", 2): "the line is no JSON",
        ("b.jsonl", 3): "the line is a JSON list; expected an object.",
        ("b.jsonl", 4): "the row has no 'body', which is read for text.",
        ("b.jsonl", 5): "text holds a int; expected bytes.",
        ("c.parquet", 2): "the row has no 'body', which is read for text.",
        ("c.parquet", 4): "at most 7 fit.",
    }.items():
        assert said in errors[place]


def test_images_in_files_and_tables(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    images = [png(seed) for seed in range(5)]
    (folder / "0.png").write_bytes(images[0])
    (folder / "more" / "1.PNG").write_bytes(images[1])
    (folder / "cut.png").write_bytes(images[2][:100])
    (folder / "a.jsonl").write_text(json.dumps({"image": "more/1.PNG"}) + "\n" + json.dumps({"image": "absent.png"}))
    stored = [images[3], images[4]]
    pyarrow.parquet.write_table(pyarrow.table({"image": stored}), folder / "b.parquet")
    run(VIT, folder, "--out", out, "--workers", 2, "--block", 3, "--parameter", "top_k=2", status=1)
    found = {(row["file"], row["line"]): row for row in rows_of(out)}
    assert list(found) == [
        ("0.png", None), ("a.jsonl", 1), ("a.jsonl", 2), ("b.parquet", 1), ("b.parquet", 2), ("cut.png", None),
        ("more/1.PNG", None),
    ]  # fmt: skip
    with load(VIT, threads=1) as vit:
        answers = vit.classify(images[:2] + stored, top_k=2)
    names = [("0.png", None), ("more/1.PNG", None), ("b.parquet", 1), ("b.parquet", 2)]
    assert [answer_of(found[name]) for name in names] == answers
    assert answer_of(found["a.jsonl", 1]) == answers[1]
    assert "absent.png cannot be read: No such file" in found["a.jsonl", 2]["error"]
    assert found["cut.png", None]["error"]


def test_captions_labels_of_ones_own_and_token_ids(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    images = [png(seed) for seed in range(3)]
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(image)
    captioner = KEPT / "show_attend_tell-fp32"
    run(captioner, folder, "--out", tmp_path / "captions", "--workers", 1, "--parameter", "max_new_tokens=4")
    with load(captioner, threads=1) as loaded:
        captions = loaded.generate(images, max_new_tokens=4)
    assert [row["generated_text"] for row in rows_of(tmp_path / "captions")] == [[text] for text in captions]

    words = ("--label", "the", "--label", "city", "--template", "a {}")
    run(CLIP, folder, "--out", tmp_path / "labels", "--workers", 1, *words)
    with load(CLIP, threads=1) as clip:
        answers = clip.zero_shot(images, ["the", "city"], templates=["a {}"])
    assert [answer_of(row) for row in rows_of(tmp_path / "labels")] == answers

    prompts = [[3, 5, 7], [9, 4]]
    rows = [{"ids": ids} for ids in prompts] + [{"ids": [1.5]}, {"ids": "3 5"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpt = KEPT / "gpt-fp32"
    arguments = ("--parameter", "max_new_tokens=3", "--column", "ids", "--out", tmp_path / "ids", "--workers", 1)
    run(gpt, tmp_path / "prompts.jsonl", *arguments, status=1)
    with load(gpt, threads=1) as loaded:
        generated = loaded.generate(prompts, max_new_tokens=3)
    *answered, fraction, text = rows_of(tmp_path / "ids")
    assert [row["generated_ids"] for row in answered] == [[ids] for ids in generated]
    assert "input_ids has dtype float64; expected int64." in fraction["error"]
    assert "input_ids has dtype" in text["error"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small BERT without its labels: it embeds."""
    folder = tmp_path_factory.mktemp("embedder")
    return changed_bundle(BERT, folder, lambda manifest: manifest.update(task="feature-extraction"))


def test_vectors_as_numpy_shards_with_ids_beside(embedder: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", tmp_path / "lines.txt"
    texts = ["the man", "", "a city is red", "paris", "", "", "water is blue"]
    lines.write_text("\n".join(texts) + "\n")
    run(embedder, lines, "--out", out, "--format", "npy", "--workers", 2, "--block", 2, "--batch", 1, status=1)
    parts = [np.load(out / f"part-{block:06d}.npy") for block in range(4)]
    assert {part.dtype for part in parts} == {np.dtype(np.float32)}
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    with load(embedder, threads=1) as bert:
        for text, vector in zip(texts, np.concatenate(parts), strict=True):
            expected = bert.embed(text) if text else np.full(16, np.nan, np.float32)
            np.testing.assert_array_equal(vector, expected)
    lines_of_ids = [(out / f"part-{block:06d}.jsonl").read_text().splitlines() for block in range(4)]
    ids = [json.loads(line) for part in lines_of_ids for line in part]
    assert ids == [
        {"file": "lines.txt", "line": number, "error": None if text else "the line is empty."}
        for number, text in enumerate(texts, 1)
    ]


def test_embeddings_of_minilm_are_those_of_one_process(reference_bundles: Path, tmp_path: Path) -> None:
    chosen = random.Random(5)
    texts = [" ".join(chosen.choices(WORDS, k=chosen.randint(1, 30))) for _ in range(150)]
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    minilm = reference_bundles / "minilm"
    run(minilm, tmp_path / "lines.txt", "--out", tmp_path / "out", "--workers", 2, "--block", 40, "--batch", 16)
    with load(minilm, threads=1) as bert:
        vectors = bert.embed(texts)
    found = np.array([row["embedding"] for row in rows_of(tmp_path / "out")], np.float32)
    np.testing.assert_array_equal(found, vectors)


def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_written(tmp_path: Path) -> None:
    lines, out = tmp_path / "lines.txt", tmp_path / "out"
    lines.write_text("the man\n")
    (tmp_path / "empty").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "body": ["b"]}), tmp_path / "table.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    shutil.copytree(BERT, tmp_path / "damaged")
    with (tmp_path / "damaged" / "model.onnx").open("r+b") as file:
        file.write(b"\0\0\0\0")

    def error(*arguments: str | Path) -> str:
        (line,) = run(*arguments, "--out", out, status=1).splitlines()
        assert line.startswith("ray_batch: ")
        return line

    assert "does not have the SHA-256 that bundle.json says" in error(tmp_path / "damaged", lines)
    assert "absent is neither a file nor a folder." in error(BERT, tmp_path / "absent")
    assert "out is in the input" in error(BERT, tmp_path)
    assert "empty holds nothing to read; expected files that end in .txt, .jsonl, .parquet." in error(
        BERT, tmp_path / "empty"
    )
    assert "lines.txt holds nothing to read" in error(VIT, lines)
    assert "table.parquet has no column 'text'; it has title, body." in error(BERT, tmp_path / "table.parquet")
    assert "torn.parquet cannot be read" in error(BERT, tmp_path / "torn.parquet")
    assert "--column names the input 'context'" in error(BERT, lines, "--column", "context=body")
    assert "unknown parameter 'topk'; did you mean top_k?" in error(BERT, lines, "--parameter", "topk=3")
    assert "the parameter top_k is 0; expected" in error(BERT, lines, "--parameter", "top_k=0")
    assert "--format npy holds vectors; this bundle answers with label, score." in error(BERT, lines, "--format", "npy")
    assert "--label and --template are for CLIP bundles" in error(BERT, lines, "--label", "one")
    assert "give --label for each" in error(CLIP, tmp_path)
    assert not out.exists()


def test_what_workers_lack_is_said_in_one_line(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("the man\n")
    arguments = (BERT, lines, "--out", tmp_path / "out", "--workers", 1)
    said = run(*arguments, "--device", "cuda", status=1)
    assert "\nray_batch: a worker failed: device 'cuda' was asked for; onnxruntime" in said
    said = run(*arguments, "--device", "cpu", "--gpus-per-worker", 64, status=1)  # another job, but no shard is there
    assert "1 workers need 64 GPUs, Ray has " in said
    said = run(*arguments, "--address", f"127.0.0.1:{free_port()}", status=1)
    assert "ray_batch: no Ray cluster answers at 127.0.0.1:" in said


def test_a_cluster_that_is_there_does_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines.txt").write_text("the man\na city is red\n")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # so that it stays on the loopback address
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
    head += ["--num-cpus", "1", "--include-dashboard", "false", "--object-store-memory", str(128 << 20)]
    with TemporaryDirectory(prefix="ray-") as folder:  # a short path, for sockets
        port = outside_of_workers()
        log = tmp_path / "log"

        def ready() -> bool:
            return "Ray runtime started." in log.read_text("utf-8", "replace")

        with server([*head, "--port", str(port), "--temp-dir", folder], ready, log):
            lines = tmp_path / "lines.txt"
            run(BERT, lines, "--out", tmp_path / "out", "--workers", 1, "--address", f"127.0.0.1:{port}")
    with load(BERT, threads=1) as bert:
        assert [answer_of(row) for row in rows_of(tmp_path / "out")] == bert.classify(["the man", "a city is red"])


def outside_of_workers() -> int:
    """Return a free port that is none of those that Ray keeps for its workers."""
    while 10_000 <= (port := free_port()) < 20_000:
        pass
    return port


def test_shards_of_another_job_and_a_second_run_are_refused(tmp_path: Path) -> None:
    lines, out = tmp_path / "lines.txt", tmp_path / "out"
    lines.write_text("the man\na city\n")
    run(BERT, lines, "--out", out, "--workers", 1)
    before = rows_of(out)

    def error(*arguments: str | Path) -> str:
        (line,) = run(BERT, lines, "--out", out, *arguments, status=1).splitlines()
        return line

    assert "has shards of another job: block, parameters differ." in error("--block", "1", "--parameter", "top_k=1")
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing to" in error()
    lines.write_text("the man\na city\nparis\n")
    assert "has shards of another job: input differ." in error()
    assert rows_of(out) == before
