"""The TensorRT backend's bookkeeping: plans picked, buffers, caches in place, recorded steps, errors. See emulated_gpu.

What a GPU computes is for ``make test-gpu``, on a machine that has one.
"""

from __future__ import annotations

import gc
import hashlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from command_line import changed_bundle, document, probe_here, transom
from emulated_gpu import (
    EmulatedContext,
    EmulatedCuda,
    EmulatedEngine,
    EmulatedRuntime,
    EmulatedRuntimeCache,
    EmulatedRuntimeConfig,
    EmulatedTensorRT,
    Plan,
    names_of,
)
from transom.cli import examine
from transom.export.bundle_writer import add_to_bundle
from transom.export.engine.profiles import profiles_of
from transom.export.engine.shapes import Shapes, bounds_to_json, narrowed
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.runtime import load, session
from transom.runtime.backends import cuda, trt, trt_library
from transom.runtime.backends.cuda import Gpu
from transom.runtime.backends.trt_memory import Pool
from transom.runtime.backends.trt_plans import pick_plan, require_version
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, BundleError, InputError, ParityError, ShapeError
from transom.runtime.graph_spec import Graph
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.manifest_graphs import Plan as PlanFile
from transom.runtime.selftest import selftest

real_cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
try:
    real_trt = trt_library.library(trt_library.RTX)
except BackendError:
    pytest.skip("TensorRT-RTX is not installed: pip install 'transom[rtx]'", allow_module_level=True)

Put = Callable[..., Path]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[EmulatedTensorRT]:
    """An SM89 of 4 GiB with TensorRT-RTX."""
    emulated = EmulatedTensorRT(real_trt, EmulatedCuda(real_cuda))
    monkeypatch.setattr(cuda, "runtime", lambda: emulated.cuda)
    monkeypatch.setattr(trt, "library", lambda kind: emulated)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield emulated
    gc.collect()  # what holds device memory gives it back to this GPU, not to the next test's


@pytest.fixture
def put(gpu: EmulatedTensorRT, tmp_path: Path) -> Put:
    """``put(bundle)`` -> a copy of it with a plan of each graph for SM89, which the emulation knows."""

    def copy(
        source: Path,
        target: str = "rtx-sm89",
        library: str = "TensorRT-RTX",
        shapes: Shapes | None = None,
        **more: str,
    ) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"))
        bundle = Bundle(folder)
        plans, names = {}, {}
        specs = [file.graph for file in bundle.manifest.graphs]
        axes = narrowed(bundle.manifest.axes, specs, shapes or Shapes())
        recorded = {"axes": bounds_to_json(axes, specs)} if shapes is not None else {}
        for name, graph in tensorrt_graphs(bundle, axes=axes).items():
            spec = next(file.graph for file in bundle.manifest.graphs if file.graph.name == name)
            profiles = [profile.shapes for profile in profiles_of(spec, axes)]
            names[name] = f"engines/{target}.{name}.plan"
            plans[names[name]] = f"plan of {folder} {name}".encode()
            gpu.plans[hashlib.sha256(plans[names[name]]).hexdigest()] = Plan(graph.serialized(), profiles)
        described = {"library": library, "version": real_trt.__version__, "plans": names, **recorded, **more}
        add_to_bundle(folder, plans, {"engines": {target: described}})
        return folder

    return copy


def test_the_emulation_has_no_name_of_its_own() -> None:
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


@pytest.mark.parametrize("name", ["vit", "gpt", "dates", "clip", "bert"])
def test_every_family_computes_its_golden_values(name: str, put: Put, request: pytest.FixtureRequest) -> None:
    """Encoders, two towers, decoders through whole generations, one with an encoder: all within FP32's 2e-5."""
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


def test_device_memory_is_flat_and_given_back(put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path) -> None:
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        for _ in range(3):
            gpt.generate(["It is a", "My"], max_new_tokens=8, num_beams=2)
        before = gpu.cuda.allocations, gpu.cuda.device_bytes
        for _ in range(30):
            gpt.generate(["It is a", "My"], max_new_tokens=8, num_beams=2)
        assert (gpu.cuda.allocations, gpu.cuda.device_bytes) == before
    del gpt
    gc.collect()
    assert gpu.cuda.device_bytes == 0


