"""What ``auto`` is: the fastest device that works, never an error for one that does not; doctor says what load does."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import document, error_line, probe_here, transom
from transom.cli import examine
from transom.runtime import load
from transom.runtime.backends import ort
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.devices import Choice, choose, without_engines
from transom.runtime.errors import BackendError, BundleError
from transom.runtime.loading import choice_for

CUDA = "CUDAExecutionProvider"


@pytest.fixture
def compiled_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that was compiled with CUDA, on a machine without a GPU: it offers what it cannot give."""
    library, offered = onnxruntime(), [CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(library, "get_available_providers", lambda: offered)


def loaded_quietly(path: Path, device: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this CPU's onnxruntime, which does not know the name
        return load(path, device=device)


@pytest.mark.usefixtures("compiled_for_gpus")
def test_auto_goes_on_where_the_provider_is_compiled_in_and_no_gpu_is_there(
    vit_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        BackendError, match=r"chose \['CPUExecutionProvider'\] instead\. Is there a GPU \(`nvidia-smi`\)"
    ):
        loaded_quietly(vit_bundle, "cuda")
    with loaded_quietly(vit_bundle, "auto") as vit:
        assert vit.device == vit.choice.device == "cpu"
        assert [*vit.choice.passed_over] == ["tensorrt", "cuda"]
        assert "Is there a GPU" in vit.choice.passed_over["cuda"]
        vit.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
    assert capfd.readouterr().out == ""  # ONNX Runtime prints where it falls back


@pytest.mark.usefixtures("compiled_for_gpus")
def test_onnxruntime_does_not_go_on_by_itself(
    vit_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where CUDA raises, its Python wrapper prints to stdout and opens the session on the CPU, unless told not to."""
    library = onnxruntime()
    create = library.InferenceSession._create_inference_session

    def without_gpu(session: Any, providers: Sequence[str], *rest: Any) -> Any:
        if CUDA in providers:
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
        return create(session, providers, *rest)

    monkeypatch.setattr(library.InferenceSession, "_create_inference_session", without_gpu)
    with pytest.raises(BackendError, match=r"on cuda: CUDA failure 100: no CUDA-capable device is detected\. Is"):
        loaded_quietly(vit_bundle, "cuda")
    assert capfd.readouterr().out == ""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("compiled_for_gpus")
def test_doctor_tells_what_load_chooses(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "run_probe", probe_here)
    with loaded_quietly(vit_bundle, "auto") as vit:
        expected = vit.choice
    for arguments in (("doctor", "--json"), ("doctor", vit_bundle, "--json")):
        told = document(transom(*arguments))
        assert told["auto"]["device"] == expected.device == "cpu"
        assert "Is there a GPU" in told["auto"]["passed_over"]["cuda"]
        assert told["problems"] == []
    assert told["auto"]["passed_over"] == expected.passed_over
    text = transom("doctor", vit_bundle).stdout
    assert re.search(r"^auto +cpu: ", text, re.MULTILINE)
    assert re.search(r"^not cuda +device .cuda. was asked for; ONNX Runtime chose ", text, re.MULTILINE)
    assert re.search(r"^not tensorrt +the bundle has no engines; `transom build` makes them$", text, re.MULTILINE)


def test_doctor_loads_a_bundle_in_a_process_of_its_own(vit_bundle: Path, tmp_path: Path) -> None:
    with load(vit_bundle, device="auto") as vit:
        assert document(transom("doctor", vit_bundle, "--json"))["auto"]["device"] == vit.device
    assert "has no bundle.json" in error_line(transom("doctor", tmp_path))


def test_the_fastest_that_opens_is_taken() -> None:
    """A library that is absent and a plan that disagrees with bundle.json are passed over; a wrong call is not."""

    def opener(wrong: Mapping[str, Exception]) -> Any:
        def open_on(device: str) -> str:
            if device in wrong:
                raise wrong[device]
            return f"opened on {device}"

        return open_on

    gone, strange = BackendError("no library"), BundleError("another engine")
    fastest = Choice("tensorrt", "the bundle's engine for this GPU is loaded")
    assert choose(opener({}), {}) == ("opened on tensorrt", fastest)
    opened, choice = choose(opener({"tensorrt": strange}), {})
    assert (opened, choice.device, choice.passed_over) == ("opened on cuda", "cuda", {"tensorrt": "another engine"})
    opened, choice = choose(opener({"cuda": gone}), {"tensorrt": "no engines"})
    assert (opened, choice.device) == ("opened on cpu", "cpu")
    assert choice.passed_over == {"tensorrt": "no engines", "cuda": "no library"}
    with pytest.raises(BackendError, match="no onnxruntime"):
        choose(opener({"tensorrt": gone, "cuda": gone, "cpu": BackendError("no onnxruntime")}), {})


def test_without_a_bundle_a_small_graph_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    opened = ort.open_session

    def noted(graph: Any, read: Any, device: str, threads: int | None) -> Any:
        tried.append(device)
        return opened(graph, read, "cpu", threads)

    monkeypatch.setattr(ort, "open_session", noted)
    assert choice_for(None).device == "cuda"  # which opens, here
    assert tried == ["cuda"]


def test_engines_are_needed_of_every_graph(clip_bundle: Path) -> None:
    from dataclasses import replace

    from transom.runtime.bundle import Bundle
    from transom.runtime.manifest_graphs import GraphFile, Plan

    graphs: Sequence[GraphFile] = Bundle(clip_bundle).manifest.graphs
    planned = [replace(graph, plans={"rtx-sm89": Plan("x.plan", "TensorRT-RTX", "1.7")}) for graph in graphs]
    assert [*without_engines(graphs)] == [*without_engines([planned[0], graphs[1]])] == ["tensorrt"]
    assert without_engines(planned) == {}
