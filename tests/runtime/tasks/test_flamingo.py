"""Flamingo's tasks: captions, answers, examples, batches of which a row fails, streams and dialogues."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny_models import Counted
from transom.runtime import load
from transom.runtime.errors import BackendError, InputError, RowsError
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt

MARK = 1
# Six words: random weights often end at once
LONG: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "suppress_tokens": [0, 2]}


@pytest.fixture(scope="module")
def flamingo(random_flamingo_bundle: Path) -> Iterator[Any]:
    with load(random_flamingo_bundle, threads=1) as bundle:
        yield bundle


@pytest.fixture
def counted(flamingo: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    """The backends by graph, which count their runs."""
    found = {backend.graph.name: Counted(backend) for backend in flamingo._backends}
    monkeypatch.setattr(flamingo, "_backends", list(found.values()))
    return found


def picture(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (20, 12, 3)).astype(np.uint8)


def saved(folder: Path, number: int) -> Path:
    path = folder / f"{number}.png"
    Image.fromarray(picture(number)).save(path)
    return path


# ----------------------------------------------------------------------------------------- forms of a prompt


def test_all_forms_of_a_prompt_get_one_answer(flamingo: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, 0)
    pixels = flamingo.preprocess()([picture(0)])[0]
    text = "Question: how many sevens? Answer:"
    expected = flamingo.generate([path, text], **LONG)
    assert len(expected.split()) == 6
    for image in (path.read_bytes(), Image.open(path), picture(0), pixels):
        assert flamingo.generate([image, text], **LONG) == expected
    assert flamingo.generate(f"<image>{text}", images=[path], **LONG) == expected
    assert flamingo.reader().placed(f"<image>{text}", [str(path)]) == [path, text]  # here a str is a path
    assert flamingo.generate([f"<image> {text}", "how"], images=[[path], []], **LONG)[0] == expected
    assert flamingo.generate([path, "Question: how", " many sevens? Answer:"], **LONG) == expected
    assert flamingo.answer([path, "how many sevens?"], **LONG) == expected.strip()
    assert flamingo.answer("<image>how many sevens?", images=[path], **LONG) == expected.strip()
    ids = [MARK, *flamingo.tokenizer().row(text, truncate=False).ids]
    new = flamingo.generate(ids, images=[pixels], **LONG)
    assert flamingo.tokenizer().decode(new) == expected
    assert flamingo.generate(np.array(ids), images=[path], **LONG) == new
    assert flamingo.generate([ids], images=[[path]], **LONG) == [new]
    assert flamingo.generate(InterleavedPrompt(ids, [pixels]), **LONG) == new
    assert flamingo.generate([InterleavedPrompt(ids, [pixels])] * 2, **LONG) == [new, new]


def test_a_caption_is_what_follows_the_caption_template(flamingo: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, 0)
    expected = flamingo.generate([path, "Caption:"], **LONG).strip()
    assert flamingo.caption(str(path), **LONG) == expected  # here a str is a path
    assert flamingo.caption(picture(0), **LONG) == expected
    assert flamingo.caption([path, picture(1)], **LONG) == [expected, flamingo.caption(picture(1), **LONG)]
    assert flamingo.answer_text(flamingo.generate(flamingo.caption_prompt(path), **LONG)) == expected


def test_examples_and_texts_in_between_are_read_in_their_order(flamingo: Any) -> None:
    examples = [("how many sevens?", "two"), ("how many ones?", "one")]
    parts = [picture(0), *examples, picture(1), "the left ", "what is right"]
    prompt = flamingo.prompt_of(parts)
    assert flamingo.tokenizer().decode(prompt.ids, skip_special_tokens=False) == (
        "<image> Question: how many sevens? Answer: two Question: how many ones? Answer: one <image> "
        "the left Question: what is right Answer:"
    )
    assert [array.shape for array in prompt.pixels] == [(3, 20, 12)] * 2
    assert flamingo.answer_text(flamingo.generate(prompt, **LONG)) == flamingo.answer(parts, **LONG)


def test_a_batch_of_other_numbers_of_images_gets_what_each_prompt_gets_alone(
    flamingo: Any, counted: dict[str, Counted]
) -> None:
    prompts = [
        [picture(0), "how many sevens?"],
        ["how many sevens?"],
        [picture(1), ("how many ones?", "one"), picture(2), ("how many ones?", "two"), picture(3), "and now?"],
        ["a digits", picture(4), "what is left of the three?"],
        [picture(5), "how many zeros?"],  # four rows fit in a call
    ]
    together = flamingo.answer(prompts, **LONG)
    assert len(set(together)) > 2
    assert [feeds["pixel_values"].shape[0] for feeds in counted["encoder"].fed] == [4, 1, 1]  # 5 of 4 rows, then one
    pixels = np.concatenate([feeds["pixel_values"] for feeds in counted["encoder"].fed])
    np.testing.assert_array_equal(pixels, flamingo.preprocess()([picture(number) for number in range(6)]))
    assert [flamingo.answer(prompt, **LONG) for prompt in prompts] == together
    for beams in (2, 3):
        searched = flamingo.answer(prompts, num_beams=beams, **LONG)
        assert [flamingo.answer(prompt, num_beams=beams, **LONG) for prompt in prompts] == searched
    sampled = flamingo.answer(prompts, do_sample=True, seed=3, **LONG)
    assert flamingo.answer(prompts[0], do_sample=True, seed=3, **LONG) == sampled[0]
    two = flamingo.answer(prompts[:2], do_sample=True, seed=3, num_return_sequences=2, max_new_tokens=9)
    assert [len(answers) for answers in two] == [2, 2]


def test_beams_copy_no_image(flamingo: Any, counted: dict[str, Counted]) -> None:
    flamingo.answer([[picture(0), "how many sevens?"], [picture(1), "and now?"]], num_beams=2, **LONG)
    fed = [feeds for feeds in counted["decoder"].fed if feeds["input_ids"].shape[0] == 4]
    assert len(counted["encoder"].fed) == 1
    assert len(fed) == 5
    assert {feeds["image_key.0"].shape for feeds in fed} == {(2, 4, 1, 5, 8)}  # two prompts, four rows
    assert len({feeds["image_key.0"].ctypes.data for feeds in fed}) == 1


def test_the_token_of_an_image_is_never_generated(flamingo: Any) -> None:
    prompt = InterleavedPrompt([5], [])
    for seed in range(3):
        options = {"do_sample": True, "temperature": 50.0, "top_k": 0, "seed": seed, "eos_token_id": None}
        assert MARK not in flamingo.generate(prompt, max_new_tokens=70, **options)
        assert MARK not in list(flamingo.stream(prompt, max_new_tokens=70, **options))
    assert MARK not in flamingo.generate(prompt, max_new_tokens=20, num_beams=4, eos_token_id=None)


def test_keywords_of_generation(flamingo: Any) -> None:
    prompt = [picture(1), "how many sevens?"]
    words = flamingo.answer(prompt, **LONG).split()
    assert words[2] not in words[:2]
    assert flamingo.answer(prompt, stop_strings=[words[2]], **LONG).split() == words[:3]
    with pytest.raises(InputError, match=r"max_new_token is no generation keyword.*Did you mean max_new_tokens"):
        flamingo.answer(prompt, max_new_token=3)
    with pytest.raises(InputError, match="num_beams or num_return_sequences asks for 5 rows; this bundle allows 4"):
        flamingo.caption(picture(0), num_beams=5)


def test_a_stream_joined_is_what_generate_gives(flamingo: Any) -> None:
    prompt = [picture(0), "Question: how many sevens? Answer:"]
    pieces = list(flamingo.stream(prompt, **LONG))
    assert len(pieces) > 1
    assert "".join(pieces) == flamingo.generate(prompt, **LONG)
    assert list(flamingo.stream("<image> how", images=[picture(0)], **LONG))
    with pytest.raises(InputError, match="stream takes one prompt, received a list of 2"):
        flamingo.stream([[picture(0), "how"], ["how"]])
    with pytest.raises(InputError, match=r"image 0: 'none\.png' is not a file"):  # at once
        flamingo.stream([Path("none.png"), "how"])


def test_a_stream_that_is_closed_frees_its_caches(flamingo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    new_decoder = type(flamingo).new_decoder

    def noted(self: Any, rows: int, encoder_outputs: Any = None) -> Any:
        decoder = new_decoder(self, rows, encoder_outputs)
        made.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(type(flamingo), "new_decoder", noted)
    stream = flamingo.stream([picture(0), "how"], **LONG)
    next(stream)
    assert made[0]() is not None
    stream.close()
    gc.collect()
    assert made[0]() is None


# ------------------------------------------------------------------------------------------- a row that fails


def test_an_image_that_cannot_be_read_fails_its_row_alone(
    flamingo: Any, tmp_path: Path, counted: dict[str, Counted]
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(saved(tmp_path, 9).read_bytes()[:60])
    question = "how many sevens?"
    prompts: list[Any] = [[picture(number), question] for number in range(6)]
    sound = flamingo.answer(prompts, do_sample=True, seed=1, **LONG)
    prompts[1] = [picture(7), "a", damaged, question]
    prompts[4] = [tmp_path / "absent.png", question]
    with pytest.raises(RowsError) as caught:
        flamingo.answer(prompts, do_sample=True, seed=1, **LONG)
    answers = [answer for place, answer in enumerate(sound) if place not in (1, 4)]
    assert caught.value.answers == [sound[0], None, sound[2], sound[3], None, sound[5]]
    assert sorted(caught.value.errors) == [1, 4]
    assert str(caught.value.errors[4]) == (
        f"image 0 of prompt 4: '{tmp_path}/absent.png' is not a file that is there. Check the path."
    )
    assert str(caught.value.errors[1]).startswith(f"image 1 of prompt 1: '{damaged}' cannot be decoded: it is damaged")
    assert str(caught.value) == (
        f"2 of 6 rows failed, the first at place 1: {caught.value.errors[1]} The answers of the others are in "
        ".answers; return_exceptions=True returns errors among the answers."
    )
    found = flamingo.answer(prompts, do_sample=True, seed=1, return_exceptions=True, **LONG)
    assert [answer for answer in found if isinstance(answer, str)] == answers
    assert [type(found[place]) for place in (1, 4)] == [InputError, InputError]
    encoded = sum(len(feeds["pixel_values"]) for feeds in counted["encoder"].fed)
    assert encoded == 6 + 4 + 4  # no image of a row that failed


def test_one_image_that_cannot_be_read(flamingo: Any) -> None:
    said = "image 0: 'none.png' is not a file that is there. Check the path."
    for ask in (flamingo.caption, lambda path, **options: flamingo.answer([Path(path), "how"], **options)):
        with pytest.raises(InputError) as caught:
            ask("none.png")
        assert (type(caught.value), str(caught.value)) == (InputError, said)
        assert str(ask("none.png", return_exceptions=True)) == said
    with pytest.raises(RowsError) as rows:
        flamingo.caption(["none.png"])
    assert rows.value.answers == [None]


def test_several_answers_of_a_row_that_fails(flamingo: Any) -> None:
    found = flamingo.caption(
        ["none.png", picture(0)], num_return_sequences=2, num_beams=2, return_exceptions=True, **LONG
    )
    assert isinstance(found[0], InputError)
    assert [type(text) for text in found[1]] == [str, str]


def test_an_image_is_opened_when_its_batch_comes(flamingo: Any, tmp_path: Path, counted: dict[str, Counted]) -> None:
    """Five rows, four a call: the fifth file appears while the first four are answered."""
    paths = [saved(tmp_path, number) for number in range(5)]
    late = paths[4].read_bytes()
    paths[4].unlink()
    run = counted["encoder"].run

    def writing(feeds: Any, shapes: Any) -> Any:
        paths[4].write_bytes(late)
        return run(feeds, shapes)

    counted["encoder"].run = writing  # type: ignore[method-assign]
    assert len(flamingo.caption(paths, **LONG)) == 5


# ------------------------------------------------------------------------------------------------- dialogues


def test_a_dialogue_answers_as_if_all_of_it_were_one_prompt(flamingo: Any, counted: dict[str, Counted]) -> None:
    asked: list[Any] = [
        [picture(0), "how many sevens?"],
        "and now?",
        [picture(1), "what is left of the three?"],
        "a digits",
    ]
    said: list[Any] = []
    with flamingo.dialogue() as dialogue:
        for question, encoded in zip(asked, (1, 0, 1, 0), strict=True):
            before = len(counted["encoder"].fed)
            fed = len(counted["decoder"].fed)
            answer = dialogue.answer(question, **LONG)
            assert len(counted["encoder"].fed) - before == encoded
            new = counted["decoder"].fed[fed]["input_ids"].shape[1]
            assert new <= 6 + 9  # the last answer and the question
            parts = question if isinstance(question, list) else [question]
            assert flamingo.answer([*said, *parts], **LONG) == answer
            said += [*parts[:-1], (parts[-1], answer)]
            assert len(answer.split()) == 6


def test_a_dialogue_of_beams_and_samples_goes_on_from_its_answer(flamingo: Any) -> None:
    for options in ({"num_beams": 3}, {"do_sample": True, "seed": 5}):
        dialogue = flamingo.dialogue()
        first = dialogue.answer([picture(0), "how many sevens?"], **options, **LONG)
        second = dialogue.answer("and now?", **LONG)
        assert second == flamingo.answer([picture(0), ("how many sevens?", first), "and now?"], **LONG)


def test_an_end_of_sequence_token_is_no_part_of_the_dialogue(flamingo: Any) -> None:
    question = [picture(1), "how many sevens?"]
    words = flamingo.answer(question, **LONG).split()
    assert words[2] not in words[:2]
    dialogue = flamingo.dialogue()
    ends = flamingo.tokenizer().token_id(words[2])
    assert dialogue.answer(question, **{**LONG, "eos_token_id": ends}).split() == words[:3]  # a word, no special token
    said = " ".join(words[:2])
    assert dialogue.answer("and now?", **LONG) == flamingo.answer(
        [picture(1), ("how many sevens?", said), "and now?"], **LONG
    )


def test_a_dialogue_is_as_it_was_after_an_error_or_an_interruption(
    flamingo: Any, counted: dict[str, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogue = flamingo.dialogue()
    first = dialogue.answer([picture(0), "how many sevens?"], **LONG)
    for wrong in ([Path("none.png"), "how"], [picture(1)], ["how", ("a", "b")], "", [], [3, "how"]):
        with pytest.raises(InputError):
            dialogue.answer(wrong)
    run, left = counted["decoder"].run, [3]

    def interrupted(feeds: Any, shapes: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return run(feeds, shapes)

    monkeypatch.setattr(counted["decoder"], "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dialogue.answer([picture(2), "what is left?"], num_beams=2, **LONG)
    monkeypatch.undo()
    again = dialogue.answer([picture(1), "and now?"], **LONG)
    assert again == flamingo.answer([picture(0), ("how many sevens?", first), picture(1), "and now?"], **LONG)


def test_a_dialogue_that_is_too_long_or_has_too_many_images(flamingo: Any) -> None:
    dialogue = flamingo.dialogue()
    dialogue.answer([picture(0), "how many sevens?"], **LONG)  # 7 tokens, 6 new
    with pytest.raises(InputError) as caught:
        dialogue.answer("and now?", max_new_tokens=70)
    assert str(caught.value) == (
        "the dialogue is 16 tokens with this question, and 70 new ones make 86; the context holds 80. Begin another "
        "with dialogue(), or export a model with a longer context."
    )
    with pytest.raises(InputError) as caught:
        dialogue.answer([*map(picture, range(6)), "and now?"], **LONG)
    assert str(caught.value) == (
        "the dialogue has 1 images and this question 6 more; the cache holds 6. Begin another with dialogue(), or "
        "export again with --max I=7."
    )
    with pytest.raises(InputError, match="num_return_sequences is 2, but a dialogue goes on from one answer"):
        dialogue.answer("and now?", num_return_sequences=2, num_beams=2)
    with pytest.raises(InputError, match="a dialogue takes one question at a time, received a list of prompts"):
        dialogue.answer([["and now?"], ["how"]])


def test_a_closed_dialogue_and_a_closed_bundle(random_flamingo_bundle: Path) -> None:
    with load(random_flamingo_bundle, threads=1) as flamingo:
        dialogue, other = flamingo.dialogue(), flamingo.dialogue()
        dialogue.close()
        with pytest.raises(BackendError, match=r"this dialogue is closed; begin another with dialogue\(\)"):
            dialogue.answer("how")
    with pytest.raises(BackendError, match="this bundle is closed"):
        other.answer("how")


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_dialogue_belongs_to_its_process(flamingo: Any, way: Any) -> None:
    with pytest.raises(BackendError, match="Dialogue can be neither pickled nor copied"):
        way(flamingo.dialogue())


def test_threads_share_a_bundle_and_have_dialogues_of_their_own(flamingo: Any) -> None:
    def talk(number: int) -> list[str]:
        with flamingo.dialogue() as dialogue:
            first = dialogue.answer([picture(number), "how many sevens?"], **LONG)
            return [first, dialogue.answer([picture(number + 1), "and now?"], **LONG)]

    one_by_one = [talk(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(talk, range(4))) == one_by_one
