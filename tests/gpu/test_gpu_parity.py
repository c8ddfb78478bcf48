"""On a GPU: what ships computes what PyTorch computes, in every family and precision, on every backend present."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import save_checkpoint
from transom.export.parity.compare import TOLERANCES
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.backends import cuda
from transom.runtime.backends.cuda import Gpu
from transom.runtime.errors import BackendError, ExportError
from transom.runtime.greedy_check import logits_along

Ready = Callable[..., Path]
RECURRENT = ("seq2seq", "seq2seq-fixed", "show_attend_tell")  # their decoders' state is replaced at every step
FAMILIES = (
    "vit",
    "minilm",
    "bert",
    "gpt",
    "transformer",
    "clip",
    "swin",
    "swinv2",
    "perceiver",
    "perceiver_bytes",
    "flamingo",
    *RECURRENT,
)
STEPS = 256
RECURRENT_STEPS = 60  # or as many as a model may write


@pytest.fixture(scope="session")
def long_gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 of two layers, head size 64, with room for 1,100 tokens."""
    sizes = {"n_positions": 1100, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_inner": 512}
    return save_checkpoint(tmp_path_factory.mktemp("long"), "GPT2LMHeadModel", **sizes)


def require_precision(precision: str, gpu: Gpu) -> None:
    if gpu.capability == (7, 5) and precision in ("bf16", "fp32"):
        pytest.skip(f"TensorRT-RTX has no {precision} on Turing")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str, precision: str, backend: str, ready: Ready, results: Any, gpu: Gpu) -> None:
    """The whole grid of shapes, 64 single steps, greedy generations; the accuracy gate where it is INT8."""
    require_precision(precision, gpu)
    verified = verify(ready(family, precision), device=backend)
    worst = max((case.worst for case in verified.cases), key=lambda comparison: comparison.error)
    gate = "" if verified.gate is None else f"; {verified.gate.summary()}"
    results.add(family, backend, precision, f"worst error {worst.error:.1e} of {TOLERANCES[precision]:g}{gate}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("length", [512, 1024])
def test_causal_attention_of_long_prompts(
    length: int, precision: str, backend: str, ready: Ready, long_gpt: Path, results: Any, gpu: Gpu
) -> None:
    """All at once, through the raw graph: where TensorRT 10 was wrong from 512 tokens on."""
    require_precision(precision, gpu)
    bundle = ready("long-gpt", precision, long_gpt)
    ids = np.random.default_rng(length).integers(0, 100, (1, length))
    with load(bundle, device=backend) as ours, load(ready("long-gpt", "fp32", long_gpt)) as theirs:
        found, expected = (side.run({"input_ids": ids}, ["logits"])["logits"] for side in (ours, theirs))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    results.add(f"causal, S={length}", backend, precision, f"worst error {error:.1e} of {TOLERANCES[precision]:g}")
    assert error <= TOLERANCES[precision]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recorded", ["1", "0"])
def test_steps(
    recorded: str, backend: str, ready: Ready, long_gpt: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 tokens fed one by one, rows at different positions, with CUDA graphs and without."""
    if backend != "tensorrt" and recorded == "0":
        pytest.skip("CUDA graphs are of the TensorRT backend alone")
    monkeypatch.setenv("TRANSOM_CUDA_GRAPHS", recorded)
    bundle = ready("long-gpt", "fp16", long_gpt)
    tokens = np.random.default_rng(0).integers(0, 100, (3, STEPS))
    prompts = [[1, 2, 3], [4], list(range(40))]
    with load(bundle, device=backend) as ours, load(ready("long-gpt", "fp32", long_gpt)) as theirs:
        found, expected = logits_along(ours, prompts, tokens), logits_along(theirs, prompts, tokens)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    results.add(f"{STEPS} steps, CUDA graphs {'on' if recorded == '1' else 'off'}", backend, "fp16", f"{error:.1e}")
    assert error <= TOLERANCES["fp16"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recorded", ["1", "0"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("model", RECURRENT)
def test_steps_over_a_recurrent_state(
    model: str,
    precision: str,
    recorded: str,
    backend: str,
    ready: Ready,
    results: Any,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three rows, sources of different lengths or images: tokens one by one, then beams that change places.

    The encoder's loop runs over padding too; FP32's beams are those of the CPU.
    """
    require_precision(precision, gpu)
    if backend != "tensorrt" and recorded == "0":
        pytest.skip("CUDA graphs are of the TensorRT backend alone")
    monkeypatch.setenv("TRANSOM_CUDA_GRAPHS", recorded)
    with load(ready(model, precision), device=backend) as ours, load(ready(model, "fp32"), device="cpu") as theirs:
        prompts = recurrent_prompts(theirs)
        vocabulary = theirs.backend("decoder").graph.outputs[0].shape[2]
        steps = min(RECURRENT_STEPS, theirs.context - 1)
        tokens = np.random.default_rng(0).integers(0, vocabulary, (len(prompts), steps))
        found, expected = logits_along(ours, prompts, tokens), logits_along(theirs, prompts, tokens)
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        graphs = "on" if recorded == "1" else "off"
        results.add(f"{steps} steps of {model}, CUDA graphs {graphs}", backend, precision, f"{error:.1e}")
        assert error <= TOLERANCES[precision]
        if precision == "fp32":
            asked = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": min(20, steps)}
            assert ours.generate(prompts, **asked) == theirs.generate(prompts, **asked)


def recurrent_prompts(bundle: Any) -> list[Any]:
    """Three sources of 40, 1 and 7 tokens, or three images of noise."""
    source = bundle.backend("encoder").graph.inputs[0]
    rng = np.random.default_rng(1)
    if source.dtype == "float32":
        return [*rng.standard_normal((3, *source.shape[1:]), np.float32)]
    return [rng.integers(3, source.exclusive_max, length).tolist() for length in (40, 1, 7)]


@pytest.mark.timeout(900)
def test_device_memory_is_flat(backend: str, ready: Ready, results: Any) -> None:
    """1,000 generations of different lengths and batches."""
    with load(ready("gpt", "fp16"), device=backend) as gpt:

        def generate(count: int) -> int:
            for number in range(count):
                gpt.generate([[1, 2, 3]] * (1 + number % 3), max_new_tokens=1 + number % 7, num_beams=1 + number % 2)
            free, _ = cuda.call("cudaMemGetInfo")
            return int(free)

        before = generate(100)
        grown = before - generate(900)
    results.add("1,000 generations", backend, "fp16", f"device memory grew by {max(grown, 0) >> 10} KiB")
    assert grown < 1 << 20


def test_a_gpu_without_an_engine_says_what_to_build(gpu: Gpu, vit_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"the bundle has no engines; this GPU is .* Run `transom build BUNDLE"):
        load(vit_bundle, device="tensorrt")


def test_tensorrt_rtx_says_what_it_has_no_kernels_for(gpu: Gpu, vit_bundle: Path) -> None:
    from transom.export.engine.targets import find_targets

    target = f"rtx-{gpu.sm}"
    try:
        find_targets([target])
    except ExportError as error:
        assert target in str(error)  # noqa: PT017
    else:
        pytest.skip(f"TensorRT-RTX has kernels for {gpu}")
