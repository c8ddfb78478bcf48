"""Requests of many callers: put together, answered, taken apart, as the bundle's own methods answer each alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from command_line import changed_bundle
from paths import KEPT
from served_requests import of_bytes, png, request_for, task_or_none, tensors_for
from transom.runtime import load
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.families import FAMILIES
from transom.runtime.serving.ports import PADDING
from transom.runtime.serving.service import Request, Service, parsed
from transom.runtime.serving.tasks import OPERATIONS, task_operation
from transom.runtime.serving.tensors import WholeOperation, graph_operation
from transom.runtime.tasks import family_tasks
from transom.runtime.tasks.generator import Stream

FAMILY_BUNDLES = sorted(path.name for path in KEPT.iterdir() if "-fp32" in path.name)


@pytest.fixture(params=FAMILY_BUNDLES)
def kept(request: pytest.FixtureRequest) -> Iterator[Any]:
    with load(KEPT / request.param, threads=1) as bundle:
        yield bundle


def same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_every_task_of_every_family_is_served() -> None:
    tasks = {task for family in FAMILIES for task in family_tasks(family).tasks}
    assert tasks == OPERATIONS.keys()


def test_requests_together_are_answered_as_alone(kept: Any) -> None:
    operation = task_or_none(kept)
    assert operation is not None
    service = Service(operation)
    requests = [request_for(operation, seed) for seed in range(5)]
    alone = [service.answer([request])[0] for request in requests]
    for one, other in zip(alone, service.answer(requests), strict=True):
        assert isinstance(one, dict), one
        same(one, other)


def test_graphs_together_are_run_as_alone(kept: Any) -> None:
    for file in kept.manifest.graphs:
        service = Service(graph_operation(kept, file.graph.name))
        requests = [tensors_for(kept, file.graph, seed) for seed in range(3)]
        answers = service.answer(requests)
        for request, answer in zip(requests, answers, strict=True):
            copies = {name: array.copy() for name, array in request.inputs.items()}
            assert isinstance(answer, dict), answer
            states = {tensor.name: tensor.aliases or tensor.name for tensor in file.graph.outputs}
            same(kept.run(copies), {states[name]: array for name, array in answer.items()})


def test_pieces_joined_are_the_answer(kept: Any) -> None:
    operation = task_or_none(kept)
    assert operation is not None
    service, request = Service(operation), request_for(operation, 1)
    if operation.stream is None:
        with pytest.raises(InputError, match="come at once"):
            service.stream(request)
        return
    (answer,) = service.answer([request])
    assert isinstance(answer, dict)
    pieces = list(service.stream(request))
    if "generated_text" in answer:
        assert b"".join(piece["generated_text"][0, 0] for piece in pieces) == answer["generated_text"][0, 0]
    else:
        assert [int(piece["generated_ids"][0, 0, 0]) for piece in pieces] == answer["generated_ids"][0, 0].tolist()


def test_answers_are_those_of_the_methods() -> None:
    with load(KEPT / "bert-fp32", threads=1) as bert:
        (answer,) = Service(task_operation(bert)).answer([Request({"text": of_bytes([[b"the city"]])}, {"top_k": 2})])
        expected = bert.classify("the city", top_k=2)
        assert isinstance(answer, dict)
        assert [label.decode() for label in answer["label"][0]] == [label for label, _ in expected]
        assert answer["score"].tolist() == [[score for _, score in expected]]
    with load(KEPT / "electra-fp32", threads=1) as electra:
        (answer,) = Service(task_operation(electra)).answer([Request({"text": of_bytes([[b"the city"]])})])
        assert isinstance(answer, dict)
        assert json.loads(answer["entity"][0, 0]) == [entity._asdict() for entity in electra.tag("the city")]
    with load(KEPT / "vit-fp32", threads=1) as vit:
        image = png(np.random.default_rng(0))
        (answer,) = Service(task_operation(vit)).answer([Request({"image": of_bytes([[image]])})])
        assert isinstance(answer, dict)
        assert answer["label"][0, 0].decode() == vit.classify(image)[0][0]


def test_questions_and_captions_of_one_bundle(random_flamingo_bundle: Path) -> None:
    image, other = (png(np.random.default_rng(seed)) for seed in (0, 1))
    with load(random_flamingo_bundle, threads=1) as flamingo:
        service = Service(task_operation(flamingo))
        mark = flamingo.reader().word()
        found = service.answer(
            [
                Request({"image": of_bytes([[image]])}, {"max_new_tokens": 4}),
                Request({"image": of_bytes([[image]]), "text": of_bytes([[b"the people"]])}, {"max_new_tokens": 4}),
                Request(
                    {"image": of_bytes([[image, other]]), "text": of_bytes([[f"the {mark} city {mark} him".encode()]])},
                    {"max_new_tokens": 4},
                ),
                Request({"image": of_bytes([[image, other]])}),
            ]
        )
        texts = [answer["generated_text"][0, 0].decode() for answer in found[:3] if isinstance(answer, dict)]
        assert texts == [
            flamingo.caption(image, max_new_tokens=4),
            flamingo.answer([image, "the people"], max_new_tokens=4),
            flamingo.answer(["the ", image, " city ", other, " him"], max_new_tokens=4),
        ]
        assert str(found[3]) == "2 images were given without a text; expected one, or a question."


def test_a_request_that_cannot_be_used_fails_alone(bert_bundle: Path) -> None:
    long = b"people " * 200
    with load(KEPT / "bert-fp32", threads=1) as bert:
        service = Service(task_operation(bert))
        good = Request({"text": of_bytes([[b"the city"]])})
        found = service.answer(
            [good, Request({"text": of_bytes([[long]])}), good, Request({"text": of_bytes([[b""]])})]
        )
        (expected,) = service.answer([good])
    assert isinstance(expected, dict)
    for place in (0, 2):
        same(expected, found[place])
    assert isinstance(found[1], ShapeError)
    assert "at most 7 fit" in str(found[1])
    assert isinstance(found[3], InputError)


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({}, {}, "the input text is missing; this bundle takes text, pair."),
        (
            {"text": of_bytes([[b"a"]]), "txt": of_bytes([[b"a"]])},
            {},
            "unknown input 'txt'; this bundle takes text, pair",
        ),
        ({"text": np.zeros((1, 1), np.int64)}, {}, "text has dtype int64; expected bytes"),
        ({"text": of_bytes([[b"a", b"b"]])}, {}, r"text has shape \(1, 2\); expected \(rows, 1\)"),
        ({"text": np.empty((0, 1), object)}, {}, r"text has shape \(0, 1\)"),
        ({"text": of_bytes([[b"\xff"]])}, {}, "text is not UTF-8"),
        ({"text": of_bytes([[b"a"], [b"b"]]), "pair": of_bytes([[b"a"]])}, {}, "different numbers of rows"),
        ({"text": of_bytes([[b"a"]])}, {"topk": 1}, "unknown parameter 'topk'; did you mean top_k?"),
        ({"text": of_bytes([[b"a"]])}, {"top_k": 0}, "the parameter top_k is 0; expected an int, 1..65536"),
        ({"text": of_bytes([[b"a"]])}, {"top_k": "many"}, "the parameter top_k is 'many'"),
        ({"text": of_bytes([[b"a"]])}, {"truncate": 1}, "the parameter truncate is 1; expected"),
    ],
)
def test_wrong_requests(inputs: Any, parameters: Any, message: str) -> None:
    with load(KEPT / "bert-fp32", threads=1) as bert:
        (found,) = Service(task_operation(bert)).answer([Request(inputs, parameters)])
    with pytest.raises(InputError, match=message):
        raise found if isinstance(found, InputError) else AssertionError(found)


def test_wrong_tensors() -> None:
    with load(KEPT / "bert-fp32", threads=1) as bert:
        service = Service(graph_operation(bert, "model"))
        (found,) = service.answer([Request({"input_ids": np.zeros((1, 3), np.int32)})])
        assert str(found) == "input_ids has dtype int32; expected int64."
        (found,) = service.answer([Request({"input_ids": np.zeros((1, 9), np.int64)})])
        assert isinstance(found, ShapeError)


def test_more_rows_than_a_batch_holds() -> None:
    with load(KEPT / "vit-fp32", threads=1) as vit:
        assert vit.max_size("B") == 2
        pixels = np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32)
        (answer,) = Service(graph_operation(vit, "model")).answer([Request({"pixel_values": pixels})])
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["logits"][4:], vit.run({"pixel_values": pixels[4:]})["logits"])


def test_requests_of_other_parameters() -> None:
    with load(KEPT / "vit-fp32", threads=1) as vit:
        image = of_bytes([[png(np.random.default_rng(0))]])
        found = Service(task_operation(vit)).answer([Request({"image": image}, {"top_k": count}) for count in (1, 3)])
        assert [answer["label"].shape for answer in found if isinstance(answer, dict)] == [(1, 1), (1, 3)]


def test_tensors_of_other_sizes() -> None:
    with load(KEPT / "bert-fp32", threads=1) as bert:
        requests = [Request({"input_ids": np.ones((1, length), np.int64)}) for length in (3, 5)]
        found = Service(graph_operation(bert, "model")).answer(requests)
        for request, answer in zip(requests, found, strict=True):
            assert isinstance(answer, dict)
            same(bert.run(request.inputs), answer)


def test_images_with_labels_of_their_own() -> None:
    image = png(np.random.default_rng(0))
    labels = ([b"the", b"city"], [b"him"])
    with load(KEPT / "clip-fp32", threads=1) as clip:
        requests = [Request({"image": of_bytes([[image]]), "candidate_label": of_bytes([own])}) for own in labels]
        found = Service(task_operation(clip)).answer(requests)
        for own, answer in zip(labels, found, strict=True):
            expected = clip.zero_shot(image, [label.decode() for label in own])
            assert isinstance(answer, dict)
            assert [label.decode() for label in answer["label"][0]] == [label for label, _ in expected]


def test_random_numbers_are_a_requests_own() -> None:
    """With a seed a request gets what it would get alone, whoever asks beside it."""
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        service = Service(task_operation(gpt))
        requests = [
            Request({"input_ids": np.array([[1, 2, 3]])}, {"do_sample": True, "seed": 7, "max_new_tokens": 4})
            for _ in range(3)
        ]
        expected = gpt.generate([1, 2, 3], do_sample=True, seed=7, max_new_tokens=4)
        for answer in service.answer(requests):
            assert isinstance(answer, dict)
            assert answer["generated_ids"].tolist() == [[expected]]


def test_bundles_that_take_tensors_alone(tmp_path: Path) -> None:
    without = changed_bundle(KEPT / "bert-fp32", tmp_path / "bert", lambda stored: stored.pop("tokenizer"))
    with load(without, threads=1) as bert, pytest.raises(InputError, match=r"no tokenizer, .* serve its tensors"):
        task_operation(bert)
    without = changed_bundle(KEPT / "vit-fp32", tmp_path / "vit", lambda stored: stored.pop("preprocess"))
    with load(without, threads=1) as vit, pytest.raises(InputError, match=r"call run.. with pixel_values"):
        task_operation(vit)
    other = changed_bundle(KEPT / "vit-fp32", tmp_path / "other", lambda stored: stored.update(task="depth-estimation"))
    with load(other, threads=1) as vit, pytest.raises(InputError, match="takes tensors only"):
        task_operation(vit)


def test_sequences_of_different_lengths_are_padded() -> None:
    """The second prompt's first token that the first does not begin with ends the second alone."""
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        service = Service(task_operation(gpt))
        prompts = np.array([[1, 2, 3], [1, 2, 5]])
        first, second = ([*gpt.generate(row.tolist(), max_new_tokens=4)] for row in prompts)
        end = next(token for token in second if token not in first)
        keywords = {"max_new_tokens": 4, "eos_token_id": end}
        (answer,) = service.answer([Request({"input_ids": prompts}, keywords)])
        rows = [gpt.generate(row.tolist(), **keywords) for row in prompts]
        assert len(rows[1]) < len(rows[0]) == 4
        assert isinstance(answer, dict)
        assert answer["generated_ids"][:, 0].tolist() == [rows[0], rows[1] + [PADDING] * (4 - len(rows[1]))]


