"""Parity of prompts with images among their tokens, and the arrays that golden values keep of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from conftest import Once
from flamingo_bundles import ROWS, SEED, SMALL, bundle_of, pixels, words
from flamingo_models import TEXT, VOCABULARY, write_flamingo, write_tokenizer
from transom.export import pipeline
from transom.export.parity.compare import TOLERANCES
from transom.export.parity.inputs import parity_inputs
from transom.export.parity.interleaved_scenarios import interleaved_scenarios
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, ParityError
from transom.runtime.golden import are_prompts
from transom.runtime.greedy_check import forced_logits, greedy, prompts_from_arrays, prompts_to_arrays
from transom.runtime.image_cache import ImageCache
from transom.runtime.selftest import selftest
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt

# ---- parity


def test_scenarios_have_images_everywhere_and_stay_within_the_bundle(once: Once) -> None:
    bundle = Bundle(bundle_of(once))
    manifest = bundle.manifest
    mark, most = manifest.options["image_token_id"], manifest.axes["I"].max
    scenarios = interleaved_scenarios(manifest, parity_inputs([file.graph for file in manifest.graphs], None, None))
    prompts = [prompt for scenario in scenarios for prompt in scenario.prompts]
    chunks = [chunk for scenario in scenarios for chunk in scenario.chunks if isinstance(chunk, list)]
    for row in [*prompts, *(row for chunk in chunks for row in chunk)]:
        assert row.ids.count(mark) == len(row.pixels)
    firsts = [prompt.ids.index(mark) if prompt.pixels else None for prompt in scenarios[-1].prompts]
    assert firsts == [0, 5, None]  # at the start, in the middle, nowhere
    assert max(len(prompt.pixels) for prompt in prompts) == most == 6
    assert {tuple(len(prompt.pixels) for prompt in scenario.prompts) for scenario in scenarios} >= {(0, 1, 2), (6,)}
    assert any(row.ids[0] == mark for chunk in chunks for row in chunk)
    assert [scenario.beams for scenario in scenarios].count(2) == 1
    for scenario in scenarios:
        lengths = [chunk.shape[1] if isinstance(chunk, np.ndarray) else len(chunk[0]) for chunk in scenario.chunks]
        assert max(map(len, scenario.prompts)) + sum(lengths) <= manifest.axes["C"].max
        assert len(scenario.prompts) * scenario.beams <= ROWS
        seen = [len(prompt.pixels) for prompt in scenario.prompts]
        for chunk in scenario.chunks:
            if isinstance(chunk, list):
                seen = [count + len(row.pixels) for count, row in zip(seen, chunk, strict=True)]
        assert max(seen) <= most


@pytest.mark.parametrize("bounds", [{"B": 1, "P": 2, "C": 9, "I": 1}, {"B": 1, "C": 1}], ids=str)
def test_tight_bounds_export_and_pass_their_selftest(tmp_path: Path, bounds: dict[str, int], traced_once: None) -> None:
    """One row, one image, fewer logits than tokens in a step; a context in which nothing can be generated."""
    folder = write_flamingo(tmp_path / "checkpoint", gates=1.0, seed=SEED, **SMALL)
    pipeline.export(str(folder), tmp_path / "out", max_sizes=bounds)
    assert verify(tmp_path / "out").cases
    assert selftest(tmp_path / "out").cases


def see_the_image_before(model: ir.Model) -> None:
    """A token of a row's second image sees its first one, and so on: the mask is off by one image."""
    (indices,) = (value for value in model.graph.inputs if value.name == "image_indices")
    readers = list(indices.consumers())
    one = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(1, np.int64))})
    more = ir.node("Greater", [indices, one.outputs[0]])
    before = ir.node("Sub", [indices, one.outputs[0]])
    shifted = ir.node("Where", [more.outputs[0], before.outputs[0], indices])
    for reader in readers:
        for place, value in enumerate(reader.inputs):
            if value is indices:
                reader.replace_input_with(place, shifted.outputs[0])
    model.graph.insert_before(model.graph[0], [one, more, before, shifted])


