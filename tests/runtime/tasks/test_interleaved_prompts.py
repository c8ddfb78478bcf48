"""Prompts of texts and images that cannot be: each is refused before a graph runs, with the numbers that do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bad_bundles import Words, rewritten
from transom.runtime import load
from transom.runtime.errors import BundleError, InputError
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt, MarkedPrompt

MARK = 1
PIXELS = np.zeros((3, 20, 12), np.float32)
IMAGE = np.zeros((20, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def flamingo(random_flamingo_bundle: Path) -> Iterator[Any]:
    with load(random_flamingo_bundle, threads=1) as bundle:
        yield bundle


@pytest.fixture
def idle(flamingo: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bundle, none of whose graphs may run."""

    def run(*_: Any) -> Any:
        raise AssertionError("a graph ran")

    for backend in flamingo._backends:
        monkeypatch.setattr(backend, "run", run)
    return flamingo


Ask = Callable[[Any], object]
LATE = (
    "{} has an image after its last text, so that nothing asks about it. Put a text behind the image; caption() "
    "describes one."
)
REFUSED: list[tuple[str, Ask, str]] = [
    (
        "more marks than images",
        lambda f: f.generate("<image> how <image> many", images=[IMAGE]),
        "a prompt has 2 image marks (<image>) and 1 images; expected as many. Give an image for each mark, in their "
        "order.",
    ),
    (
        "fewer marks than images",
        lambda f: f.answer("<image> how many", images=[IMAGE, IMAGE, IMAGE]),
        "a prompt has 1 image marks (<image>) and 3 images; expected as many. Give an image for each mark, in their "
        "order.",
    ),
    (
        "no images at all",
        lambda f: f.stream("<image> how many"),
        "a prompt has 1 image marks (<image>) and 0 images; expected as many. Give an image for each mark, in their "
        "order.",
    ),
    (
        "a mark within a text of parts",
        lambda f: f.generate([["how"], [IMAGE, "how <image> many"]]),
        "prompt 1 has 2 image marks (<image>) and 1 images; expected as many. Give an image for each mark, in their "
        "order.",
    ),
    (
        "marks of ids",
        lambda f: f.generate([[5, MARK, 6], [5]], images=[[PIXELS], [PIXELS]]),
        "prompt 1 has 0 image marks (<image>) and 1 images; expected as many. Give an image for each mark, in their "
        "order.",
    ),
    ("an image after the last text", lambda f: f.generate(["how", IMAGE]), LATE.format("a prompt")),
    ("an image alone", lambda f: f.generate(IMAGE), LATE.format("a prompt")),
    ("an image and an empty text", lambda f: f.generate([IMAGE, ""]), LATE.format("a prompt")),
    (
        "a question before its image",
        lambda f: f.answer([["how"], [IMAGE, "how", IMAGE]]),
        LATE.format("prompt 1"),
    ),
    ("ids that end in a mark", lambda f: f.generate([5, MARK], images=[PIXELS]), LATE.format("a prompt")),
    (
        "more images than a prompt may have",
        lambda f: f.answer([["how"], [*[IMAGE] * 7, "how"]]),
        "prompt 1 has 7 images; this bundle allows 6. Export again with --max I=7.",
    ),
    ("an empty prompt", lambda f: f.generate([]), "a prompt is empty; expected at least one text or image."),
    ("an empty text", lambda f: f.generate(""), "a prompt is empty; expected at least one text or image."),
    ("an empty row", lambda f: f.generate([["how"], []]), "prompt 1 is empty; expected at least one text or image."),
    (
        "no ids",
        lambda f: f.generate(MarkedPrompt([], [])),
        "a prompt is empty; expected at least one text or image.",
    ),
    ("no caption", lambda f: f.caption([]), "the list of images is empty; give at least one."),
    (
        "what is neither text nor image",
        lambda f: f.generate([IMAGE, "how", 3.5]),
        "image 1 of a prompt: an image is a float, expected a path, the bytes of an image file, a PIL image or a uint8 "
        "array.",
    ),
    (
        "a question that is neither text nor image",
        lambda f: f.answer([IMAGE, 3]),
        "the last part of a prompt: an image is a int, expected a path, the bytes of an image file, a PIL image or a "
        "uint8 array.",
    ),
    (
        "a mark without its image in a question",
        lambda f: f.answer("<image> how many"),
        "a prompt has 1 image marks (<image>) and 0 images; expected as many. Give an image for each mark, in their "
        "order.",
    ),
    (
        "floats that are no pixel values",
        lambda f: f.generate([["how"], [np.zeros((20, 12, 3)), "how"]]),
        "image 0 of prompt 1: an image is an array of float64 (20, 12, 3), expected uint8 (height, width), (height, "
        "width, 3) or (height, width, 4). Convert floats in 0..1 with (x * 255).round().astype('uint8') and "
        "channels-first with x.transpose(1, 2, 0).",
    ),
    (
        "pixel values of another size",
        lambda f: f.caption(np.zeros((3, 12, 20), np.float32)),
        "image 0 of a prompt has pixel_values (3, 12, 20); expected (channels, height, width) (3, 20, 12). Give "
        "images, or what preprocess() returns of each.",
    ),
    (
        "pixel values that are no numbers",
        lambda f: f.generate([5, MARK, 6], images=[np.full_like(PIXELS, np.nan)]),
        "image 0 of a prompt has pixel_values that are NaN or infinite; expected finite numbers.",
    ),
    (
        "an example in generate",
        lambda f: f.generate([IMAGE, ("how", "two"), "how"]),
        "part 1 of a prompt is a tuple; a question with its answer is an example for answer(). Expected texts and "
        "images.",
    ),
    (
        "an example in the end",
        lambda f: f.answer([IMAGE, ("how", "two")]),
        "a prompt ends in an example, a question with its answer; expected a question behind it.",
    ),
    (
        "an empty question",
        lambda f: f.answer([IMAGE, " "]),
        "a prompt ends in an empty text; expected a question.",
    ),
    (
        "ids to answer",
        lambda f: f.answer([MarkedPrompt([5], [])]),
        "prompt 0 is of ids; answer() takes texts. Call generate().",
    ),
    (
        "ids alone to answer",
        lambda f: f.answer(np.array([5, 6])),
        "a prompt is of ids; answer() takes texts. Call generate().",
    ),
    (
        "an image of other integers",
        lambda f: f.answer([IMAGE.astype(np.int32)[:, :, 0], "how"]),
        "image 0 of a prompt: an image is an array of int32 (20, 12), expected uint8 (height, width), (height, width, "
        "3) or (height, width, 4). Convert floats in 0..1 with (x * 255).round().astype('uint8') and channels-first "
        "with x.transpose(1, 2, 0).",
    ),
    (
        "a list among the images",
        lambda f: f.generate("<image> how", images=[["how"]]),
        "image 0 of a prompt: an image is a list, expected a path, the bytes of an image file, a PIL image or a uint8 "
        "array.",
    ),
    (
        "an example among the images",
        lambda f: f.answer("<image> how", images=[("how", "two")]),
        "image 0 of a prompt: an image is a tuple, expected a path, the bytes of an image file, a PIL image or a uint8 "
        "array.",
    ),
    ("nothing to answer", lambda f: f.answer([[]]), "prompt 0 is empty; expected a question, with images before it."),
    (
        "texts and ids in one call",
        lambda f: f.generate([["how"], [5, 6]]),
        "prompts holds both texts and ids; give one kind in one call.",
    ),
    (
        "ids of another model",
        lambda f: f.generate(InterleavedPrompt([5, 35], [])),
        "a prompt holds the id 35; expected 0..34. Is this the tokenizer of this model?",
    ),
    (
        "images= that are no list",
        lambda f: f.generate("<image> how", images=IMAGE),
        "images is a ndarray; expected a list of images, in the order of their marks.",
    ),
    (
        "images= of another number of prompts",
        lambda f: f.generate(["<image> how", "how"], images=[[IMAGE]]),
        "2 prompts were given and images for 1; expected a list of images for each prompt, [] for none.",
    ),
    (
        "images= of a batch in one list",
        lambda f: f.generate(["<image> how", "<image> how"], images=[IMAGE, IMAGE]),
        "2 prompts were given and images for 2; expected a list of images for each prompt, [] for none.",
    ),
    (
        "images= beside parts",
        lambda f: f.answer([[IMAGE, "how"]], images=[[IMAGE]]),
        "prompt 0 is a list; with images= expected a text with marks, or ids. In a list of parts the images stand at "
        "their places.",
    ),
    (
        "images= of no prompt",
        lambda f: f.answer(3, images=[IMAGE]),
        "prompts is a int; with images= expected texts with marks, or ids.",
    ),
    (
        "a prompt and its new tokens beyond the context",
        lambda f: f.answer([[IMAGE, "how many"], ["how"]], max_new_tokens=78),
        "prompt 0 of 5 tokens and 78 new ones make 83; the context holds 80. Ask for max_new_tokens=75 at most, or "
        "export a model with a longer context.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_prompts_that_cannot_be(idle: Any, ask: Ask, said: str) -> None:
    with pytest.raises(InputError) as caught:
        ask(idle)
    assert str(caught.value) == said


def test_text_before_any_image_and_none_at_all_are_prompts(flamingo: Any) -> None:
    read = flamingo.reader().read([["how", IMAGE, "many"], "how many", [Path("absent.png"), "how"]])
    assert (read.single, read.text, read.lengths) == (False, True, [3, 2, 2])  # a mark is a token; nothing was opened
    assert [prompt.ids.count(MARK) for prompt in read.given] == [1, 0, 1]


# ------------------------------------------------------------------------------------------------- bundle.json


Change = Callable[[Words], object]


def option(name: str, value: Any) -> Change:
    return lambda words: words["options"].update({name: value})


def of_encoder(place: int, size: int) -> Change:
    """Another size of the encoder's keys and values of images, and of no others."""

    def change(words: Words) -> None:
        (encoder,) = [graph for graph in words["graphs"] if graph["name"] == "encoder"]
        for tensor in encoder["outputs"]:
            if tensor["name"].startswith(("image_key", "image_value")):
                tensor["shape"][place] = size

    return change


def with_token_35(words: Words) -> None:
    """A vocabulary of one more token than the tokenizer has, which is the mark."""
    option("image_token_id", 35)(words)
    (decoder,) = [graph for graph in words["graphs"] if graph["name"] == "decoder"]
    decoder["inputs"][0]["below"] = 36


def of_decoder(name: str, place: int, size: int | str) -> Change:
    """Another size of one input of the decoder."""

    def change(words: Words) -> None:
        (decoder,) = [graph for graph in words["graphs"] if graph["name"] == "decoder"]
        (tensor,) = [tensor for tensor in decoder["inputs"] if tensor["name"] == name]
        tensor["shape"][place] = size

    return change


GATES = "bundle.json: options.gates is {}, expected 2 pairs of numbers in -1..1, one for each block"
TOGETHER = (
    "a graph with image_indices takes them of its tokens' shape (B, S), and keys and values of images (G, H, I, N, D), "
    "G dividing B"
)
TWO_PARTS = (
    "two graphs have other shapes or dtypes of 'image_key.0': float32 {} and float32 (G, 4, I, 5, 8); two graphs have "
    "other shapes or dtypes of 'image_value.0'"
)
CLAIMS: list[tuple[str, Change, str]] = [
    ("no mark", lambda w: w["options"].pop("image_token_id"), "bundle.json: options.image_token_id is missing"),
    (
        "a mark in words",
        option("image_token_id", "<image>"),
        "options.image_token_id is '<image>', expected 0..",
    ),
    ("a mark that is true", option("image_token_id", True), "options.image_token_id is True, expected 0..2147483647"),
    (
        "a mark of another model",
        option("image_token_id", 35),
        "options.image_token_id is 35, expected a token of the model, 0..34. Export the bundle again.",
    ),
    (
        "a mark that is no token of the tokenizer",
        with_token_35,
        "options.image_token_id is 35, which the tokenizer spells None and does not read back. Export the bundle",
    ),
    ("no gates", lambda w: w["options"].pop("gates"), "bundle.json: options.gates is missing"),
    ("gates in words", option("gates", "open"), GATES.format("'open'")),
    ("a gate of one number", option("gates", [[0.5]]), GATES.format("[[0.5]]")),
    ("a gate beyond tanh", option("gates", [[0.5, 1.5]]), GATES.format("[[0.5, 1.5]]")),
    ("a gate that is true", option("gates", [[True, 0.5]]), GATES.format("[[True, 0.5]]")),
    ("no question", lambda w: w["options"].pop("question_template"), "options.question_template is missing"),
    (
        "a question without its place",
        option("question_template", "Answer:"),
        "options.question_template is 'Answer:', expected a text with 1 {}, and no other braces",
    ),
    (
        "a question with a name in it",
        option("question_template", "{} {0.__class__}"),
        "options.question_template is '{} {0.__class__}', expected a text with 1 {}, and no other braces",
    ),
    (
        "a caption of a number",
        option("caption_template", 3),
        "options.caption_template is 3, expected a text with 0",
    ),
    (
        "an example without its answer",
        option("example_template", "{}"),
        "options.example_template is '{}', expected a text with 2 {}, and no other braces",
    ),
    ("an unknown option", option("gate", 1), "bundle.json: options has the unknown key 'gate'"),
    ("other heads of the two parts", of_encoder(1, 3), TWO_PARTS.format("(B, 3, 1, 5, 8)")),
    ("other latents", of_encoder(3, 6), TWO_PARTS.format("(B, 4, 1, 6, 8)")),
    ("another size of heads", of_encoder(4, 7), TWO_PARTS.format("(B, 4, 1, 5, 7)")),
    (
        "groups of what is no axis",
        lambda w: w["axes"]["G"].update(divides="R"),
        "axes.G divides 'R', which is no axis",
    ),
    (
        "groups of themselves",
        lambda w: w["axes"]["G"].update(divides="G"),
        "axes.G divides 'G', which divides an axis itself",
    ),
    (
        "groups of groups",
        lambda w: w["axes"]["B"].update(divides="G"),
        "axes.G divides 'B', which divides an axis itself",
    ),
    ("indices of other tokens", of_decoder("image_indices", 1, 3), TOGETHER),
    ("images that are not along I", of_decoder("image_key.0", 2, "S"), TOGETHER),
    ("images of each row", of_decoder("image_value.1", 0, "B"), TOGETHER),
    ("gates of other blocks", option("gates", [[0.5, 0.5]]), GATES.format("[[0.5, 0.5]]")),
]


@pytest.mark.parametrize(("change", "said"), [row[1:] for row in CLAIMS], ids=[row[0] for row in CLAIMS])
def test_what_bundle_json_claims(random_flamingo_bundle: Path, tmp_path: Path, change: Change, said: str) -> None:
    folder = Path(shutil.copytree(random_flamingo_bundle, tmp_path / "bundle"))
    rewritten(change)(folder)
    with pytest.raises(BundleError) as caught:
        load(folder, threads=1)
    assert said in str(caught.value)
