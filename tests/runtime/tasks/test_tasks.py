"""Compare the tasks of the contract with transformers' pipelines and sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from transom.export.pipeline import export
from transom.runtime import load
from transom.runtime.errors import InputError, ShapeError

MakeCheckpoint = Callable[..., Path]
# Four, and a batch of what is ``exported`` holds three: batches are cut.
TEXTS = ["the capital of france is paris", "water", "how many people, and which day?", "a long way down the river: 7!"]
Exported = Callable[..., tuple[Path, Path]]


def logits_of(architecture: str, folder: Path, *texts: Any) -> Any:
    """Return transformers' outputs for one text, or a pair of texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, architecture).from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt"))


def test_text_classification(exported: Exported) -> None:
    folder, bundle = exported("BertForSequenceClassification")
    with load(bundle) as bert:
        found = bert.classify(TEXTS)
        assert bert.classify(TEXTS[1]) == found[1]
        assert bert.classify(TEXTS[1], top_k=2) == found[1][:2]
        paired = bert.classify(TEXTS[0], TEXTS[1])
    for text, answer in zip(TEXTS, found, strict=True):
        expected = logits_of("BertForSequenceClassification", folder, text).logits[0].softmax(-1)
        assert [label for label, _ in answer] == [f"LABEL_{i}" for i in expected.argsort(descending=True)]
        np.testing.assert_allclose([p for _, p in answer], expected.sort(descending=True).values, rtol=1e-4)
    expected = logits_of("BertForSequenceClassification", folder, TEXTS[0], TEXTS[1]).logits[0].softmax(-1)
    assert paired[0][1] == pytest.approx(float(expected.max()), rel=1e-4)


@pytest.mark.parametrize(
    ("problem", "labels", "function"),
    [
        ("multi_label_classification", 3, torch.sigmoid),
        ("regression", 1, lambda logits: logits),
        (None, 1, torch.sigmoid),
    ],
)
def test_other_kinds_of_classification(exported: Exported, problem: str | None, labels: int, function: Any) -> None:
    settings = {"num_labels": labels, "problem_type": problem, "num_hidden_layers": 1}
    folder, bundle = exported("BertForSequenceClassification", **settings)
    expected = function(logits_of("BertForSequenceClassification", folder, TEXTS[0]).logits[0])
    with load(bundle) as bert:
        found = dict(bert.classify(TEXTS[0]))
    np.testing.assert_allclose([found[f"LABEL_{i}"] for i in range(labels)], expected, rtol=1e-4)


def test_fill_mask(exported: Exported) -> None:
    folder, bundle = exported("BertForMaskedLM")
    pipeline = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    with load(bundle) as bert:
        one, two = "the capital of [MASK] is paris", "[MASK] is the [MASK]"
        for text, found in ((one, [bert.fill_mask(one)]), (two, bert.fill_mask(two))):
            expected = pipeline(text)
            expected = expected if isinstance(expected[0], list) else [expected]
            assert [[word for word, _ in gap] for gap in found] == [[g["token_str"] for g in gap] for gap in expected]
            for gap, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose([p for _, p in gap], [g["score"] for g in theirs], rtol=1e-4)
        assert len(bert.fill_mask(one, top_k=9)) == 9
        with pytest.raises(InputError, match=r"no \[MASK\]; put one"):
            bert.fill_mask("nothing is missing")


def test_fill_mask_nests_as_transformers(exported: Exported) -> None:
    """Texts, masks, answers; a list of one text gets a list, where the pipeline unwraps it."""
    folder, bundle = exported("BertForMaskedLM")
    pipeline = transformers.pipeline("fill-mask", model=str(folder), device="cpu")

    def words(found: Any) -> Any:
        if isinstance(found, list):
            return [words(part) for part in found]
        return found["token_str"] if isinstance(found, dict) else found[0]

    one, two = "the capital of [MASK] is paris", "[MASK] is the [MASK]"
    with load(bundle) as bert:
        for texts in ([one, two, one], [two, two], [one, one], one, two):
            assert words(bert.fill_mask(texts)) == words(pipeline(texts))
        assert bert.fill_mask([one]) == [bert.fill_mask(one)]
        assert bert.fill_mask((two,)) == [bert.fill_mask(two)]
        with pytest.raises(InputError, match=r"text 1 has no \[MASK\]; put one"):
            bert.fill_mask([one, "nothing is missing"])
        with pytest.raises(InputError, match="texts is empty"):
            bert.fill_mask([])


