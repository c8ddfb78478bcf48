"""Test whole calls of bundles that generate: ragged batches, threads, constant memory, rows that overflow."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tiny_models import Counted, assert_close, logits_of, random_ids
from transom.runtime import load
from transom.runtime.errors import InputError

Exported = Callable[..., tuple[Path, Path]]
MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def gpt(exported: Exported) -> Iterator[Any]:
    with load(exported("GPT2LMHeadModel")[1], threads=1) as bundle:
        yield bundle


@pytest.fixture(scope="module")
def gpt_theirs(exported: Exported) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(exported("GPT2LMHeadModel")[0])


def greedy_alone(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(logits_of(model, [ids])[0, -1].argmax()))
        if ids[-1] == 100:  # the tiny checkpoint's end-of-sequence token
            break
    return ids[len(prompt) :]


def test_a_ragged_batch_is_as_each_alone(gpt: Any, gpt_theirs: Any) -> None:
    prompts = [random_ids(n, seed=n).tolist() for n in (1, 40, 7, 3, 12)]  # B is 3: two batches
    found = gpt.generate(prompts, max_new_tokens=20)
    assert found == [gpt.generate(prompt, max_new_tokens=20) for prompt in prompts]
    assert found == [greedy_alone(gpt_theirs, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
def test_many_threads_generate_as_one_would(exported: Exported, architecture: str) -> None:
    rng = np.random.default_rng(5)
    calls = [
        ([rng.integers(1, 99, n).tolist() for n in rng.integers(1, 30, rows)], {"max_new_tokens": int(new), **more})
        for rows, new in zip(rng.integers(1, 4, 12), rng.integers(1, 25, 12), strict=True)
        for more in ({"num_beams": 1}, {"num_beams": 3, "do_sample": False})
    ]
    with load(exported(architecture)[1], threads=1) as bundle:
        serial = [bundle.generate(prompts, **options) for prompts, options in calls]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda call: bundle.generate(call[0], **call[1]), calls))
    assert found == serial


def resident() -> float:
    """Return this process's memory in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
def test_many_generations_leave_memory_flat_and_answers_fresh(exported: Exported, architecture: str) -> None:
    rng = np.random.default_rng(0)

    def call() -> tuple[list[list[int]], int]:
        prompts = [rng.integers(1, 99, n).tolist() for n in rng.integers(1, 40, rng.integers(1, 4))]
        return prompts, int(rng.integers(1, 27))

    calls = [call() for _ in range(100)]
    with load(exported(architecture)[1], threads=1) as bundle:
        found = []
        for number, (prompts, new) in enumerate(calls):
            found.append(bundle.generate(prompts, max_new_tokens=new, num_beams=1))
            if number == 40:  # the allocators have seen every size by now
                gc.collect()
                before = resident()
        gc.collect()
        grown = resident() - before
    # 60 caches that leaked would be 20 and more; what other tests left in this process has moved it by 5
    assert grown < 10, f"{grown:.1f} MiB"
    for number in (0, 57, 99):
        with load(exported(architecture)[1], threads=1) as fresh:
            prompts, new = calls[number]
            assert fresh.generate(prompts, max_new_tokens=new, num_beams=1) == found[number]


