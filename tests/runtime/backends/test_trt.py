"""Calls on the TensorRT backend: bindings, caches in place, recorded steps, threads. See emulated_gpu.

What a GPU computes is for ``make test-gpu``, on a machine that has one.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from emulated_gpu import (
    EmulatedContext,
    EmulatedCuda,
    EmulatedEngine,
    EmulatedRuntime,
    EmulatedRuntimeCache,
    EmulatedRuntimeConfig,
    EmulatedTensorRT,
    Put,
    names_of,
)
from paths import KEPT
from transom.runtime import load, session
from transom.runtime.backends import trt
from transom.runtime.errors import BackendError, ParityError, ShapeError
from transom.runtime.greedy_check import logits_along
from transom.runtime.selftest import selftest


def test_the_emulation_has_no_name_of_its_own(real_cuda: Any, real_trt: Any) -> None:
    """Every function and attribute exists in NVIDIA's bindings: what our code calls, it can call there."""
    pairs = (
        (EmulatedRuntime, real_trt.Runtime),
        (EmulatedRuntimeConfig, real_trt.IRuntimeConfig),
        (EmulatedRuntimeCache, real_trt.IRuntimeCache),
        (EmulatedContext, real_trt.IExecutionContext),
        (EmulatedEngine, real_trt.ICudaEngine),
    )
    for ours, theirs in pairs:
        assert [name for name in names_of(ours) if not hasattr(theirs, name)] == []
    functions = [name for name in vars(EmulatedCuda) if name.startswith("cuda")]
    assert len(functions) > 15
    assert [name for name in functions if not callable(getattr(real_cuda, name, None))] == []


RECURRENT = ("random_seq2seq", "random_fixed", "random_captioner")  # with attention, without, and of images


@pytest.mark.parametrize("name", ["vit", "gpt", "dates", "clip", "bert", *RECURRENT, "random_flamingo"])
def test_every_family_computes_its_golden_values(name: str, put: Put, request: pytest.FixtureRequest) -> None:
    """Encoders, two towers, decoders through whole generations, with an encoder or images: all within FP32's 2e-5."""
    folder = put(request.getfixturevalue(f"{name}_bundle"))
    assert selftest(folder, device="tensorrt").worst.error < 2e-5
    with load(folder, device="auto") as loaded:
        assert loaded.device == "tensorrt"


def zeros(data: bytes) -> bytes:
    """The same graph, its output of logits multiplied by zero."""
    model = onnx.load_from_string(data)
    (node,) = (node for node in model.graph.node if "logits" in node.output)
    node.output[list(node.output).index("logits")] = "logits.before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["logits.before", "nothing"], ["logits"]))
    return bytes(model.SerializeToString())


def test_an_int8_engine_is_compared_with_its_simulated_graph(
    put: Put, gpu: EmulatedTensorRT, int8_bundle: Path
) -> None:
    """Both compute one graph; an engine of zeros is no INT8 engine, however far INT8 is from PyTorch."""
    folder = put(int8_bundle)
    report = selftest(folder, device="tensorrt")
    assert (report.side, report.tolerance) == ("simulated", 0.1)
    assert 0 < report.worst.error <= 0.1  # half precision rounds otherwise, and integers carry that on
    for key, plan in gpu.plans.items():
        gpu.plans[key] = replace(plan, model=zeros(plan.model))
    with pytest.raises(ParityError, match=r"on tensorrt differs from its TensorRT graph simulated in float32: logits"):
        selftest(folder, device="tensorrt")


def test_half_precision_caches_stay_half(put: Put, half_gpt_bundle: Path) -> None:
    folder = put(half_gpt_bundle)
    assert selftest(folder, device="tensorrt").worst.error < 1e-2
    with load(folder, device="tensorrt") as gpt:
        assert {t.dtype for t in gpt.backend("decoder").graph.inputs if "cache" in t.name} == {"float16"}


