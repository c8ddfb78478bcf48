"""State in ONNX Runtime's own memory, as on a GPU: here in its memory of the CPU, by the same calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom.runtime import load
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.backends.ort_cache import OrtDecoderState
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.decoder_state import DecoderState
from transom.runtime.graph_spec import cache_inputs

ORT: dict[str, Any] = {"threads": 1, "kernels": "onnxruntime"}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[OrtDecoderState]:
    """Every decoder keeps its state in OrtValues; those that were made."""
    made: list[OrtDecoderState] = []

    def new_decoder_state(self: OrtBackend, rows: int, limit: int, encoder_outputs: Any) -> DecoderState:
        caches = cache_inputs(self.graph)
        made.append(OrtDecoderState(onnxruntime(), "cpu", caches, rows, limit, encoder_outputs))
        return made[-1]

    monkeypatch.setattr(OrtBackend, "new_decoder_state", new_decoder_state)
    return made


def test_generation_over_values_of_the_device(
    gpt_bundle: Path, dates_bundle: Path, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: list[OrtDecoderState]
) -> None:
    """Greedy past a growth of the caches at 128 tokens, beams that fork and change places, an encoder's keys beside."""
    asked: list[dict[str, Any]] = [{"max_new_tokens": 140}, {"max_new_tokens": 20, "num_beams": 3}]
    found = []
    for _ in range(2):
        with load(gpt_bundle, **ORT) as gpt, load(dates_bundle, **ORT) as dates:
            texts = [gpt.generate(["It is a truth", "My dear"], **options) for options in asked]
            found.append([*texts, dates.translate(["3 May 1979", "March 2, 1921"], num_beams=2)])
        monkeypatch.undo()  # the second time in numpy arrays
    assert found[0] == found[1]
    assert len(as_on_a_gpu) == 3
    assert as_on_a_gpu[0].capacity == 256


def test_a_step_writes_the_values_themselves(gpt_bundle: Path) -> None:
    with load(gpt_bundle, **ORT) as gpt:
        backend = gpt.backend("decoder")
        graph = backend.graph
        state = OrtDecoderState(onnxruntime(), "cpu", cache_inputs(graph), 1, 256, {})
        state.reserve(3)
        feeds = {
            "input_ids": np.array([[5, 6, 7]]),
            "write_indices": np.array([0]),
            "logits_positions": np.array([[2]]),
        }
        held = state.feeds
        backend.run({**feeds, **held}, {})
        for value in held.values():
            array = value.numpy()
            assert array[:, :, :3].any()
            assert not array[:, :, 3:].any()


def test_images_are_values_of_the_device_that_beams_share(
    random_flamingo_bundle: Path, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: list[OrtDecoderState]
) -> None:
    """Uploaded once for the prompts and once for all steps; beams fork, change places and end."""
    uploads: list[int] = []
    set_constants = OrtDecoderState.set_constants

    def noted(self: OrtDecoderState, arrays: Any) -> None:
        uploads.append(len(arrays))
        set_constants(self, arrays)

    monkeypatch.setattr(OrtDecoderState, "set_constants", noted)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (20, 12, 3)).astype(np.uint8) for _ in range(3)]
    prompts = [[images[0], ("how many sevens?", "two"), images[1], "and now?"], [images[2], "how many ones?"]]
    found = []
    for _ in range(2):
        with load(random_flamingo_bundle, threads=1) as flamingo:
            long = {"max_new_tokens": 6, "eos_token_id": None}
            found.append([flamingo.answer(prompts, num_beams=2, **long), flamingo.answer(prompts, **long)])
            with flamingo.dialogue() as dialogue:
                found[-1] += [dialogue.answer(question, **long) for question in (prompts[1], "and now?", prompts[0])]
        monkeypatch.undo()  # the second time in numpy arrays
    assert found[0] == found[1]
    assert len(as_on_a_gpu) == 3
    assert uploads == [4] * 7  # two of each batch; one, then none for the same image, and two of the last question
