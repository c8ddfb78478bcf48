"""The examples for apps, run as their users would: processes for the two tools, HTTP for the service."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import changed_bundle
from paths import REPO
from time_limits import PATIENCE_S
from transom.runtime import load

if not (REPO / "examples").is_dir():
    pytest.skip(f"no examples in {REPO}: set TRANSOM_REPO to the repository", allow_module_level=True)

TEMPLATES = ["a photo of the number {}", "a handwritten {}"]
DIGITS = ["zero", "one", "two", "three"]


def run(folder: Path, example: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Away from the repository's root; caches that belong to the user go to the folder."""
    command = [sys.executable, str(REPO / "examples" / example), *map(str, arguments)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a tool that failed with nothing on stdout."""
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    return line


def png(seed: int, side: int = 24) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


# examples/search_notes.py


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "old").mkdir(parents=True)
    (folder / "paris.md").write_text("# Paris\n\nthe city is the capital of france,\nand long.\n\n\nwater and oil\n")
    (folder / "old" / "people.txt").write_text("people could write a number\n")
    (folder / "old" / "picture.png").write_bytes(png(0))
    return folder


def test_notes_are_found_and_embedded_once(notes: Path, tmp_path: Path, bert_bundle: Path) -> None:
    question = "the city is the capital of france, and long."
    first = run(tmp_path, "search_notes.py", bert_bundle, notes, question, "--top-k", "2", "--json")
    assert (first.returncode, first.stderr) == (0, "embedding 4 of 4 new passages ...\n"), first
    found = [json.loads(line) for line in first.stdout.splitlines()]
    with load(bert_bundle) as bert:
        a, b = bert.embed([question, found[1]["text"]])
    assert [found[0][key] for key in ("path", "line", "text")] == [str(notes / "paris.md"), 3, question]
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert found[1]["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)

    (notes / "new.txt").write_text(" ".join(["word"] * 121))
    again = run(tmp_path, "search_notes.py", bert_bundle, notes, question)
    assert again.stderr == "embedding 2 of 2 new passages ...\n"  # the 121 words are two passages
    assert again.stdout.startswith(f"1.000  {notes / 'paris.md'}:3  the city")
    (cache,) = (tmp_path / "cache" / "search_notes").iterdir()
    assert len(np.load(cache)["keys"]) == 6


def test_a_search_goes_on_without_a_cache(notes: Path, tmp_path: Path, bert_bundle: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    found = run(tmp_path, "search_notes.py", bert_bundle, notes, "oil", "--json")
    assert found.returncode == 0
    assert "vectors are not kept for the next search" in found.stderr
    assert len(found.stdout.splitlines()) > 0


def test_a_cache_belongs_to_its_bundle_and_may_be_damaged(notes: Path, tmp_path: Path, bert_bundle: Path) -> None:
    cache = tmp_path / "cache.npz"
    cache.write_bytes(b"PK\x03\x04 but no more")
    damaged = run(tmp_path, "search_notes.py", bert_bundle, notes, "oil", "--cache", cache)
    assert "cache.npz is damaged or of another program; it is written again." in damaged.stderr
    changed = changed_bundle(bert_bundle, tmp_path, lambda manifest: manifest.update(name="another"))
    other = run(tmp_path, "search_notes.py", changed, notes, "oil", "--cache", cache)
    assert (other.returncode, other.stderr) == (0, "embedding 4 of 4 new passages ...\n")


def test_what_cannot_be_searched_is_said_in_one_line(tmp_path: Path, bert_bundle: Path, vit_bundle: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("water")
    (tmp_path / "empty").mkdir()

    def error(*arguments: str | Path) -> str:
        return error_line(run(tmp_path, "search_notes.py", *arguments))

    assert error(bert_bundle, tmp_path / "absent", "oil").endswith("absent is neither a file nor a folder.")
    assert "empty holds no text; expected paragraphs in .txt or .md files." in error(
        bert_bundle, tmp_path / "empty", "oil"
    )
    assert "is a bundle for image-classification; expected one that embeds texts." in error(vit_bundle, note, "oil")
    assert "is no folder; expected a bundle" in error(tmp_path / "absent", note, "oil")
    assert error(bert_bundle, note, " ").startswith("search_notes: ")
    assert error(bert_bundle, note, "oil", "--cache", note / "x.npz").endswith("Not a directory")


# examples/label_folder.py


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(11):
        (folder / ("more" if number % 2 else ".") / f"{number:02d}.png").write_bytes(png(number))
    return folder


def test_a_folder_is_labelled_and_damaged_images_are_named(pictures: Path, tmp_path: Path, vit_bundle: Path) -> None:
    (pictures / "cut.png").write_bytes(png(3)[:500])
    (pictures / "words.JPG").write_text("no image")
    (pictures / "words.txt").write_text("not asked for")
    out = tmp_path / "labels.csv"
    options = ("--top-k", "2", "--batch", "3", "--workers", "4")
    done = run(tmp_path, "label_folder.py", vit_bundle, pictures, "--out", out, *options)
    assert done.returncode == 1
    assert re.findall(r"left out: '\S*/(\S+)'", done.stderr) == ["cut.png", "words.JPG"]
    assert f"11 of 13 images labelled: {out}" in done.stderr
    names = sorted(path.relative_to(pictures) for path in pictures.rglob("[01]*.png"))
    with load(vit_bundle) as vit:
        expected = [
            [str(name), str(rank), label, f"{probability:.6f}"]
            for name in names
            for rank, (label, probability) in enumerate(vit.classify(pictures / name, top_k=2), 1)
        ]
    header, *rows = csv.reader(out.read_text().splitlines())
    assert header == ["image", "rank", "label", "probability"]
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    np.testing.assert_allclose([float(row[3]) for row in rows], [float(row[3]) for row in expected], atol=1e-5)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_folder_is_labelled_with_labels_of_ones_own(pictures: Path, tmp_path: Path, clip_bundle: Path) -> None:
    out = tmp_path / "labels.jsonl"
    words = [word for label in DIGITS for word in ("--label", label)]
    words += [word for template in TEMPLATES for word in ("--template", template)]
    done = run(tmp_path, "label_folder.py", clip_bundle, pictures, "--out", out, *words)
    assert done.returncode == 0, done.stderr
    with load(clip_bundle) as clip:
        for record in map(json.loads, out.read_text().splitlines()):
            ((label, probability),) = clip.zero_shot(pictures / record["image"], DIGITS, templates=TEMPLATES, top_k=1)
            assert record["labels"] == [{"label": label, "probability": pytest.approx(probability, abs=1e-5)}]


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_what_was_there(
    kind: signal.Signals, status: int, tmp_path: Path, vit_bundle: Path
) -> None:
    folder, out = tmp_path / "slow", tmp_path / "labels.csv"
    folder.mkdir()
    Image.new("RGB", (4000, 3000)).save(folder / "000.png")
    for number in range(1, 150):
        (folder / f"{number:03d}.png").hardlink_to(folder / "000.png")
    out.write_text("from yesterday")
    command = [sys.executable, str(REPO / "examples" / "label_folder.py"), str(vit_bundle), str(folder)]
    options = ["--out", str(out), "--batch", "1", "--workers", "2"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob(".labels.csv.*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(kind)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert out.read_text() == "from yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.csv", "slow"]


def test_what_cannot_be_labelled_is_said_in_one_line(
    pictures: Path, tmp_path: Path, vit_bundle: Path, clip_bundle: Path, bert_bundle: Path
) -> None:
    (tmp_path / "empty").mkdir()

    def error(*arguments: str | Path) -> str:
        return error_line(run(tmp_path, "label_folder.py", *arguments, "--out", tmp_path / "out.csv"))

    assert "absent is no folder." in error(vit_bundle, tmp_path / "absent")
    assert "empty holds no images" in error(vit_bundle, tmp_path / "empty")
    assert "this is a bundle for feature-extraction; expected one that labels images." in error(bert_bundle, pictures)
    assert "--label and --template are for CLIP bundles" in error(vit_bundle, pictures, "--label", "one")
    assert "labels is empty" in error(clip_bundle, pictures)
    assert "expected one {}" in error(clip_bundle, pictures, "--label", "one", "--template", "a photo")
    nowhere = run(tmp_path, "label_folder.py", vit_bundle, pictures, "--out", tmp_path / "absent" / "out.csv")
    assert error_line(nowhere).endswith("out.csv is no file in a folder that exists.")
    assert not (tmp_path / "out.csv").exists()


# examples/serve.py


@pytest.fixture(scope="module")
def serve() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("serve", REPO / "examples" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module  # where pydantic looks for the names in annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve"]


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory,
    bert_bundle: Path,
    vit_bundle: Path,
    clip_bundle: Path,
    gpt_bundle: Path,
    dates_bundle: Path,
) -> Path:
    """A folder of bundles, one of them damaged."""
    folder = tmp_path_factory.mktemp("served")
    found = {"bert": bert_bundle, "vit": vit_bundle, "clip": clip_bundle, "gpt": gpt_bundle, "dates": dates_bundle}
    for name, bundle in found.items():
        (folder / name).symlink_to(bundle)
    shutil.copytree(vit_bundle, folder / "torn")
    (folder / "torn" / "model.onnx").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def client(serve: ModuleType, bundles: Path) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    with TestClient(serve.create_app(bundles)) as client:
        yield client


def answer(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def events(lines: Iterator[str]) -> list[tuple[str, Any]]:
    """Server-sent events as (kind, data)."""
    blocks = "\n".join(lines).strip().split("\n\n")
    return [(kind, json.loads(data)) for kind, data in (re.findall(r"^\w+: (.*)$", block, re.M) for block in blocks)]


def ranked(response: Any) -> list[tuple[str, float]]:
    return [(found["label"], pytest.approx(found["probability"], abs=1e-6)) for found in answer(response)["labels"]]


def test_the_service_says_what_it_has(client: Any) -> None:
    names = ["bert", "clip", "dates", "gpt", "vit"]
    assert answer(client.get("/health")) == {"status": "degraded", "bundles": names, "broken": ["torn"]}
    listed = answer(client.get("/bundles"))
    assert [found["name"] for found in listed] == names
    assert listed[4] == {"name": "vit", "family": "vit", "task": "image-classification", "precision": "fp32"}


def test_the_service_answers_as_the_runtime(client: Any, bundles: Path) -> None:
    texts, image = ["the city", "water and oil"], png(1)
    with load(bundles / "bert", threads=1) as bert, load(bundles / "clip", threads=1) as clip:
        vectors = answer(client.post("/bundles/bert/embed", json={"texts": texts}))["vectors"]
        np.testing.assert_allclose(vectors, bert.embed(texts), rtol=1e-5, atol=1e-6)
        vectors = answer(client.post("/bundles/clip/embed", json={"texts": texts}))["vectors"]
        np.testing.assert_allclose(vectors, clip.embed_text(texts), rtol=1e-5, atol=1e-6)
        form = {"labels": DIGITS, "templates": TEMPLATES}
        found = ranked(client.post("/bundles/clip/zero-shot", files={"image": image}, data=form))
        assert found == clip.zero_shot(image, DIGITS, templates=TEMPLATES)
    with load(bundles / "vit", threads=1) as vit:
        found = ranked(client.post("/bundles/vit/classify", files={"image": image}, data={"top_k": "3"}))
        assert found == vit.classify(image, top_k=3)
    asked = {"texts": ["3 May 1979", "March 2, 1921"], "num_beams": 2}
    assert answer(client.post("/bundles/dates/translate", json=asked)) == {"texts": ["1979-05-03", "1921-03-02"]}
    asked = {"prompt": "It is a truth", "max_new_tokens": 20, "do_sample": True, "top_p": 0.9, "seed": 1}
    with load(bundles / "gpt", threads=1) as gpt:
        text = gpt.generate(asked["prompt"], **{key: value for key, value in asked.items() if key != "prompt"})
    assert answer(client.post("/bundles/gpt/generate", json=asked)) == {"text": text}
    with client.stream("POST", "/bundles/gpt/stream", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *pieces, end = events(response.iter_lines())
    assert len(pieces) > 5
    assert {kind for kind, _ in pieces} == {"message"}
    assert ("".join(data["text"] for _, data in pieces), end) == (text, ("done", {}))


@pytest.mark.parametrize(
    ("call", "request_", "status", "message"),
    [
        ("absent/embed", {"json": {"texts": ["x"]}}, 404, "there is no bundle 'absent'"),
        ("..%2Fbert/embed", {"json": {"texts": ["x"]}}, 404, "Not Found"),
        ("vit/embed", {"json": {"texts": ["x"]}}, 422, "this bundle is for image-classification; the call needs"),
        ("bert/embed", {"json": {"texts": []}}, 422, "at least 1 item"),
        ("bert/embed", {"json": {"texts": ["x"] * 65}}, 422, "at most 64 items"),
        ("bert/embed", {"json": {"texts": ["x" * 20_001]}}, 422, "at most 20000 characters"),
        ("bert/embed", {"json": {"texts": [7]}}, 422, "valid string"),
        ("bert/embed", {"json": {"texts": [" "]}}, 422, "token"),
        (
            "bert/embed",
            {"content": b'{"texts": ["\\ud800"]}', "headers": {"content-type": "application/json"}},
            422,
            "string",
        ),
        ("bert/embed", {"json": {"texts": ["x"], "pool": 1}}, 422, "Extra inputs are not permitted"),
        ("bert/embed", {"content": b"{", "headers": {"content-type": "application/json"}}, 422, "JSON decode error"),
        ("bert/embed", {"content": b" " * (17 << 20)}, 413, ""),
        ("bert/embed", {"content": (b" " * (1 << 20) for _ in range(17))}, 413, ""),  # no length is announced
        ("vit/classify", {"files": {"image": b"no image"}}, 422, "none of PNG, JPEG"),
        ("vit/classify", {"files": {"image": png(0)[:300]}}, 422, "damaged or cut short"),
        ("vit/classify", {"files": {"image": b""}}, 422, "the image of 0 bytes"),
        ("vit/classify", {"data": {"image": "/etc/passwd"}}, 422, "image"),
        ("vit/classify", {"files": {"image": png(0)}, "data": {"top_k": "0"}}, 422, "greater than or equal to 1"),
        ("clip/classify", {"files": {"image": png(0)}}, 422, "the call needs one of family ViT"),
        ("clip/zero-shot", {"files": {"image": png(0)}}, 422, "Field required"),
        ("clip/zero-shot", {"files": {"image": png(0)}, "data": {"labels": ["a"], "templates": ["b"]}}, 422, "{}"),
        ("gpt/generate", {"json": {"prompt": ""}}, 422, "empty"),
        ("gpt/generate", {"json": {"prompt": "a", "temperature": 0.5}}, 422, "has no effect without do_sample"),
        ("gpt/stream", {"json": {"prompt": "a", "max_new_tokens": 1000}}, 422, "the context holds"),
        ("gpt/stream", {"json": {"prompt": "a", "max_new_tokens": 10**9}}, 422, "less than or equal to 1024"),
        ("gpt/translate", {"json": {"texts": ["a"]}}, 422, "the call needs one of family Transformer"),
        ("torn/classify", {"files": {"image": png(0)}}, 500, "the server cannot answer this; its log says why."),
    ],
)
def test_the_service_refuses(client: Any, bundles: Path, call: str, request_: Any, status: int, message: str) -> None:
    response = client.post(f"/bundles/{call}", **request_)
    assert (response.status_code, message in response.text) == (status, True), response.text
    assert str(bundles) not in response.text


def test_twenty_callers_get_the_serial_answers(client: Any) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    for number in range(5):
        calls += [
            ("bert/embed", {"json": {"texts": ["the city", "a number"][: number % 2 + 1]}}),
            ("vit/classify", {"files": {"image": png(number)}}),
            ("gpt/generate", {"json": {"prompt": f"It is {number}", "max_new_tokens": 30}}),
            ("dates/translate", {"json": {"texts": [f"{number + 1} May 1979"]}}),
        ]

    def post(call: tuple[str, dict[str, Any]]) -> Any:
        return answer(client.post(f"/bundles/{call[0]}", **call[1]))

    serial = [post(call) for call in calls]
    with ThreadPoolExecutor(20) as callers:
        for _ in range(3):
            assert list(callers.map(post, calls)) == serial


def test_a_client_that_goes_away_ends_the_generation(
    serve: ModuleType, gpt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a real socket; the model is replaced by one that would never stop."""
    import httpx2
    import uvicorn

    from transom.runtime.tasks.gpt import GPT

    ended = threading.Event()

    def endless(self: GPT, prompt: str, **keywords: Any) -> Iterator[str]:
        try:
            while True:
                time.sleep(0.005)
                yield "and "
        finally:
            ended.set()

    monkeypatch.setattr(GPT, "stream", endless)
    (tmp_path / "gpt").symlink_to(gpt_bundle)
    server = uvicorn.Server(uvicorn.Config(serve.create_app(tmp_path), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx2.stream("POST", f"http://127.0.0.1:{port}/bundles/gpt/stream", json={"prompt": "on"}) as response:
            assert next(response.iter_lines()) == "event: message"
            assert not ended.is_set()
        assert ended.wait(PATIENCE_S)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_folder_without_bundles_is_not_served(tmp_path: Path) -> None:
    assert error_line(run(tmp_path, "serve.py", tmp_path)) == (
        f"serve: {tmp_path} holds no bundles; export one into it."
    )


# benchmarks/scaling.py


def test_the_performance_page_shows_the_figures_of_its_file(tmp_path: Path) -> None:
    (figures,) = (REPO / "docs" / "results").glob("scaling-*.json")
    script = REPO / "benchmarks" / "scaling.py"
    command = [sys.executable, str(script), "--results", str(figures)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout in (REPO / "docs" / "performance.md").read_text("utf-8")