def test_token_classification(exported: Exported) -> None:
    folder, bundle = exported("BertForTokenClassification")
    pipeline = transformers.pipeline("token-classification", model=str(folder), device="cpu")
    with load(bundle) as bert:
        for text, found in zip(TEXTS, bert.tag(TEXTS), strict=True):
            expected = pipeline(text)
            assert [(e.label, e.start, e.end) for e in found] == [(e["entity"], e["start"], e["end"]) for e in expected]
            assert [e.text for e in found] == [text[e["start"] : e["end"]] for e in expected]
            np.testing.assert_allclose([e.probability for e in found], [e["score"] for e in expected], rtol=1e-4)


def test_question_answering(exported: Exported) -> None:
    folder, bundle = exported("BertForQuestionAnswering")
    question, context = "which city is the capital", "the capital of france is paris, a city on the water"
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(question, context, return_tensors="pt")
    theirs = logits_of("BertForQuestionAnswering", folder, question, context)
    considered = torch.tensor([kind == 1 for kind in encoded.sequence_ids(0)])
    considered[0] = True  # the first token stands for "no answer" in the softmax, never in a span
    start, end = (
        torch.where(considered, logits[0], -10_000.0).softmax(-1) for logits in (theirs.start_logits, theirs.end_logits)
    )
    best, span = 0.0, (0, 0)
    for i in range(1, len(start)):
        for j in range(i, min(i + 15, len(start))):
            if considered[i] and considered[j] and float(start[i] * end[j]) > best:
                best, span = float(start[i] * end[j]), (i, j)
    offsets = transformers.AutoTokenizer.from_pretrained(folder)(question, context, return_offsets_mapping=True)
    begin, finish = offsets["offset_mapping"][span[0]][0], offsets["offset_mapping"][span[1]][1]
    with load(bundle) as bert:
        (answer,) = bert.answer(question, context)
        assert (answer.start, answer.end, answer.text) == (begin, finish, context[begin:finish])
        assert answer.probability == pytest.approx(best, rel=1e-4)
        several = bert.answer(question, " ".join([context] * 12), top_k=3)  # longer than S: read in windows
        assert [a.probability for a in several] == sorted((a.probability for a in several), reverse=True)
        for a in several:
            assert " ".join([context] * 12)[a.start : a.end] == a.text


def test_questions_and_contexts_in_lists(exported: Exported) -> None:
    _, bundle = exported("BertForQuestionAnswering")
    questions = ["which city is the capital", "how many people"]
    contexts = ["the capital of france is paris, a city on the water", "two people, and a day"]
    with load(bundle) as bert:
        both = [bert.answer(*pair, top_k=2) for pair in zip(questions, contexts, strict=True)]
        assert bert.answer(questions, contexts, top_k=2) == both
        assert bert.answer(questions[:1], contexts[:1], top_k=2) == both[:1]
        shared = [bert.answer(question, contexts[0]) for question in questions]
        assert bert.answer(questions, contexts[0]) == shared
        assert bert.answer(questions[0], contexts) == [bert.answer(questions[0], context) for context in contexts]
        for wrong, said in (
            ((questions, [*contexts, "a"]), "2 questions and 3 contexts; expected as many of each"),
            (([], contexts[0]), "questions is empty"),
            ((questions, [contexts[0], ""]), "context 1, '', has no tokens"),
            ((["", "a"], contexts), "question 0, '', has no tokens"),
        ):
            with pytest.raises(InputError, match=said):
                bert.answer(*wrong)


def test_a_question_beside_which_the_context_does_not_fit(exported: Exported) -> None:
    """S is 67, windows share half of it: 33. Beside q tokens and 3 special ones there is room for 64 - q."""
    _, bundle = exported("BertForQuestionAnswering")
    with load(bundle) as bert:
        assert len(bert.answer("way " * 60, "water of the city")) == 1  # it fits whole: nothing is shared
        assert bert.answer("way " * 30, "city " * 300)  # windows of 34
        with pytest.raises(InputError) as caught:
            bert.answer("way " * 31, "city " * 300)
        assert str(caught.value) == (
            "the question is 31 tokens and leaves 33 of the 67 of a row for the context, which is 300; windows over it "
            "share 33. Shorten it to 30."
        )
        with pytest.raises(
            InputError, match=r"question 1 is 64 tokens and leaves none of the 67 .* Shorten it to 61\.$"
        ):
            bert.answer(["a", "way " * 64], "the water city")