@pytest.mark.skipif(not KEPT.is_dir(), reason="the repository is not at hand")
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("family", ["seq2seq", "show_attend_tell"])
def test_a_recurrent_state_stays_half(family: str, precision: str, put: Put) -> None:
    """From encoder to decoder, and from step to step."""
    folder = put(KEPT / f"{family}-{precision}")
    report = selftest(folder, device="tensorrt")
    assert 0 < report.worst.error <= report.tolerance
    assert "generation" in {case.name for case in report.cases}
    with load(folder, device="tensorrt") as bundle:
        graph = bundle.backend("decoder").graph
        assert {tensor.dtype for tensor in graph.outputs if tensor.aliases} == {"float16"}


def test_beams_and_samples_are_those_of_the_cpu(put: Put, gpt_bundle: Path, dates_bundle: Path) -> None:
    """Rows are forked, reordered and dropped on the GPU."""
    with load(put(gpt_bundle), device="tensorrt") as ours, load(gpt_bundle) as theirs:
        for options in (
            {"num_beams": 4, "num_return_sequences": 2},
            {"do_sample": True, "seed": 3, "num_return_sequences": 3},
        ):
            asked = {"max_new_tokens": 24, **options}
            prompts = ["It is a truth", "My dear Mr. Bennet, you"]
            assert ours.generate(prompts, **asked) == theirs.generate(prompts, **asked)
    with load(put(dates_bundle), device="tensorrt") as ours, load(dates_bundle) as theirs:
        texts = ["3 May 1979", "Thursday, March 2, 1921", "1 Jan 2000"]
        assert ours.translate(texts, num_beams=3) == theirs.translate(texts, num_beams=3)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_step_is_one_launch_where_it_repeats(
    recorded: bool, put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full TensorRT leaves recording to us: of 20 tokens one comes of the prompt, the first step is never recorded."""
    gpu.records_graphs = False
    monkeypatch.setenv("TRANSOM_CUDA_GRAPHS", "1" if recorded else "0")
    folder = put(gpt_bundle, target="tensorrt", library="TensorRT", sm="sm89")
    with load(folder, device="tensorrt") as ours, load(gpt_bundle) as theirs:
        for _ in range(2):
            assert ours.generate("It is", max_new_tokens=20) == theirs.generate("It is", max_new_tokens=20)
    # The second generation has the first one's memory again, and so its recording
    assert gpu.cuda.launches == (18 + 19 if recorded else 0)


def prompts_of(name: str) -> list[Any]:
    """Three sources of different lengths, or three images whose captions differ."""
    if name != "random_captioner":
        return [[5, 9, 4, 17, 3, 2], [7, 2], [11, 12, 13, 2]]
    pixels = np.random.default_rng(1).standard_normal((3, 3, 20, 12), np.float32)
    return [row * np.float32(3**place) for place, row in enumerate(pixels)]


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_is_replaced_at_every_step(name: str, put: Put, request: pytest.FixtureRequest) -> None:
    """Greedy tokens and beams, whose rows are forked and change places between steps, are those of the CPU."""
    bundle = request.getfixturevalue(f"{name}_bundle")
    with load(put(bundle), device="tensorrt") as ours, load(bundle) as theirs:
        for options in ({"num_beams": 1}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "num_return_sequences": 3}):
            asked = {"max_new_tokens": 12, **options}
            prompts = prompts_of(name)[: 3 if "num_return_sequences" not in asked else 1]
            assert ours.generate(prompts, **asked) == theirs.generate(prompts, **asked)
        tokens = np.random.default_rng(0).integers(0, 19, (3, 9))
        found, expected = (logits_along(side, prompts_of(name), tokens) for side in (ours, theirs))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
        assert np.abs(np.diff(expected, axis=0)).max() > 1e-2  # no row is another one


def test_steps_over_a_recurrent_state_are_one_launch(
    put: Put, gpu: EmulatedTensorRT, random_seq2seq_bundle: Path
) -> None:
    """Of twelve steps the first is never recorded; the second generation has the memory of the first."""
    gpu.records_graphs = False
    folder = put(random_seq2seq_bundle, target="tensorrt", library="TensorRT", sm="sm89")
    with load(folder, device="tensorrt") as ours, load(random_seq2seq_bundle) as theirs:
        for launches in (11, 11 + 12):
            assert ours.generate([[5, 9, 2]], max_new_tokens=12) == theirs.generate([[5, 9, 2]], max_new_tokens=12)
            assert gpu.cuda.launches == launches


@pytest.mark.parametrize("name", RECURRENT)
def test_a_raw_step_replaces_the_callers_state(name: str, put: Put, request: pytest.FixtureRequest) -> None:
    """Two steps by hand from a state of ones: the fed arrays hold what follows, the others stay as they are."""
    bundle = request.getfixturevalue(f"{name}_bundle")
    with load(put(bundle), device="tensorrt") as ours, load(bundle) as theirs:
        graph = ours.backend("decoder").graph
        state = [str(tensor.aliases) for tensor in graph.outputs if tensor.aliases]
        sizes: dict[Any, int] = {"B": 2, "T": 1, "S": 4}
        sides = []
        for side in (ours, theirs):
            feeds = {t.name: np.ones([sizes.get(n, n) for n in t.shape], t.dtype) for t in graph.inputs}
            for _ in range(2):
                logits = side.run(feeds, ["logits"])["logits"]
            sides.append((logits, feeds))
        (logits, found), (expected, fed) = sides
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
        for tensor in graph.inputs:
            np.testing.assert_allclose(found[tensor.name], fed[tensor.name], atol=1e-5)
            assert (np.abs(found[tensor.name] - 1).max() > 0) == (tensor.name in state)


def test_a_step_that_fails_leaves_the_state_as_it_was(
    put: Put, random_seq2seq_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be repeated, as a call without memory is."""
    with load(put(random_seq2seq_bundle), device="tensorrt") as seq2seq:
        graph = seq2seq.backend("decoder").graph
        sizes: dict[Any, int] = {"B": 1, "T": 1, "S": 2}
        feeds = {t.name: np.ones([sizes.get(n, n) for n in t.shape], t.dtype) for t in graph.inputs}
        wait = trt.Stream.wait

        def interrupted(stream: Any) -> None:
            wait(stream)
            raise KeyboardInterrupt

        seq2seq.run({name: array.copy() for name, array in feeds.items()}, ["logits"])  # makes the contexts
        monkeypatch.setattr(trt.Stream, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            seq2seq.run(feeds, ["logits"])
        monkeypatch.setattr(trt.Stream, "wait", wait)
        assert all(np.array_equal(array, np.ones_like(array)) for array in feeds.values())


def test_a_raw_run_writes_the_callers_own_caches(put: Put, gpt_bundle: Path) -> None:
    """Caches of 16 and of 48 tokens in host memory, where the engine has 64 alone; what is not written stays."""
    with load(put(gpt_bundle), device="tensorrt") as ours, load(gpt_bundle) as theirs:
        graph = ours.graph_for({"input_ids": None})
        for capacity in (16, 48):
            results = []
            for side in (ours, theirs):
                caches = {
                    t.name: np.zeros((2, t.shape[1], capacity, t.shape[3]), np.float32)
                    for t in graph.inputs
                    if "cache" in t.name
                }
                side.run({"input_ids": np.array([[5, 6, 7], [8, 9, 10]]), **caches})
                step = {"input_ids": np.array([[11], [12]]), "write_indices": np.array([3, 2])}
                results.append((side.run({**step, **caches}, ["logits"])["logits"], caches))
            (logits, caches), (expected, expected_caches) = results
            np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
            for name, cache in caches.items():
                assert cache.shape[2] == capacity
                np.testing.assert_allclose(cache, expected_caches[name], atol=1e-5)
                assert not cache[:, :, 4:].any()


def test_what_shapes_are_computed_of_is_read_on_the_host(put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path) -> None:
    """TensorRT reads it before anything runs: it is there when shapes are asked for."""
    gpu.on_host = frozenset({"write_indices"})
    with load(put(gpt_bundle), device="tensorrt") as ours, load(gpt_bundle) as theirs:
        assert ours.generate("It is", max_new_tokens=6) == theirs.generate("It is", max_new_tokens=6)


def test_a_step_past_the_end_is_refused(put: Put, gpt_bundle: Path) -> None:
    """TensorRT would drop it silently: the check is ours, in the backend as well as before it."""
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        backend = gpt.backend("decoder")
        length = gpt.max_size("C")
        state = backend.new_decoder_state(1, length, {})
        feeds = {"input_ids": np.array([[5, 6]]), "logits_positions": np.array([[1]]), **state.feeds}
        with pytest.raises(ShapeError, match=f"2 tokens at .* up to {length - 1} end at {length + 1}; .* C={length}"):
            backend.run({**feeds, "write_indices": np.array([length - 1])}, {})
        with pytest.raises(BackendError, match=f"cache holds {length}"):
            state.reserve(length + 1)


def test_threads_have_contexts_of_their_own(put: Put, gpu: EmulatedTensorRT, vit_bundle: Path) -> None:
    with load(put(vit_bundle), device="tensorrt") as ours, load(vit_bundle) as theirs:
        images = [np.random.default_rng(seed).random((1 + seed % 3, 3, 8, 8), np.float32) for seed in range(24)]
        expected = [theirs.run({"pixel_values": image})["logits"] for image in images]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda image: ours.run({"pixel_values": image})["logits"], images))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    assert 1 <= gpu.contexts <= 4