def read_where_there_is_none(model: ir.Model) -> None:
    """A token before the first image reads what it sees of all columns."""
    for node in model.graph:
        if node.op_type == "Where" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.BOOL:
            kept = node.inputs[1]
            assert kept is not None
            for reader in list(node.outputs[0].consumers()):
                for place, value in enumerate(reader.inputs):
                    if value is node.outputs[0] and kept.shape == value.shape:
                        reader.replace_input_with(place, kept)


@pytest.mark.parametrize("change", [see_the_image_before, read_where_there_is_none])
def test_a_graph_that_shows_a_token_the_wrong_image_fails(
    once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced_once: None, change: Any
) -> None:
    checkpoint = bundle_of(once).parent / "checkpoint"
    trace = pipeline.onnx_from_module

    def changed(module: Any, graph: Any, axes: Any) -> ir.Model:
        model = trace(module, graph, axes)
        if graph.name == "decoder":
            change(model)
        return model

    monkeypatch.setattr(pipeline, "onnx_from_module", changed)
    with pytest.raises(ParityError, match=r"differs from PyTorch at B=\d+ prompt=\d+ chunk=\d+ .*logits\["):
        pipeline.export(str(checkpoint), tmp_path / "out", max_sizes={"B": ROWS})
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_shows_a_token_the_wrong_image_fails(once: Once, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first image of a row stays the one that is fed: both sides use this cache, PyTorch's logits do not."""
    window = ImageCache.window

    def first(self: ImageCache, indices: NDArray[np.int64]) -> Any:
        return window(self, np.minimum(indices, 1))

    monkeypatch.setattr(ImageCache, "window", first)
    with pytest.raises(ParityError, match=r"at B=\d prompt=\d+ chunk=\d+ tokens=\d+: logits\["):
        verify(bundle_of(once), accuracy=False)


def test_rows_of_other_numbers_of_images_do_not_depend_on_each_other(once: Once) -> None:
    first, second, third = pixels(3)
    mark = VOCABULARY["<image>"]
    prompts = [
        InterleavedPrompt([mark, *words("how", "many", "sevens?")], [first]),
        InterleavedPrompt(words("what", "is", "the", "digits"), []),
        InterleavedPrompt([*words("a", "and"), mark, *words("one"), mark, *words("of", "two")], [second, third]),
    ]
    chunks = [np.array([[5], [9], [7]]), np.array([[6, 8], [4, 3], [11, 5]])]
    with load(bundle_of(once)) as bundle:
        whole = np.concatenate(list(forced_logits(bundle, prompts, chunks)), axis=1)
        for row, prompt in enumerate(prompts):
            alone = list(forced_logits(bundle, [prompt], [chunk[row : row + 1] for chunk in chunks]))
            assert np.abs(np.concatenate(alone, axis=1) - whole[row : row + 1]).max() <= 1e-5 * np.abs(whole).max()


def test_beams_that_share_images_compute_what_rows_of_their_own_do(once: Once) -> None:
    prompt = InterleavedPrompt([VOCABULARY["<image>"], *words("how", "many")], [pixels(1)[0]])
    chunk = np.array([[5, 9], [7, 4]])
    with load(bundle_of(once)) as bundle:
        shared = list(forced_logits(bundle, [prompt], [chunk], beams=2))
        own = list(forced_logits(bundle, [prompt, prompt], [chunk]))
    for ours, theirs in zip(shared, own, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_closed_gates_leave_the_language_model_as_it_is(tmp_path: Path, traced_once: None) -> None:
    """Its logits are those of a GPT bundle with the same weights within parity's tolerance, its greedy tokens equal."""
    small = {**SMALL, "text_config": {"n_layer": 1}}
    folder = write_flamingo(tmp_path / "flamingo", gates=0.0, seed=SEED, **small)
    text = tmp_path / "gpt"
    text.mkdir()
    stored = load_file(folder / "model.safetensors")
    own = {name.removeprefix("language_model."): value for name, value in stored.items() if name.startswith("language")}
    save_file(own, text / "model.safetensors", metadata={"format": "pt"})
    described = {**TEXT, **small["text_config"], "architectures": ["GPT2LMHeadModel"], "eos_token_id": 0}
    (text / "config.json").write_text(json.dumps(described))
    (text / "generation_config.json").write_text(json.dumps({"suppress_tokens": [VOCABULARY["<image>"]]}))
    write_tokenizer(text)
    for name, source in (("with-images", folder), ("alone", text)):
        pipeline.export(str(source), tmp_path / name, max_sizes={"B": 2, "C": 24})
    assert Bundle(tmp_path / "with-images").manifest.options["gates"] == [[0.0, 0.0]]
    ids = words("how", "many", "sevens?", "and", "how", "many", "twos?")
    with load(tmp_path / "with-images") as flamingo, load(tmp_path / "alone") as gpt:
        images = [InterleavedPrompt([VOCABULARY["<image>"], *ids], [image]) for image in pixels(2)]
        ours = greedy(flamingo, images, 14)
        theirs = greedy(gpt, [[VOCABULARY["<image>"], *ids]] * 2, 14)
    assert np.abs(ours.logits - theirs.logits).max() <= TOLERANCES["fp32"] * np.abs(theirs.logits).max()
    np.testing.assert_array_equal(ours.chosen.tokens, theirs.chosen.tokens)


# ---- golden values


def test_prompts_with_images_are_kept_as_arrays() -> None:
    first, second, third = pixels(3)
    prompts = [
        InterleavedPrompt([1, 5, 6], [first]),
        InterleavedPrompt([7], []),
        InterleavedPrompt([1, 1], [second, third]),
    ]
    arrays = prompts_to_arrays(prompts)
    assert {name: array.shape for name, array in arrays.items()} == {
        "prompts": (3, 3),
        "lengths": (3,),
        "images": (3,),
        "pixel_values": (3, 2, 3, 20, 12),
    }
    assert arrays["images"].tolist() == [1, 0, 2]
    assert not arrays["pixel_values"][1].any()
    assert are_prompts(arrays)
    for found, expected in zip(prompts_from_arrays(arrays), prompts, strict=True):
        assert found.ids == expected.ids
        np.testing.assert_array_equal(np.array(found.pixels), np.array(expected.pixels))
    alone = prompts_to_arrays(prompts[1:2])
    assert alone.keys() == {"prompts", "lengths", "images"}
    assert are_prompts(alone)
    assert prompts_from_arrays(alone) == [InterleavedPrompt([7], [])]


@pytest.mark.parametrize(
    "change",
    [
        {"images": None},  # whose are they?
        {"images": np.array([1, 0, 3])},  # more than there are pixels
        {"images": np.array([1, 0])},
        {"images": np.array([1, 0, -1])},
        {"images": np.array([1.0, 0.0, 2.0])},
        {"pixel_values": None},
        {"pixel_values": np.zeros((3, 2, 3, 20, 12))},  # in float64
        {"pixel_values": np.zeros((2, 2, 3, 20, 12), np.float32)},
        {"pixel_values": np.zeros((3, 3, 20, 12), np.float32)},
    ],
    ids=str,
)
def test_arrays_that_are_no_prompts_with_images(change: dict[str, Any]) -> None:
    first, second, third = pixels(3)
    rows = [InterleavedPrompt([1, 5], [first]), InterleavedPrompt([7], []), InterleavedPrompt([1, 1], [second, third])]
    arrays: dict[str, Any] = {**prompts_to_arrays(rows), **change}
    assert not are_prompts({name: array for name, array in arrays.items() if array is not None})


def test_a_bundle_without_the_marks_token_is_refused(once: Once) -> None:
    manifest = Bundle(bundle_of(once)).manifest
    options = {name: value for name, value in manifest.options.items() if name != "image_token_id"}
    inputs = parity_inputs([file.graph for file in manifest.graphs], None, None)
    with pytest.raises(BundleError, match="image_token_id is no integer"):
        interleaved_scenarios(replace(manifest, options=options), inputs)
