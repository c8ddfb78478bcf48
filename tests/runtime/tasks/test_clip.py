"""Compare CLIP's tasks with transformers: the pipeline, and the model's own vectors and logits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from command_line import changed_bundle, document, transom
from transom.export.datasets import photos
from transom.runtime import load
from transom.runtime.errors import BundleError, InputError, ShapeError
from transom.runtime.image_loading import open_image
from transom.runtime.tasks.clip import Labels

Exported = Callable[..., tuple[Path, Path]]
LABELS = ["a dog", "the flower", "a temple far", "THE WORD 7"]  # four, and a batch holds three
TEMPLATES = ["a photo of {}", "{}!", "is {} it?"]


@pytest.fixture(scope="module")
def tiny(exported: Exported) -> tuple[Path, Path]:
    return exported("CLIPModel")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((20, 20), (31, 57))]
    return [open_image(photo) for photo in photos()] + noise


@pytest.fixture(scope="module")
def processor(tiny: tuple[Path, Path]) -> Any:
    """Texts and images as transformers prepares them; images by PIL, which is what the runtime follows."""
    folder, _ = tiny
    return transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    )


@pytest.fixture(scope="module")
def theirs(tiny: tuple[Path, Path], processor: Any, images: list[Image.Image]) -> Callable[[list[str]], Any]:
    model = transformers.CLIPModel.from_pretrained(tiny[0])

    def outputs(texts: list[str]) -> Any:
        with torch.no_grad():
            return model(**processor(text=texts, images=images, return_tensors="pt", padding=True))

    return outputs


def test_zero_shot_is_transformers(tiny: Any, images: list[Image.Image], theirs: Any) -> None:
    expected = theirs(LABELS).logits_per_image.softmax(-1)
    with load(tiny[1]) as clip:
        found = clip.zero_shot(images, LABELS)
        alone = clip.zero_shot(images[1], LABELS, top_k=2)
    assert [label for label, _ in alone] == [label for label, _ in found[1][:2]]
    # a product of one row has kernels of its own, which may add in another order
    np.testing.assert_allclose([p for _, p in alone], [p for _, p in found[1][:2]], rtol=1e-6)
    for row, answer in zip(expected, found, strict=True):
        assert [label for label, _ in answer] == [LABELS[i] for i in row.argsort(descending=True)]
        np.testing.assert_allclose([p for _, p in answer], row.sort(descending=True).values, rtol=1e-4)


def test_a_template_is_the_pipelines_hypothesis(tiny: Any, images: list[Image.Image]) -> None:
    pipeline = transformers.pipeline("zero-shot-image-classification", model=str(tiny[0]), use_fast=False)
    expected = pipeline(images[0], candidate_labels=LABELS, hypothesis_template="a photo of {}")
    with load(tiny[1]) as clip:
        found = dict(clip.zero_shot(images[0], LABELS, templates="a photo of {}"))
    assert found == {row["label"]: pytest.approx(row["score"], abs=0.02) for row in expected}  # it resizes by torch


def test_vectors_are_transformers(tiny: Any, images: list[Image.Image], theirs: Any) -> None:
    expected = theirs(LABELS)
    with load(tiny[1]) as clip:
        np.testing.assert_allclose(clip.embed_image(images), expected.image_embeds, atol=1e-6)
        np.testing.assert_allclose(clip.embed_text(LABELS), expected.text_embeds, atol=1e-6)
        assert clip.embed_image(images[0]).shape == clip.embed_text("a dog").shape == (37,)
        assert np.linalg.norm(clip.embed_text("a dog")) == pytest.approx(1)


def test_an_ensemble_is_the_mean_of_unit_vectors(tiny: Any, images: list[Image.Image], theirs: Any) -> None:
    """Radford et al. (2021), section 3.1.4, by hand."""
    texts = [template.replace("{}", label) for label in LABELS for template in TEMPLATES]
    outputs = theirs(texts)
    mean = outputs.text_embeds.reshape(len(LABELS), len(TEMPLATES), -1).mean(1)
    with load(tiny[1]) as clip:
        expected = (clip.logit_scale * outputs.image_embeds @ torch.nn.functional.normalize(mean).T).softmax(-1)
        found = [dict(row) for row in clip.zero_shot(images, LABELS, templates=TEMPLATES)]
        kept = clip.embed_labels(LABELS, TEMPLATES)
        assert [dict(row) for row in clip.zero_shot(images, kept)] == found
        with pytest.raises(InputError, match="belong to embed_labels"):
            clip.zero_shot(images, kept, templates="a {}")
    np.testing.assert_allclose([[row[label] for label in LABELS] for row in found], expected, rtol=1e-4)


def test_raw_runs_of_one_tower_and_of_both(tiny: Any, processor: Any, images: list[Image.Image], theirs: Any) -> None:
    feeds = {name: np.asarray(a) for name, a in processor(text=LABELS[:2], return_tensors="np", padding=True).items()}
    pixels = processor(images=images[:3], return_tensors="np")["pixel_values"]
    expected = theirs(LABELS[:2])
    with load(tiny[1]) as clip:
        assert set(clip.run({"pixel_values": pixels})) == {"image_embeds"}
        assert set(clip.run({"input_ids": feeds["input_ids"]})) == {"text_embeds"}
        both = clip.submit({"pixel_values": pixels, **feeds}).result()
        assert set(both) == {"image_embeds", "text_embeds", "logits_per_image", "logits_per_text"}
        np.testing.assert_allclose(both["logits_per_image"], expected.logits_per_image[:3], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(both["logits_per_text"], both["logits_per_image"].T)
        only = clip.run({"pixel_values": pixels, **feeds}, ["logits_per_text"])
        assert list(only) == ["logits_per_text"]
        with pytest.raises(InputError, match="unknown output 'logits'; both towers give logits_per_image"):
            clip.run({"pixel_values": pixels, **feeds}, ["logits"])
        with pytest.raises(InputError, match="token_type_ids"):
            clip.run({"pixel_values": pixels, "token_type_ids": feeds["input_ids"], **feeds})
        with pytest.raises(ShapeError, match="axis S"):
            clip.run({"pixel_values": pixels, "input_ids": np.zeros((1, 24), np.int64)})


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda c, i: c.zero_shot(i, "a dog"), InputError, "labels is a str; expected a list of str"),
        (lambda c, i: c.zero_shot(i, []), InputError, "labels is empty; give at least one"),
        (lambda c, i: c.zero_shot(i, ["a", 7]), InputError, r"labels\[1\] is a int; expected a str"),
        (lambda c, i: c.zero_shot(i, ["a", ""]), InputError, "label 1, '', has no tokens"),
        (lambda c, i: c.zero_shot(i, ["a"], templates=[]), InputError, "templates is empty"),
        (lambda c, i: c.zero_shot(i, ["a"], templates="a photo"), InputError, r"templates\[0\] is 'a photo'; expected"),
        (lambda c, i: c.zero_shot(i, ["a"], templates=["{}", "{0.x}"]), InputError, r"templates\[1\] is '{0.x}'"),
        (lambda c, i: c.zero_shot(i, ["a"], templates="{} {}"), InputError, "expected one {} in it"),
        (lambda c, i: c.zero_shot(i, ["a"], top_k=0), InputError, "top_k is 0; expected a positive integer"),
        (
            lambda c, i: c.zero_shot(i, Labels(("a",), np.ones((1, 3), np.float32))),
            InputError,
            "of 3 numbers, this bundle's",
        ),
        (
            lambda c, i: c.run({"pixel_values": np.zeros((1, 3, 20, 20), np.float32)}, []),
            InputError,
            "outputs is empty",
        ),
        (lambda c, i: c.zero_shot([], ["a"]), InputError, "the list of images is empty"),
        (lambda c, i: c.zero_shot([i, "none.png"], ["a"]), InputError, "image 1 of 2: .*none.png"),
        (
            lambda c, i: c.zero_shot(i, ["a " * 30]),
            ShapeError,
            "label 0 is 32 tokens, 2 of them special; at most 23 fit",
        ),
        (lambda c, i: c.embed_text("a " * 30), ShapeError, "truncate=True"),
        (lambda c, i: c.embed_text([]), InputError, "empty"),
    ],
)
def test_bad_calls(tiny: Any, images: list[Image.Image], call: Any, error: type[Exception], said: str) -> None:
    with load(tiny[1]) as clip, pytest.raises(error, match=said):
        call(clip, images[0])


def test_a_long_text_keeps_its_end_when_cut(tiny: Any, processor: Any, theirs: Any) -> None:
    long = "a long walk " * 20
    cut = processor(text=[long], truncation=True, max_length=23, return_tensors="np")["input_ids"]
    with load(tiny[1]) as clip:
        np.testing.assert_array_equal(
            clip.embed_text([long], truncate=True), clip.run({"input_ids": cut})["text_embeds"]
        )


@pytest.mark.parametrize("scale", [None, 0, -1.0, 1e39, True, "100"])
def test_a_scale_that_is_none(tiny: Any, tmp_path: Path, scale: Any) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["options"]["logit_scale"] = scale

    with pytest.raises(BundleError, match=r"options\.logit_scale is .*, expected a positive number"):
        load(changed_bundle(tiny[1], tmp_path, edit))


def test_threads_share_a_bundle(tiny: Any, images: list[Image.Image]) -> None:
    found: list[Any] = [None] * 16
    with load(tiny[1], threads=1) as clip:
        expected = clip.zero_shot(images, LABELS, templates=TEMPLATES)

        def ask(number: int) -> None:
            found[number] = clip.zero_shot(images, LABELS, templates=TEMPLATES)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected] * 16


def test_the_command_line(tiny: Any, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(photos()[0])
    asked = ("--label", "a dog", "--label", "a temple", "--template", "a photo of {}", "--template", "{}!")
    printed = document(transom("run", tiny[1], photo, *asked, "--json"))
    with load(tiny[1]) as clip:
        expected = clip.zero_shot(str(photo), ["a dog", "a temple"], templates=["a photo of {}", "{}!"])
    assert [(each["label"], each["probability"]) for each in printed["results"][0]["labels"]] == expected
    lines = transom("run", tiny[1], photo, *asked).stdout.splitlines()
    assert lines == [str(photo), *(f"  {probability:.4f}  {label}" for label, probability in expected)]
    assert "needs --label" in transom("run", tiny[1], photo).stderr


def test_labels_are_for_zero_shot(vit_bundle: Path) -> None:
    result = transom("run", vit_bundle, "a.png", "--label", "a dog")
    assert (result.exit_code, "does not choose among labels" in result.stderr) == (2, True)