@pytest.mark.usefixtures("traced_once")
def test_advice_to_export_with_more_tokens_can_be_followed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint("BertForQuestionAnswering", num_hidden_layers=1)
    question, context = "way " * 12, "city " * 100
    export(str(folder), tmp_path / "short", max_sizes={"S": 24})
    with load(tmp_path / "short") as bert:
        with pytest.raises(
            InputError, match=r"windows over it share 12\. Shorten it to 8, or export again with --max S=31"
        ):
            bert.answer(question, context)
        assert bert.answer("way " * 8, context)
        with pytest.raises(ShapeError, match=r"text 0 is 27 tokens.*truncate=True, or export again with --max S=27\.$"):
            bert.tokenizer().encode(["way " * 25], truncate=False)
        with pytest.raises(ShapeError, match=r"checkpoint was trained for 67 at most: pass truncate=True, or split"):
            bert.tokenizer().encode(["way " * 99], truncate=False)
        with pytest.raises(ShapeError, match=r"axis S allows 1\.\.24\. Export again with --max S=67\."):
            bert.run({"input_ids": np.ones((1, 67), np.int64)})
        with pytest.raises(ShapeError, match=r"axis S allows 1\.\.24\. The model has 67 positions; give no more\."):
            bert.run({"input_ids": np.ones((1, 68), np.int64)})
    export(str(folder), tmp_path / "longer", max_sizes={"S": 31})
    with load(tmp_path / "longer") as bert:
        assert bert.answer(question, context)


def test_next_sentence(exported: Exported) -> None:
    folder, bundle = exported("BertForNextSentencePrediction")
    expected = logits_of("BertForNextSentencePrediction", folder, TEXTS[0], TEXTS[2]).logits[0].softmax(-1)[0]
    with load(bundle) as bert:
        assert bert.next_sentence(TEXTS[0], TEXTS[2]) == pytest.approx(float(expected), rel=1e-4)
        found = bert.next_sentence(TEXTS, TEXTS[::-1])  # more than a batch, and in the caller's order
        each = [bert.next_sentence(*pair) for pair in zip(TEXTS, TEXTS[::-1], strict=True)]
        assert found == pytest.approx(each, abs=1e-6)
        assert bert.next_sentence([TEXTS[0]], [TEXTS[2]]) == [bert.next_sentence(TEXTS[0], TEXTS[2])]
        with pytest.raises(InputError, match="2 texts and 1 pairs"):
            bert.next_sentence(TEXTS[:2], TEXTS[2])


def test_embed_pools_as_stated(bert_checkpoint: Path, bert_bundle: Path) -> None:
    with load(bert_bundle) as bert:
        found = bert.embed(TEXTS * 5)  # more than the 16 rows of a batch
        one = bert.embed(TEXTS[2])
    assert (found.shape, found.dtype, one.shape) == ((20, 160), np.float32, (160,))
    for number, text in enumerate(TEXTS):
        hidden = logits_of("BertModel", bert_checkpoint, text).last_hidden_state[0]
        for vector in found[number :: len(TEXTS)]:
            np.testing.assert_allclose(vector, hidden.mean(0), atol=1e-5)
    np.testing.assert_allclose(one, found[2], atol=1e-6)


def test_every_bert_embeds(exported: Exported) -> None:
    _, bundle = exported("BertForMaskedLM")
    with load(bundle) as bert:
        assert bert.embed(TEXTS).shape == (4, 160)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    out = tmp_path_factory.mktemp("minilm") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transom.export.pipeline.score_both", lambda *sides: None)  # 4,000 texts: two thirds of the time
        export("minilm", out, max_sizes={"B": 4, "S": 256})  # sentence-transformers cuts at 256 as well
    with load(out) as bundle:
        yield bundle


def test_minilm_embeds_as_sentence_transformers(minilm: Any) -> None:
    import sentence_transformers

    from transom.export.datasets import passage
    from transom.export.reference_models import reference_folder

    theirs = sentence_transformers.SentenceTransformer(str(reference_folder("minilm")), device="cpu")
    texts = [*passage(), " ".join(passage()), "x", "Straße — naïve café; 北京 😀"]
    expected, found = theirs.encode(texts), minilm.embed(texts)
    assert np.abs(found - expected).max() <= 2e-6
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    related = minilm.embed(["A man is eating food.", "A man eats something.", "The stock market fell."])
    assert related[0] @ related[1] > 0.7 > 0.2 > related[0] @ related[2]