def test_a_stream_left_half_way_frees_its_buffers(gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    prefill = type(gpt).prefill

    def watched(self: Any, rows: Any) -> Any:
        prefilled = prefill(self, rows)
        made.extend(weakref.ref(buffer) for buffer in prefilled.decoder._state.cache.buffers.values())
        made.append(weakref.ref(prefilled.decoder))
        return prefilled

    monkeypatch.setattr(type(gpt), "prefill", watched)
    expected = gpt.generate([1, 2, 3], max_new_tokens=20)
    made.clear()
    gc.collect()
    gc.disable()  # without a search for cycles
    try:
        stream = gpt.stream([1, 2, 3], max_new_tokens=20)
        assert [next(stream), next(stream)] == expected[:2]
        assert len(made) == 7
        assert all(reference() is not None for reference in made)
        stream.close()
        del stream
        assert [reference() for reference in made] == [None] * 7
        made.clear()
        for _ in gpt.stream([1, 2, 3], max_new_tokens=20):
            break
        assert [reference() for reference in made] == [None] * 7
    finally:
        gc.enable()
    assert gpt.generate([1, 2, 3], max_new_tokens=20) == expected


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_what_does_not_fit_is_told_before_the_first_step(exported: Exported, architecture: str, call: str) -> None:
    from transom.runtime.backends import open_backend
    from transom.runtime.bundle import Bundle
    from transom.runtime.loading import load_with_backends

    bundle = Bundle(exported(architecture)[1])
    counted = {file.graph.name: Counted(open_backend(file, bundle.read, "cpu", 1)) for file in bundle.manifest.graphs}
    with load_with_backends(bundle, counted) as loaded:
        fits, too_many = (57, 58) if architecture == "GPT2LMHeadModel" else (66, 67)
        with pytest.raises(
            InputError, match=rf"and {too_many} new ones make 68; the context holds 67.*new_tokens={fits}"
        ):
            getattr(loaded, call)([3] * 10, max_new_tokens=too_many)
        with pytest.raises(InputError, match=r"the context holds 67|at most 67 fit|axis S"):
            getattr(loaded, call)([3] * 68, max_new_tokens=1)
        for wrong in ([3, 101], [-1], []):
            with pytest.raises(InputError):
                getattr(loaded, call)(wrong, max_new_tokens=1)
        with pytest.raises(InputError):
            getattr(loaded, call)([3], temperature=2.0)
        assert not any(backend.fed for backend in counted.values())
        assert len(list(getattr(loaded, call)([3] * 10, max_new_tokens=fits))) <= fits


# ------------------------------------------------------------------------- weights that overflow in a row


@pytest.fixture(scope="module")
def overflowing(exported: Exported, make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2 with one embedding row changed inside the finished bundle: a row that reads token 0 gets NaN."""
    import shutil
    from hashlib import sha256

    import onnx

    from transom.runtime.manifest import manifest_sha256

    folder = tmp_path_factory.mktemp("overflowing") / "bundle"
    shutil.copytree(exported("GPT2LMHeadModel")[1], folder)
    model = onnx.load(folder / "decoder.onnx")
    gathers = [node for node in model.graph.node if node.op_type == "Gather" and "wte.weight" in node.input[0]]
    assert len(gathers) == 1
    (table,) = (w for w in model.graph.initializer if w.name == gathers[0].input[0])
    changed = onnx.numpy_helper.to_array(table).copy()
    changed[0] = np.inf
    copy = onnx.numpy_helper.from_array(changed, "overflowing")
    model.graph.initializer.append(copy)
    gathers[0].input[0] = "overflowing"  # the head keeps the sound one
    data = model.SerializeToString()
    (folder / "decoder.onnx").write_bytes(data)
    words = json.loads((folder / "bundle.json").read_text())
    words["files"]["decoder.onnx"] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    words["manifest_sha256"] = manifest_sha256(words)
    (folder / "bundle.json").write_text(json.dumps(words))
    return folder


def test_a_row_that_overflows_is_an_error_of_its_own(overflowing: Path, gpt: Any) -> None:
    sound = [random_ids(n, seed=n).clip(1).tolist() for n in (9, 2)]
    expected = gpt.generate(sound, max_new_tokens=9)
    assert not any(0 in row for row in expected)
    with load(overflowing, threads=1, kernels="onnxruntime") as bundle:  # whose file was changed
        with pytest.raises(InputError, match="logits for prompt 1 are NaN at new token 1"):
            bundle.generate([sound[0], [5, 0, 7], sound[1]], max_new_tokens=9)
        logits = bundle.prefill([sound[0], [5, 0, 7], sound[1]]).logits
        assert np.isnan(logits[1]).all()
        assert_close(logits[[0, 2]], gpt.prefill(sound).logits)
        assert bundle.generate(sound, max_new_tokens=9) == expected  # a later request


def test_padding_is_nobodys_business(overflowing: Path, gpt: Any) -> None:
    """Rows are padded with tokens; one whose embedding overflows must not reach a row that does not hold it."""
    prompts = [[5, 6, 7, 8], [9]]
    with load(overflowing, threads=1) as bundle:
        assert_close(bundle.prefill(prompts).logits, gpt.prefill(prompts).logits)
        assert bundle.generate(prompts, max_new_tokens=4) == gpt.generate(prompts, max_new_tokens=4)
