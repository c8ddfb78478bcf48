"""A Flamingo on an emulated GPU, against its bundle on the CPU: images at the start, in the middle, and none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulated_gpu import EmulatedTensorRT, Put
from transom.export.engine.shapes import Shapes
from transom.runtime import load
from transom.runtime.backends.trt_memory import TrtDecoderState
from transom.runtime.errors import InputError
from transom.runtime.greedy_check import forced_logits
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt

MARK = 1
LONG: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "suppress_tokens": [0, 2]}
PROMPTS: dict[str, list[list[int]]] = {
    "start": [[MARK, 5, 6, 7], [MARK, MARK, 9, 10]],
    "middle": [[5, 6, MARK, 7], [9, MARK, 8, 8]],
    "none": [[5, 6, 7, 8], [9, 10, 11, 12]],
    "mixed": [[MARK, 5, MARK, 6, MARK, 7], [5, 6, 7]],
}
MIDWAY = [[MARK, 7, 8], [20, 21, MARK]]  # a new image for each row, between two chunks


def picture(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (20, 12, 3)).astype(np.uint8)


def interleaved(rows: list[list[int]]) -> list[InterleavedPrompt]:
    rng = np.random.default_rng(3)
    return [InterleavedPrompt(row, list(rng.standard_normal((row.count(MARK), 3, 20, 12), np.float32))) for row in rows]


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("beams", [1, 2])
def test_an_engine_computes_the_bundles_logits(case: str, beams: int, put: Put, random_flamingo_bundle: Path) -> None:
    """A prompt, steps of one token, new images midway, and steps again: within FP32's rounding."""
    prompts, midway = interleaved(PROMPTS[case]), interleaved(MIDWAY)
    chunks: list[Any] = [np.array([[7], [8]]), np.array([[9], [3]]), midway, np.array([[11], [12]])]
    if beams > 1:  # images for beams alone would be rows of their own: steps are enough
        chunks = [np.repeat(chunk, beams, axis=0) for chunk in chunks if isinstance(chunk, np.ndarray)]
    with load(put(random_flamingo_bundle), device="tensorrt") as ours, load(random_flamingo_bundle) as theirs:
        sides = [list(forced_logits(side, prompts, chunks, beams)) for side in (ours, theirs)]  # type: ignore[arg-type]
    assert len(sides[0]) == len(chunks) + 1
    for found, expected in zip(*sides, strict=True):
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_answers_and_dialogues_are_those_of_the_cpu(put: Put, random_flamingo_bundle: Path) -> None:
    prompts = [
        [picture(0), "how many sevens?"],
        ["how many sevens?"],
        [picture(1), ("how many ones?", "one"), picture(2), "and now?"],
    ]
    with load(put(random_flamingo_bundle), device="tensorrt") as ours, load(random_flamingo_bundle) as theirs:
        for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 3}):
            assert ours.answer(prompts, **LONG, **options) == theirs.answer(prompts, **LONG, **options)
        said = []
        for side in (ours, theirs):
            dialogue = side.dialogue()
            questions = ([picture(3), "how many ones?"], "and now?", ["how", picture(4), "what is left of the three?"])
            said.append([dialogue.answer(question, **LONG) for question in questions])
        assert said[0] == said[1]


def test_groups_of_a_raw_call_are_repeated(put: Put, random_flamingo_bundle: Path) -> None:
    """Four rows of two groups: the engine gets four rows of images, the caller keeps two."""
    rng = np.random.default_rng(0)
    with load(put(random_flamingo_bundle), device="tensorrt") as ours, load(random_flamingo_bundle) as theirs:
        spec = ours.backend("decoder").graph
        feeds = {t.name: rng.standard_normal((2, 4, 3, 5, 8), np.float32) for t in spec.inputs if "image_" in t.name}
        feeds["image_indices"] = rng.integers(0, 4, (4, 3))
        feeds["input_ids"] = rng.integers(3, 20, (4, 3))
        found, expected = (side.run(feeds, ["logits"])["logits"] for side in (ours, theirs))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_step_uploads_no_image(
    put: Put, gpu: EmulatedTensorRT, random_flamingo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One upload for each prompt's window and one for its steps; recorded steps launch on."""
    uploads: list[int] = []
    original = TrtDecoderState.set_constants

    def counted(self: TrtDecoderState, arrays: Any) -> None:
        uploads.append(len(arrays))
        original(self, arrays)

    monkeypatch.setattr(TrtDecoderState, "set_constants", counted)
    gpu.records_graphs = False
    with load(put(random_flamingo_bundle), device="tensorrt") as ours:
        ours.answer([picture(0), "how many sevens?"], **{**LONG, "max_new_tokens": 12})
        assert uploads == [4]  # keys and values of two blocks
        assert gpu.cuda.launches == 10  # of 11 steps: the first is on its own
        ours.answer([picture(0), ("how many ones?", "one"), picture(1), "and now?"], **LONG)
        assert uploads == [4, 4, 4]  # the prompt sees two images, each step the latest
        ours.answer([picture(0), "how many sevens?"], num_beams=3, **LONG)
        assert uploads == [4] * 4


def test_an_engine_of_narrower_sizes_is_obeyed(put: Put, random_flamingo_bundle: Path) -> None:
    folder = put(random_flamingo_bundle, shapes=Shapes(max={"B": 2, "I": 2}))
    prompts = [[picture(number), "how many ones?"] for number in range(3)]
    with load(folder, device="tensorrt") as ours, load(random_flamingo_bundle) as theirs:
        assert (ours.max_size("B"), ours.max_size("G"), ours.max_size("I")) == (2, 2, 2)
        assert ours.answer(prompts, **LONG) == theirs.answer(prompts, **LONG)
        assert ours.answer(prompts[0], num_beams=2, **LONG) == theirs.answer(prompts[0], num_beams=2, **LONG)
        with pytest.raises(InputError, match=r"Run `transom build BUNDLE --target rtx-sm89 --max I=3`"):
            ours.answer([picture(0), picture(1), picture(2), "how many ones?"], **LONG)


def test_all_memory_is_given_back(put: Put, gpu: EmulatedTensorRT, random_flamingo_bundle: Path) -> None:
    with load(put(random_flamingo_bundle), device="tensorrt") as ours:
        prompts = [[picture(0), "how many ones?"], ["a", picture(1), "how many ones?"]]
        for _ in range(2):
            ours.answer(prompts, num_beams=2, **LONG)
        before = gpu.cuda.allocations, gpu.cuda.device_bytes
        for _ in range(5):
            ours.answer(prompts, num_beams=2, **LONG)
        assert (gpu.cuda.allocations, gpu.cuda.device_bytes) == before