def test_vit_classifies_and_gives_features(vit_bundle: Path) -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pictures = [Image.fromarray(np.uint8(scan.reshape(8, 8) * 255 // 16)).convert("RGB") for scan in scans[:40]]
    with load(vit_bundle) as vit:
        answers = vit.classify(pictures)
        assert len(answers) == 40
        assert sum(answer[0][0] == str(label) for answer, label in zip(answers, labels[:40], strict=True)) >= 38
        assert vit.classify(pictures[0], top_k=3) == answers[0][:3]
        assert sum(p for _, p in vit.classify(pictures[0], top_k=10)) == pytest.approx(1, abs=1e-6)
        features = vit.features(pictures)
        assert features.shape == (40, vit.manifest.config["hidden_size"])
        np.testing.assert_allclose(vit.features(pictures[7]), features[7], atol=1e-5)


@pytest.mark.parametrize("text", ["", "   ", "\t\n", "\x00\x01"])
def test_empty_text(bert_bundle: Path, text: str) -> None:
    with load(bert_bundle) as bert, pytest.raises(InputError, match=r"text 1.* has no tokens"):
        bert.embed(["water", text])


def test_wrong_calls(exported: Exported, bert_bundle: Path, vit_bundle: Path) -> None:
    _, classifier = exported("BertForSequenceClassification")
    long = "way " * 100
    with load(bert_bundle) as bert:
        with pytest.raises(InputError, match="exported for feature-extraction; the call needs text-classification"):
            bert.classify("water")
        with pytest.raises(InputError, match="text 0 is a int, expected a str"):
            bert.embed([3])
        with pytest.raises(InputError, match="empty"):
            bert.embed([])
        assert bert.embed(long).shape == (160,)  # embed cuts, as sentence-transformers does
    with load(classifier) as bert:
        with pytest.raises(ShapeError, match=r"text 0 is 102 tokens.*at most 67 fit.*truncate=True"):
            bert.classify(long)
        assert len(bert.classify(long, truncate=True)) == 5
        with pytest.raises(InputError, match="top_k is 0"):
            bert.classify("water", top_k=0)
        with pytest.raises(InputError, match="2 texts and 1 pairs"):
            bert.classify(["a", "b"], ["c"])
    with load(vit_bundle) as vit:
        with pytest.raises(InputError, match="list of images is empty"):
            vit.classify([])
        with pytest.raises(InputError, match="absent"):
            vit.classify("absent.png")


@pytest.mark.usefixtures("traced_once")
def test_a_checkpoint_without_tokenizer_runs_raw(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    export(str(make_checkpoint("BertModel", tokenizer=False)), tmp_path / "out")
    with load(tmp_path / "out") as bert:
        assert bert.run({"input_ids": np.ones((1, 5), np.int64)})["last_hidden_state"].shape == (1, 5, 160)
        with pytest.raises(InputError, match=r"no tokenizer.*call run\(\) with input_ids"):
            bert.embed("water")


def test_a_vit_with_one_channel_runs_raw(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    export(str(make_checkpoint("ViTForImageClassification", num_channels=1, num_hidden_layers=1)), tmp_path / "out")
    with load(tmp_path / "out") as vit:
        assert vit.run({"pixel_values": np.ones((2, 1, 20, 20), np.float32)})["logits"].shape == (2, 2)
        with pytest.raises(InputError, match=r"call run\(\) with pixel_values"):
            vit.classify(np.zeros((20, 20, 3), np.uint8))


def test_another_image_size(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint("ViTForImageClassification", num_hidden_layers=1)
    export(str(folder), tmp_path / "out", image_size=(28, 36))
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    with load(tmp_path / "out") as vit:
        pixels = vit._preprocess([picture])
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels), interpolate_pos_encoding=True).logits[0].softmax(-1)
        assert pixels.shape == (1, 3, 28, 36)
        found = dict(vit.classify(picture))
    np.testing.assert_allclose([found["LABEL_0"], found["LABEL_1"]], expected, rtol=1e-4)
