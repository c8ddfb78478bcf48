"""NaN and infinity from a model: one error from every task, the numbers as they are from a raw run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paths import KEPT
from transom.runtime import load
from transom.runtime.errors import InputError, NotFiniteError
from transom.runtime.finite import check_finite
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import FAMILIES, family_tasks
from transom.runtime.tasks.generator import Generator
from transom.runtime.tasks.image_bundle import ImageBundle
from transom.runtime.tasks.text_bundle import TextBundle

Exported = Callable[..., tuple[Path, Path]]
IMAGE = np.zeros((8, 8, 3), np.uint8)


class Spoilt:
    """A backend one of whose numbers is another: the first of the last row of every float output."""

    def __init__(self, backend: Any, value: float) -> None:
        self.inner, self.value, self.graph, self.device = backend, value, backend.graph, backend.device

    def run(self, feeds: Any, shapes: Any) -> Any:
        found = self.inner.run(feeds, shapes)
        for array in found.values():
            array[-1].reshape(-1)[0] = self.value
        return found


def spoilt(bundle: Any, value: float) -> Any:
    bundle._backends = [Spoilt(backend, value) for backend in bundle._backends]
    return bundle


# (family, method) -> call, what the error names. Of BERT the tasks that the kept bundle has; the others are below.
KEPT_CALLS: dict[tuple[str, str], tuple[Callable[[Any], object], str]] = {
    ("bert", "embed"): (lambda b: b.embed(["a", "a b"]), "sentence_embedding for text 1"),
    ("bert", "classify"): (lambda b: b.classify(["a b", "a"]), "logits for text 0"),
    ("clip", "embed_image"): (lambda c: c.embed_image([IMAGE, IMAGE]), "image_embeds for image 1 of 2"),
    ("clip", "embed_text"): (lambda c: c.embed_text("a"), "text_embeds for text 0"),
    ("clip", "embed_labels"): (
        lambda c: c.embed_labels(["a"], ["{}", "a {}"]),
        "text_embeds for label 0 in template 1",
    ),
    ("clip", "zero_shot"): (lambda c: c.zero_shot(IMAGE, ["a"]), "text_embeds for label 0"),
    ("vit", "classify"): (lambda v: v.classify(IMAGE), "logits for image 0 of 1"),
    ("vit", "features"): (lambda v: v.features([IMAGE] * 5), "last_hidden_state for image 1 of 5"),
    ("swin", "classify"): (lambda s: s.classify(IMAGE), "logits for image 0 of 1"),
    ("swin", "features"): (lambda s: s.features([IMAGE] * 5), "pooler_output for image 1 of 5"),
    ("swinv2", "classify"): (lambda s: s.classify(IMAGE), "logits for image 0 of 1"),
    ("swinv2", "features"): (lambda s: s.features([IMAGE] * 5), "pooler_output for image 1 of 5"),
    ("gpt", "generate"): (
        lambda g: g.generate([[1, 2], [3]], max_new_tokens=2),
        "logits for prompt 0",
    ),  # the longer row is the last
    ("gpt", "stream"): (lambda g: list(g.stream([1, 2], max_new_tokens=2)), "logits for prompt 0"),
    ("gpt", "score"): (lambda g: g.score([[1, 2], [3, 4]]), "logits for prompt 0"),
    ("gpt", "log_probabilities"): (lambda g: g.log_probabilities([1, 2]), "logits for prompt 0"),
    ("transformer", "generate"): (lambda t: t.generate([1, 2], max_new_tokens=2), "logits for prompt 0"),
    ("seq2seq", "generate"): (lambda s: s.generate([3, 4], max_new_tokens=2), "logits for prompt 0"),
    ("show_attend_tell", "caption"): (lambda c: c.caption(IMAGE, max_new_tokens=2), "logits for prompt 0"),
    ("transformer", "stream"): (lambda t: list(t.stream([1, 2], max_new_tokens=2, num_beams=1)), "logits for prompt 0"),
}
HEADS = {
    "fill_mask": ("BertForMaskedLM", lambda b: b.fill_mask("[MASK] the"), "logits for text 0"),
    "tag": ("BertForTokenClassification", lambda b: b.tag(["the water"]), "logits for text 0"),
    "answer": ("BertForQuestionAnswering", lambda b: b.answer("who", "the water"), "start_logits for question"),
    "next_sentence": ("BertForNextSentencePrediction", lambda b: b.next_sentence("a", "b"), "logits for text 0"),
}
FLAMINGO = {
    "answer": (lambda f: f.answer([["a"], [IMAGE, "how many"]], max_new_tokens=2), "logits for prompt 1"),
    "generate": (lambda f: f.generate([[IMAGE, "a"], [IMAGE, "how"]], num_beams=2), "logits for prompt 1"),
    "caption": (lambda f: f.caption([IMAGE, IMAGE], max_new_tokens=2), "logits for prompt 1"),
    "stream": (lambda f: list(f.stream([IMAGE, "a"], max_new_tokens=2)), "logits for prompt 0"),
    "dialogue": (lambda f: f.dialogue().answer([IMAGE, "a"], max_new_tokens=2), "logits for prompt 0"),
}
NO_READING = {  # public methods of families that read no numbers themselves, or call one that is above
    "answer_text", "append_images", "caption_parts", "caption_prompt", "continued", "decoder_length", "encode",
    "image_batches", "image_rows", "longer", "new_decoder", "open_prompt_reader", "open_tokenizer", "prefill",
    "prefill_call", "prefill_encoded", "prefill_masked", "preprocess", "prompt_axis", "prompt_of", "prompt_tokens",
    "prompts_at_once", "question_parts", "random_prompts", "reader", "run", "run_texts", "target_tokenizer",
    "text_batches", "text_rows", "tokenizer", "translate",
}  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", KEPT_CALLS, ids="-".join)
def test_a_task_never_answers_from_nan(key: tuple[str, str], value: float) -> None:
    call, named = KEPT_CALLS[key]
    kind = "NaN" if np.isnan(value) else "(infinite|NaN)"  # of a source, whatever the decoder makes of it
    with load(KEPT / f"{key[0]}-fp32", threads=1) as bundle:
        call(bundle)
        with pytest.raises(NotFiniteError, match=rf"the model's {named} are {kind}.*Run `transom selftest`"):
            call(spoilt(bundle, value))


class Everywhere(Spoilt):
    def run(self, feeds: Any, shapes: Any) -> Any:
        return {name: np.full_like(array, self.value) for name, array in self.inner.run(feeds, shapes).items()}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_bert_never_answers_from_nan(name: str, exported: Exported) -> None:
    architecture, call, named = HEADS[name]
    with load(exported(architecture)[1], threads=1) as bert:
        call(bert)
        whole = bert._backends
        for value in (np.nan, -np.inf):
            bert._backends = [Everywhere(backend, value) for backend in whole]
            with pytest.raises(NotFiniteError, match=f"the model's {named}"):
                call(bert)
            bert._backends = [Spoilt(backend, value) for backend in whole]
            if name == "fill_mask":  # the number of [CLS], which nothing reads
                call(bert)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("name", FLAMINGO)
def test_a_flamingo_never_answers_from_nan(name: str, part: str, random_flamingo_bundle: Path) -> None:
    call, named = FLAMINGO[name]
    with load(random_flamingo_bundle, threads=1) as flamingo:
        call(flamingo)
        flamingo._backends = [
            Spoilt(backend, np.nan) if backend.graph.name == part else backend for backend in flamingo._backends
        ]
        with pytest.raises(NotFiniteError, match=f"the model's {named} are NaN"):
            call(flamingo)


def test_every_task_of_every_family_is_above() -> None:
    """A method that is added has to come into one of the tables."""
    known = {name for _, name in KEPT_CALLS} | set(HEADS) | set(FLAMINGO) | NO_READING
    classes = {c for family in FAMILIES for c in (family_tasks(family).bundle, *family_tasks(family).by_task.values())}
    for each in classes:
        own = {
            name
            for base in inspect.getmro(each)
            if issubclass(base, LoadedBundle) and base is not LoadedBundle
            for name, member in vars(base).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }
        assert own <= known, f"{each.__name__}: {sorted(own - known)}"
    assert {TextBundle, ImageBundle, Generator} <= {base for each in classes for base in each.mro()}


def test_beams_never_choose_from_nan() -> None:
    with load(KEPT / "gpt-fp32", threads=1) as gpt, pytest.raises(NotFiniteError, match="logits for prompt 0 are NaN"):
        spoilt(gpt, np.nan).generate([1, 2], max_new_tokens=2, num_beams=2)


def test_a_raw_run_hands_out_what_the_model_gave() -> None:
    with load(KEPT / "bert-fp32", threads=1) as bert:
        found = spoilt(bert, np.nan).run({"input_ids": np.ones((2, 3), np.int64)})
    assert np.isnan(found["logits"][1, 0])
    assert np.isfinite(found["logits"][0]).all()


def test_what_counts_as_finite() -> None:
    """-inf rules a token of a vocabulary out where others are left; elsewhere it is as bad as NaN."""
    rows = np.array([[1, 2], [-np.inf, 3]], np.float32)
    check_finite(rows, "logits", str, ruled_out=True)
    with pytest.raises(NotFiniteError, match="logits for 1 are infinite"):
        check_finite(rows, "logits", str)
    with pytest.raises(NotFiniteError, match="logits for 0 are infinite"):
        check_finite(np.full((1, 2), -np.inf, np.float32), "logits", str, ruled_out=True)
    with pytest.raises(NotFiniteError, match="x for 2 are NaN at last"):
        check_finite(np.array([0, 1, np.nan], np.float32), "x", str, when=" at last")
    assert issubclass(NotFiniteError, InputError)


def test_a_token_that_is_ruled_out_has_the_probability_zero() -> None:
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        spoilt(gpt, -np.inf)  # token 0 at the first position
        assert gpt.log_probabilities([5, 0])[0] == -np.inf
        assert gpt.score([5, 0]) == np.inf
        assert np.isfinite(gpt.score([5, 1]))


def test_a_perplexity_past_the_range_of_float64_is_infinite() -> None:
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        spoilt(gpt, 1e4)  # all of the probability on token 0
        assert gpt.score([5, 1]) == np.inf


def test_selftest_says_that_a_generation_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    from transom.runtime import selftest as module
    from transom.runtime.errors import ParityError

    opened = module.open_verified
    monkeypatch.setattr(module, "open_verified", lambda *arguments: spoilt(opened(*arguments), np.nan))
    with pytest.raises(ParityError, match="golden generation meets logits that are NaN or infinite"):
        module.selftest(KEPT / "gpt-fp32")