def test_compiled_kernels_are_kept_for_the_next_start(put: Put, gpu: EmulatedTensorRT, vit_bundle: Path) -> None:
    folder = put(vit_bundle)
    for expected in (1, 1):  # contexts that had to compile: the first load's
        with load(folder, device="tensorrt") as vit:
            vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
        del vit
        gc.collect()
        assert gpu.compiled == expected
    (kept,) = (folder.parent / "cache/transom/kernels").iterdir()
    assert kept.name.startswith(f"tensorrt_rtx-{real_trt.__version__}-sm89-13000-")
    kept.write_bytes(b"of another GPU")
    with load(folder, device="tensorrt") as vit:
        vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
    assert gpu.compiled == 2


def test_no_memory_is_said_and_survived(put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path) -> None:
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        answer = gpt.generate("It is", max_new_tokens=4)
        gpu.cuda.total = gpu.cuda.device_bytes + (1 << 18)
        with pytest.raises(BackendError, match=r"the GPU has no memory left\. Give fewer or shorter inputs"):
            gpt.generate(["It is"] * 16, max_new_tokens=4)
        assert gpt.generate("It is", max_new_tokens=4) == answer


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


ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 << 30, 13000)
HOPPER = Gpu("NVIDIA H200", (9, 0), 141 << 30, 13000)


def file_with(**plans: PlanFile) -> GraphFile:
    named = {name.replace("_", "-"): plan for name, plan in plans.items()}
    return GraphFile(Graph("model", (), ()), {"default": "model.onnx"}, None, named)


def test_the_plan_is_that_of_the_gpu() -> None:
    rtx = PlanFile("engines/rtx-sm89.plan", "TensorRT-RTX", "1.7.1.116")
    full = PlanFile("engines/tensorrt.plan", "TensorRT", "11.0.0.1", "sm90")
    both = file_with(rtx_sm89=rtx, tensorrt=full)
    assert pick_plan(both, ADA) is rtx
    assert pick_plan(both, HOPPER) is full
    with pytest.raises(
        BackendError,
        match=r"no engines; this GPU is NVIDIA GeForce RTX 4090 \(SM89\). Run `transom build BUNDLE --target rtx-sm89`",
    ):
        pick_plan(file_with(), ADA)
    with pytest.raises(BackendError, match=r"engines for rtx-sm89, tensorrt \(SM90\); .* --target rtx-sm120`"):
        pick_plan(both, Gpu("RTX 5090", (12, 0), 0, 0))
    with pytest.raises(
        BackendError, match=r"engines for rtx-sm89; this GPU is NVIDIA H200 \(SM90\). .* --target tensorrt`"
    ):
        pick_plan(file_with(rtx_sm89=rtx), HOPPER)


def test_the_library_has_to_be_able_to_read_the_plan() -> None:
    """TensorRT-RTX reads what is older; TensorRT its own version's alone."""
    rtx, full = PlanFile("a.plan", "TensorRT-RTX", "1.7.1.116"), PlanFile("b.plan", "TensorRT", "11.0.0.114")
    require_version(rtx, "1.7.1.116")
    require_version(rtx, "1.10.0.1")
    require_version(full, "11.0.0.200")
    with pytest.raises(BackendError, match=r"a.plan was built by TensorRT-RTX 1.7.1.116; TensorRT-RTX here is 1.6.2.1"):
        require_version(rtx, "1.6.2.1")
    for other in ("11.1.0.0", "10.13.0.0"):
        with pytest.raises(BackendError, match=f"TensorRT here is {other}"):
            require_version(full, other)


def test_a_plan_that_does_not_load_says_what_tensorrt_said(put: Put, gpu: EmulatedTensorRT, vit_bundle: Path) -> None:
    folder = put(vit_bundle)
    gpu.plans.clear()
    with pytest.raises(
        BackendError,
        match=r"TensorRT-RTX cannot load engines/rtx-sm89.model.plan on Emulated \(SM89\): magic tag does not match",
    ):
        load(folder, device="tensorrt")
    with (folder / "engines/rtx-sm89.model.plan").open("ab") as plan:
        plan.truncate(4)
    with pytest.raises(BundleError, match="it is truncated or changed"):  # before TensorRT sees it
        load(folder, device="tensorrt")


