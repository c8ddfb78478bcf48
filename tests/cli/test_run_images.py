"""Test `transom run` about images: captions, questions with --image, rows that fail, and wrong usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import changed_bundle, document, error_line, transom
from transom.runtime import load
from transom.runtime.tasks.generator_task import trim

LONG = ("--max-new-tokens", "6", "--min-new-tokens", "6")
KEYWORDS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 12, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return paths


def with_image(*paths: Path) -> list[str | Path]:
    return [word for path in paths for word in ("--image", path)]


def results(*arguments: str | Path) -> Any:
    return document(transom("run", *arguments, *LONG, "--json"))["results"]


def test_image_files_get_captions(random_flamingo_bundle: Path, images: list[Path]) -> None:
    with load(random_flamingo_bundle) as flamingo:
        captions = flamingo.caption(images, **KEYWORDS)
    assert any(captions)
    found = results(random_flamingo_bundle, *images)
    assert [(result["image"], result["text"]) for result in found] == list(zip(map(str, images), captions, strict=True))
    streamed = transom("run", random_flamingo_bundle, images[0], *LONG)
    assert (streamed.exit_code, streamed.stdout) == (0, captions[0] + "\n")
    listed = transom("run", random_flamingo_bundle, "-", *LONG, stdin="\n".join(map(str, images)))
    assert listed.stdout.splitlines() == [
        line for path, caption in zip(images, captions, strict=True) for line in (str(path), f"  {caption}")
    ]


def test_questions_take_the_files_of_their_marks(random_flamingo_bundle: Path, images: list[Path]) -> None:
    first, second, third = images
    with load(random_flamingo_bundle) as flamingo:
        expected = flamingo.answer([[first, "how many sevens?"], ["a ", second, " b ", third, " and now?"]], **KEYWORDS)
    asked = ["how many sevens?", "a <image> b <image> and now?"]
    found = results(random_flamingo_bundle, *asked, *with_image(*images))
    assert [(result["prompt"], result["text"]) for result in found] == list(zip(asked, expected, strict=True))
    alone = transom("run", random_flamingo_bundle, asked[0], *with_image(first), *LONG)
    assert (alone.exit_code, alone.stdout) == (0, expected[0] + "\n")
    marked = transom("run", random_flamingo_bundle, f"<image>{asked[0]}", *with_image(first), *LONG, "--num-beams", "1")
    assert marked.stdout == expected[0] + "\n"


def test_several_texts_of_one_question(random_flamingo_bundle: Path, images: list[Path]) -> None:
    found = results(
        random_flamingo_bundle, "and now?", *with_image(images[0]), "--num-beams", "3", "--num-return-sequences", "2"
    )
    assert [result["prompt"] for result in found] == ["and now?"] * 2
    assert len({result["text"] for result in found}) == 2


def test_a_file_that_cannot_be_read_leaves_the_others_their_answers(
    random_flamingo_bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    absent = tmp_path / "absent.png"
    said = f"image 0 of prompt 1: '{absent}' is not a file that is there. Check the path."
    given = [images[0], absent, images[1]]
    with load(random_flamingo_bundle) as flamingo:
        captions = flamingo.caption([images[0], images[1]], **KEYWORDS)
    run = transom("run", random_flamingo_bundle, *given, *LONG)
    assert run.exit_code == 1
    assert run.stdout.splitlines() == [
        str(images[0]), f"  {captions[0]}", str(absent), str(images[1]), f"  {captions[1]}"
    ]  # fmt: skip
    assert run.stderr == f"transom.runtime.errors.InputError: {said}\n"
    printed = transom("run", random_flamingo_bundle, *given, *LONG, "--json")
    assert printed.exit_code == 1
    assert [sorted(result) for result in document(printed)["results"]] == [
        ["image", "text", "tokens"], ["error", "image"], ["image", "text", "tokens"]
    ]  # fmt: skip
    assert document(printed)["results"][1]["error"] == {"type": "InputError", "message": said}
    alone = error_line(transom("run", random_flamingo_bundle, "how", *with_image(absent)))
    assert alone == f"transom.runtime.errors.InputError: {said.replace(' of prompt 1', '')}"
    assert error_line(transom("run", random_flamingo_bundle, "how", *with_image(absent), "--num-beams", "2")) == alone


@pytest.mark.parametrize(
    ("arguments", "files", "said"),
    [
        (
            ["how many <image> and <image>"],
            1,
            "InputError: --image was given 1 times, but the places of images are 2: one for each <image> of an INPUT, "
            "one for an INPUT without it. Give as many files.",
        ),
        (["how many", "how <image>"], 3, "InputError: --image was given 3 times, but the places of images are 2"),
        (["how many"], 2, "InputError: --image was given 2 times, but the places of images are 1"),
        (["how many <image>"], 1, "InputError: a prompt has an image after its last text, so that nothing asks about"),
        (
            ["how many"],
            0,
            "InputError: 'how many' is not a file that is there; without --image an INPUT is an image to describe. "
            "Check the path, or give --image FILE beside a question.",
        ),
        (
            ["<image> a " * 7 + "how"],
            7,
            "InputError: prompt 0 has 7 images; this bundle allows 6. Export again with --max I=7.",
        ),
        (["how", "--truncate"], 1, "--truncate is given; image-text-to-text truncates no prompt"),
        (["how", "--score"], 1, "--score is for text-generation; this bundle is for image-text-to-text."),
        (["arrays.npz"], 1, "--label, --template and --image are for image files; a raw run takes arrays."),
    ],
)
def test_what_cannot_be_asked(
    random_flamingo_bundle: Path, images: list[Path], arguments: list[str], files: int, said: str
) -> None:
    run = transom("run", random_flamingo_bundle, *arguments, *with_image(*[images[0]] * files))
    assert (run.exit_code in (1, 2), run.stdout) == (True, "")
    assert said in " ".join(run.stderr.replace("│", " ").split())


def test_an_image_for_a_task_that_has_none(gpt_bundle: Path, images: list[Path]) -> None:
    run = transom("run", gpt_bundle, "It is", *with_image(images[0]))
    assert run.exit_code == 2
    assert "--image is given; text-generation takes no question about an image. Leave it out." in " ".join(
        run.stderr.replace("│", " ").split()
    )


def test_the_help_teaches_both_ways() -> None:
    shown = " ".join(transom("run", "--help").stdout.replace("│", " ").split())
    assert "image-text-to-text image files, or questions with --image FILE ... -> new text" in shown
    assert "An image that an INPUT asks about: where it has <image>, else in front of it; repeatable." in shown


def test_inspect_says_what_prompts_are(random_flamingo_bundle: Path) -> None:
    lines = [" ".join(line.split()) for line in transom("inspect", random_flamingo_bundle).stdout.splitlines()]
    assert "prompts texts with images among them" in lines
    assert "axis I 1..6, tuned for 1" in lines
    assert "decoder input image_key.0..1 float32 (G, 4, I, 5, 8), 0 if left out" in lines


def test_an_image_is_measured_apart_from_tokens(random_flamingo_bundle: Path) -> None:
    options = ("--runs", "2", "--warmup", "1", "--new-tokens", "3")
    printed = document(transom("bench", random_flamingo_bundle, "--shape", "B=2,S=9,I=3", *options, "--json"))
    encoder, prefill, decode = printed["timings"]
    sizes = {"B": 2, "S": 9, "I": 3, "new": 3}
    assert [timing["name"] for timing in printed["timings"]] == ["encoder", "prefill", "decode"]
    assert (encoder["sizes"], encoder["items"], encoder["runs"]) == ({"B": 2}, "images", 2)
    assert (prefill["sizes"], prefill["items"], prefill["runs"]) == (sizes, "tokens", 2)
    assert (decode["sizes"], decode["items"], decode["runs"]) == (sizes, "tokens", 4)
    lines = transom("bench", random_flamingo_bundle, *options).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["encoder", "prefill", "decode"]
    assert lines[2].split()[-1] == "images"
    assert error_line(transom("bench", random_flamingo_bundle, "--shape", "S=3,I=3")) == (
        "transom.runtime.errors.InputError: 3 images take as many of the 3 tokens of a prompt, and a text follows "
        "them. Ask for fewer images, or S=4 at least."
    )
    assert "a generation has B and S, the tokens of each prompt, and I, the images among them." in error_line(
        transom("bench", random_flamingo_bundle, "--shape", "G=1")
    )


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([" ", "two", " ", "and", " one", "\n", " "], "two and one"),
        ([" two ", " ", "b "], "two  b"),
        (["", " ", "\n"], ""),
        ([], ""),
    ],
)
def test_blanks_around_a_streamed_text_are_left_out(pieces: list[str], text: str) -> None:
    assert "".join(trim(iter(pieces))) == text


def test_ids_with_marks_where_there_is_no_tokenizer(
    random_flamingo_bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = changed_bundle(random_flamingo_bundle, tmp_path, lambda words: words.pop("tokenizer"))
    with load(folder) as flamingo:
        expected = flamingo.generate([1, 5, 6], images=[images[0]], **KEYWORDS)
    found = results(folder, "1 5 6", *with_image(images[0]))
    assert found == [{"prompt": "1 5 6", "ids": expected, "tokens": 6}]
    line = error_line(transom("run", folder, "1 5 6"))
    assert line.endswith("the places of images are 1: one for each token 1 of an INPUT. Give as many files.")