def test_closing_a_stream_ends_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        pieces = Service(task_operation(gpt)).stream(Request({"input_ids": np.array([[1, 2]])}, {"max_new_tokens": 4}))
        ended: list[bool] = []
        monkeypatch.setattr(Stream, "close", lambda self: ended.append(True))
        next(pieces)
        assert ended == []
        pieces.close()
        assert ended == [True]
        assert list(pieces) == []
        with pytest.raises(InputError, match="one row, received 2"):
            Service(task_operation(gpt)).stream(Request({"input_ids": np.ones((2, 2), np.int64)}))


def test_parameters_as_text() -> None:
    """Triton's protocol has no fractions and no lists: they come as JSON in text."""
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        specs = task_operation(gpt).parameters
    given = {"temperature": "0.7", "do_sample": "true", "eos_token_id": "[1, 2]", "stop_strings": "1", "top_k": 3}
    assert parsed(specs, given) == {
        "temperature": 0.7,
        "do_sample": True,
        "eos_token_id": [1, 2],
        "stop_strings": "1",
        "top_k": 3,
    }
    assert parsed(specs, {"stop_strings": '["a", "b"]'}) == {"stop_strings": ["a", "b"]}


def test_parameters_of_callers_in_python() -> None:
    with load(KEPT / "vit-fp32", threads=1) as bundle:
        service = Service(task_operation(bundle))
        request = request_for(service.operation, 0)
        plain, numpy_s, wrong = service.answer(
            [Request(request.inputs, {"top_k": 2}), Request(request.inputs, {"top_k": np.int64(2)}),
             Request(request.inputs, {3: 2})],  # type: ignore[dict-item]
        )  # fmt: skip
        same(plain, numpy_s)
        assert str(wrong) == "unknown parameter 3; there are top_k."
    with load(KEPT / "gpt-fp32", threads=1) as bundle:
        service = Service(task_operation(bundle))
        ids = np.array([[1, 2]])
        lists, *others = service.answer(
            [
                Request({"input_ids": ids}, {"max_new_tokens": 3, "eos_token_id": end})
                for end in ([5, 6], np.array([5, 6]))
            ]
        )
        for other in others:
            same(lists, other)