def test_without_a_gpu_the_error_says_so(vit_bundle: Path) -> None:
    """The real CUDA runtime on a machine without a driver."""
    code = real_cuda.cudaGetDeviceCount()[0]
    if int(code) == 0:
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=rf"no NVIDIA GPU can be used here \({code.name}\)"):
        load(vit_bundle, device="tensorrt")
    with load(vit_bundle, device="auto") as vit:
        assert vit.device == "cpu"


def test_without_cuda_python_the_error_names_the_command(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    cuda.runtime.cache_clear()
    with pytest.raises(BackendError, match=r"cuda-python cannot be imported .* Run `pip install 'transom\[rtx\]'`"):
        load(vit_bundle, device="tensorrt")
    cuda.runtime.cache_clear()


def test_auto_passes_over_an_engine_that_the_library_cannot_read(
    put: Put, gpu: EmulatedTensorRT, vit_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built by a newer library; or of bytes that it does not know; or of a graph with other names. Doctor says so."""
    monkeypatch.setattr(examine, "run_probe", probe_here)

    def newer(words: dict[str, Any]) -> None:
        words["engines"]["rtx-sm89"]["version"] = "99.0.0.1"

    (Path(folder := put(vit_bundle)).parent / "newer").mkdir()
    folders = {"was built by TensorRT-RTX 99.0.0.1": changed_bundle(folder, folder.parent / "newer", newer)}
    unknown = put(vit_bundle)
    gpu.plans.pop(hashlib.sha256((unknown / "engines/rtx-sm89.model.plan").read_bytes()).hexdigest())
    folders["magic tag does not match"] = unknown
    for said, bundle in folders.items():
        with pytest.raises(BackendError, match=said):
            load(bundle, device="tensorrt")
        with load(bundle, device="auto") as vit:
            assert vit.device == "cpu"
            assert said in vit.choice.passed_over["tensorrt"]
            choice = vit.choice
        told = document(transom("doctor", bundle, "--json"))["auto"]
        assert (told["device"], told["passed_over"]) == (choice.device, choice.passed_over)
    sound = put(vit_bundle)
    assert document(transom("doctor", sound, "--json"))["auto"] == {
        "device": "tensorrt", "reason": "the bundle's engine for this GPU is loaded", "passed_over": {},
    }  # fmt: skip


def test_a_driver_that_cuda_python_raises_for_is_an_absent_gpu(
    put: Put, gpu: EmulatedTensorRT, vit_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of cuda-python raise where others give a code."""

    def raises() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    folder = put(vit_bundle)
    monkeypatch.setattr(gpu.cuda, "cudaGetDeviceCount", raises)
    with pytest.raises(BackendError, match=r"cudaGetDeviceCount cannot be called \(Failed to dlopen libcuda\.so\.1\)"):
        load(folder, device="tensorrt")
    with load(folder, device="auto") as vit:
        assert vit.device == "cpu"


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


def test_the_pool_keeps_a_bounded_part_of_what_it_saw(gpu: EmulatedTensorRT) -> None:
    """Sixteen sizes through a pool of 1000 bytes: the last ones stay, and are taken again."""
    pool = Pool(1_000)
    for size in range(100, 1_700, 100):
        pool.give(pool.take(size))
        assert gpu.cuda.device_bytes <= 1_000
    for size in (300, 400, 500):
        pool.give(pool.take(size))
    assert gpu.cuda.device_bytes == 900  # 300 was freed
    before = gpu.cuda.allocations
    held = [pool.take(500), pool.take(400)]
    assert gpu.cuda.allocations == before
    for memory in held:
        pool.give(memory)
    pool.clear()
    del held, memory
    gc.collect()
    assert gpu.cuda.device_bytes == 0


def test_generations_of_every_size_leave_an_eighth_of_the_memory(
    put: Put, gpu: EmulatedTensorRT, gpt_bundle: Path
) -> None:
    """A service sees every number of rows: caches of each would stay."""
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        gpt.generate("It", max_new_tokens=2)
    one = gpu.cuda.peak
    gpu.cuda.total = 16 * one
    with load(put(gpt_bundle), device="tensorrt") as gpt:
        for rows in (1, 2, 3, 4, 5):
            gpt.generate(["It"] * rows, max_new_tokens=2)
        pool = gpt.backend("decoder")._pool
        assert sum(memory.size for memory in pool._free) == pool._kept <= gpu.cuda.total // 8


def test_what_the_pool_keeps_is_in_nobodys_way(put: Put, gpu: EmulatedTensorRT, vit_bundle: Path) -> None:
    with load(put(vit_bundle), device="tensorrt") as vit:
        pool = vit.backend("model")._pool
        pool.give(pool.take(1 << 20))
        gpu.cuda.total = gpu.cuda.device_bytes  # nothing is left
        assert vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})["logits"].shape[0] == 1
        assert pool._free == []