def test_a_call_that_fails_leaves_no_work_behind(
    put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caches go back to the pool, and somebody else writes there next."""
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        gpt.generate("It is", max_new_tokens=2)

        def interrupted(*given: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(trt.CallContext, "_fetched", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gpt.generate("It is", max_new_tokens=2)
        assert [stream.waiting for stream in gpu.cuda.streams if stream.waiting] == []


def test_many_threads_and_submit_share_few_contexts(
    put: Put, gpu: EmulatedTensorRT, vit_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve threads, then 24 calls of submit: never one more inside than there are callers, and all are served."""
    run, together, met = trt.CallContext.run, threading.Barrier(trt.MAX_CONCURRENT_CALLS + 1), []

    def meeting(caller: Any, *given: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            met.append(together.wait(0.5))  # which one more than there may be would pass
        return run(caller, *given)

    monkeypatch.setattr(trt.CallContext, "run", meeting)
    with load(put(vit_bundle), device="tensorrt") as ours, load(vit_bundle) as theirs:
        images = [np.random.default_rng(seed).random((1, 3, 8, 8), np.float32) for seed in range(24)]
        expected = [theirs.run({"pixel_values": image})["logits"] for image in images]
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda image: ours.run({"pixel_values": image})["logits"], images))
        assert met == []
        futures = [ours.submit({"pixel_values": image}) for image in images]
        found += [future.result()["logits"] for future in futures]
        assert ours._workers._max_workers == session.GPU_WORKERS == trt.MAX_CONCURRENT_CALLS == 4
        for a, b in zip(found, expected * 2, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    assert 1 <= gpu.contexts <= 4


def test_a_caller_that_fails_gives_its_turn_back(put: Put, gpu: EmulatedTensorRT, vit_bundle: Path) -> None:
    image = np.zeros((1, 3, 8, 8), np.float32)
    with load(put(vit_bundle), device="tensorrt") as vit:
        backend = vit.backend("model")
        for _ in range(trt.MAX_CONCURRENT_CALLS + 1):
            with pytest.raises(ShapeError):
                backend.run({"pixel_values": np.zeros((1, 4, 8, 8), np.float32)}, {})
        assert vit.run({"pixel_values": image})["logits"].shape[0] == 1