def test_an_image_that_cannot_be_read_is_told_without_words_of_python() -> None:
    with load(KEPT / "flamingo-fp32", threads=1) as bundle:
        service = Service(task_operation(bundle))
        good = png(np.random.default_rng(0))
        one, second = service.answer([Request({"image": of_bytes(rows)}) for rows in ([[b"x"]], [[good], [b"x"]])])
    assert str(one).startswith("image 0: the image of 1 bytes")
    assert str(second).startswith("image 0 of prompt 1: the image of 1 bytes")
    assert "return_exceptions" not in f"{one} {second}"


def test_a_streamed_answer_has_no_blanks_around_it(flamingo_bundle: Path) -> None:
    """Its first token is " three"."""
    with load(flamingo_bundle, threads=1) as flamingo:
        image = PIL.Image.new("L", (16, 16))
        written = io.BytesIO()
        image.save(written, "PNG")
        request = Request({"image": of_bytes([[written.getvalue()]]), "text": of_bytes([[b"how many threes?"]])})
        (whole,) = Service(task_operation(flamingo)).answer([request])
        pieces = [piece["generated_text"][0, 0] for piece in Service(task_operation(flamingo)).stream(request)]
        assert isinstance(whole, dict)
        assert b"".join(pieces) == whole["generated_text"][0, 0] == b"zero"


def test_a_graph_whose_groups_share_images_is_run_whole(random_flamingo_bundle: Path) -> None:
    with load(random_flamingo_bundle, threads=1) as flamingo:
        assert isinstance(graph_operation(flamingo, "decoder"), WholeOperation)
        assert not isinstance(graph_operation(flamingo, "encoder"), WholeOperation)