def test_an_engine_of_narrower_sizes_is_obeyed(put: Put, bert_bundle: Path) -> None:
    """Rows go in batches that the engine takes; what it does not take names its bounds and the build for more."""
    folder = put(bert_bundle, shapes=Shapes(max={"B": 2, "S": 9}))
    texts = ["the first", "of the year", "was the last one", "a"]
    with load(folder, device="tensorrt") as ours, load(bert_bundle) as theirs:
        assert (ours.max_size("B"), ours.max_size("S")) == (2, 9)
        np.testing.assert_allclose(ours.embed(texts), theirs.embed(texts), atol=1e-5)
        with pytest.raises(
            ShapeError,
            match=r"axis S allows 1\.\.9 in the engine for rtx-sm89\. Run `transom build .*-sm89 --max S=10`",
        ):
            ours.run({"input_ids": np.ones((1, 10), np.int64), "attention_mask": np.ones((1, 10), np.int64)})
        with pytest.raises(
            InputError, match=r"Pass truncate=True, or run `transom build BUNDLE --target rtx-sm89 --max S="
        ):
            ours.tokenizer().encode(["the first of the year was the last one that we had"], truncate=False)
    told = document(transom("selftest", folder, "--device", "tensorrt", "--json"))
    assert all("S=1" in case["name"] or "S=7" in case["name"] for case in told["cases"])
    assert any("axis S allows 1..9 in the engine for rtx-sm89" in line for line in told["left_out"])
    tight = put(bert_bundle, shapes=Shapes(min={"B": 2, "S": 8}, max={"B": 2, "S": 9}))
    with pytest.raises(ShapeError, match=r"the engine of .* takes none of its golden values: "):
        selftest(tight, device="tensorrt")
    timed = document(transom("bench", folder, "--device", "tensorrt", "--runs", "1", "--json"))["timings"]
    assert timed[0]["sizes"] == {"B": 1, "S": 9}


def test_a_shorter_cache_is_a_shorter_context(put: Put, gpt_bundle: Path) -> None:
    folder = put(gpt_bundle, shapes=Shapes(max={"B": 1, "C": 100}))
    with load(folder, device="tensorrt") as ours, load(gpt_bundle) as theirs:
        assert ours.context == 100
        assert ours.generate("It is", max_new_tokens=8) == theirs.generate("It is", max_new_tokens=8)
        with pytest.raises(
            InputError, match=r"the context holds 100\. .*transom build BUNDLE --target rtx-sm89 --max C="
        ):
            ours.generate("It is", max_new_tokens=120)
        with pytest.raises(InputError, match=r"this bundle allows 1\. Run `transom build .* --max B=2`"):
            ours.generate("It is", num_beams=2, max_new_tokens=2)
    report = selftest(folder, device="tensorrt")
    assert report.worst.error < 2e-5
    (said,) = report.left_out
    with pytest.raises(ShapeError, match=r"none of its golden values: of its prompts 0 fit into 24 tokens"):
        selftest(put(gpt_bundle, shapes=Shapes(max={"C": 24})), device="tensorrt")
    assert re.match(r"generation: 1 of \d+ rows and \d+ of \d+ steps fit into the engine", said)


def test_an_engine_without_recorded_bounds_goes_by_its_profiles(put: Put, bert_bundle: Path) -> None:
    """As version 0.1.0 wrote them: what bundle.json does not say, the engine does."""
    with load(put(bert_bundle), device="tensorrt") as bert:
        assert bert.axes == bert.manifest.axes
        backend = bert.backend("model")
        longer = {t.name: np.ones((1, 600), np.int64) for t in backend.graph.inputs}
        with pytest.raises(ShapeError, match=r"takes \(1, 1\) to .* Run `transom build BUNDLE --target rtx-sm89` with"):
            backend.run(longer, {})
