"""The pictures of seq2seq and Show, Attend and Tell: the weights of the bundle's own decoder, step by step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from command_line import changed_bundle
from conftest import Once, export_recurrent, export_to, reference
from recurrent_models import END, START
from report_pages import Page
from transom.export.checkpoint import load_checkpoint
from transom.export.datasets import heldout_compositions
from transom.export.report.figures.decoder_steps import weights_along
from transom.export.report.figures.seq2seq import alignment, draw_alignments
from transom.export.report.figures.show_attend_tell import MOST_WORDS, caption_of, draw_captions, grid_of, tint
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, InputError
from transom.runtime.tasks.seq2seq import Seq2Seq
from transom.runtime.tasks.show_attend_tell import ShowAttendTell

TEXT = "the people of paris call him now"  # 7 words, and the end of the text
EVIL = "<script>\"'&\u202e"


def definition(bundle: Path) -> Any:
    source = Bundle(bundle).manifest.source["checkpoint"]
    return load_checkpoint(source, task=None, max_sizes={}, image_size=None, ignore_unused=False).module


def steps_of(module: Any, given: list[Any], state: list[Any], tokens: list[int]) -> tuple[list[int], NDArray[Any]]:
    """Run PyTorch's decoder over ``tokens``: the most probable token but the end, and the weights, of each step."""
    best, rows = [], []
    for token in tokens:
        logits, weights, *state = module.decode(torch.tensor([[token]]), *given, *state)
        logits[..., END] = -torch.inf  # the bundle writes twelve tokens, whatever they are
        best.append(int(logits.argmax()))
        rows.append(weights[0, 0].numpy())
    return best, np.stack(rows)


# seq2seq
def test_an_alignment_is_that_of_the_definition(random_seq2seq_bundle: Path) -> None:
    """Twelve tokens over eight, two layers: the state of each step is the one that the step before left."""
    with Seq2Seq(Bundle(random_seq2seq_bundle)) as model:
        found, weights = alignment(model, TEXT)
        assert model.generate(found.source_ids, num_beams=1) == found.target_ids
    assert weights.shape == (12, 8)
    assert (len(found.target), found.source) == (12, [*TEXT.split(), "</s>"])
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert np.abs(np.diff(weights, axis=0)).max(1).min() > 1e-4  # no step sees what another one saw

    module, ids = definition(random_seq2seq_bundle), torch.tensor([found.source_ids])
    with torch.no_grad():
        keys, values, *state = module.encode(ids, torch.ones_like(ids))
        given = [torch.ones_like(ids), keys, values]
        best, expected = steps_of(module, given, state, [START, *found.target_ids[:-1]])
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert best == found.target_ids


def test_the_page_has_a_square_for_each_weight(random_seq2seq_bundle: Path) -> None:
    bundle = Bundle(random_seq2seq_bundle)
    with Seq2Seq(bundle) as model:
        found, weights = alignment(model, TEXT)
    page = Page(str(draw_alignments(bundle, [TEXT])))
    assert page.titles == [
        f"{found.target[t]} looks at {found.source[s]}: {weights[t, s]:.3f}" for t, s in np.argwhere(weights >= 0.004)
    ]
    assert f"{TEXT} becomes {found.answer}. Rows are the tokens of the output" in "".join(page.text)


def test_examples_are_whole_sentences_that_fit(random_seq2seq_bundle: Path) -> None:
    text = "".join(Page(str(draw_alignments(Bundle(random_seq2seq_bundle), []))).text)
    for sentence in ("Mr. Bennet replied that he had not.", "Mr. Bennet made no answer."):
        assert f"{sentence} becomes " in text


def test_without_attention_there_is_source_and_output(random_fixed_bundle: Path) -> None:
    """Nothing is drawn, so that any text that the bundle takes will do."""
    texts = [TEXT, "water " * 78 + "paris", f"<b>{EVIL}"]
    html = str(draw_alignments(Bundle(random_fixed_bundle), texts))
    page = Page(html)
    with Seq2Seq(Bundle(random_fixed_bundle)) as model:
        answers = model.translate(texts, num_beams=1)
        graph = model.backend("decoder").graph
        with pytest.raises(
            BundleError, match="graph 'decoder' has no output cross_attentions; export the bundle again"
        ):
            weights_along(model, {"input_ids": np.array([[5, 2]])}, [5])
    size = next(tensor.shape[1] for tensor in graph.inputs if tensor.name == "context")
    assert f"its decoder reads one vector of {size} numbers" in "".join(page.text)
    rows = page.table("What the decoder reads of the source")[1:]
    assert [row[1] for row in rows] == answers
    assert (rows[0][0], rows[1][0][-1], rows[2][0]) == (TEXT, "…", "<b><script>\"'&U+202E")
    assert "<svg" not in html
    assert "<script" not in html


def test_each_date_of_a_list_is_read_where_it_is_written(once: Once) -> None:
    """The reference model: the letters of an ISO date look at its own source, the last two of a year at themselves."""
    folder = once("lists-of-dates", lambda folder: export_to(folder, reference("seq2seq"))) / "bundle"
    first, second = "22 Oct 1977", "06/06/2051"
    with Seq2Seq(Bundle(folder)) as model:
        found, weights = alignment(model, f"{first}; {second}")
    assert found.answer == "1977-10-22 2051-06-06"
    assert found.source[8:11] == ["9", "7", "7"]
    assert weights[:10, : len(first)].sum(1).min() > 0.9
    assert weights[11:21, len(first) + 2 :].sum(1).min() > 0.7
    assert [int(row.argmax()) for row in weights[[2, 3, 8, 9, 13, 14]]] == [9, 10, 0, 1, 21, 22]  # 77, 22, 51


def test_an_answer_too_long_to_be_read(once: Once) -> None:
    folder = once("random-seq2seq-65", lambda folder: export_recurrent(folder, "seq2seq", new_tokens=65))
    with pytest.raises(InputError, match="is answered with 65 tokens; attention over at most 64 is drawn"):
        draw_alignments(Bundle(folder / "bundle"), [TEXT])


# Show, Attend and Tell
def pixels_of(model: ShowAttendTell, image: Any) -> NDArray[np.float32]:
    (pixels,) = model.preprocess()([image])
    return pixels


def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (20, 12, 3), dtype=np.uint8)


def test_a_captions_attention_is_that_of_the_definition(random_captioner_bundle: Path) -> None:
    """Twelve words over the sixty places of a grid of ten rows and six columns."""
    with ShowAttendTell(Bundle(random_captioner_bundle)) as model:
        pixels = pixels_of(model, picture())
        found = caption_of(model, pixels)
        ids = model.generate(pixels, num_beams=1)
        assert model.caption(picture(), num_beams=1) == found.text
        assert [model.target_tokenizer().token_id(token) for token in found.tokens] == ids
    assert found.weights.shape == (12, 60)
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-5)
    module = definition(random_captioner_bundle)
    with torch.no_grad():
        keys, values, *state = module.encode(torch.from_numpy(pixels[None]))
        best, expected = steps_of(module, [keys, values], state, [START, *ids[:-1]])
    np.testing.assert_allclose(found.weights, expected, atol=1e-5)
    assert best == ids


def test_the_name_of_a_digit_looks_at_its_scan(captions_bundle: Path) -> None:
    """The reference model: of a digit's 4 to 9 of 64 places, each of 16 pixels, while its name is written."""
    scans, compositions = heldout_compositions()
    composition = compositions[246]
    with ShowAttendTell(Bundle(captions_bundle)) as model:
        found = caption_of(model, pixels_of(model, composition.draw(scans)))
    assert found.tokens == ["a", "seven", "above", "a", "three", "</s>"]
    for word, (_, row, column) in zip((1, 4), composition.places, strict=True):
        places = found.weights[word].reshape(8, 8)
        assert places[row // 4 : -(-(row + 8) // 4), column // 4 : -(-(column + 8) // 4)].sum() > 0.8


def test_each_word_has_the_image_under_its_attention(random_captioner_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    bundle = Bundle(random_captioner_bundle)
    with ShowAttendTell(bundle) as model:
        found = caption_of(model, pixels_of(model, str(path)))
    html = str(draw_captions(bundle, [str(path), str(path)]))
    page = Page(html)
    assert (html.count('<image id="seen-1" href="data:image/png;'), html.count('<use href="#seen-1"/>')) == (1, 12)
    assert (html.count('<image id="seen-2" href="data:image/png;'), html.count('<use href="#seen-2"/>')) == (1, 12)
    shown = re.findall(r"<small><b>(.*?)</b> ([\d.]+)</small>", html)
    assert shown == 2 * [(t, f"{w.max():.2f}") for t, w in zip(found.tokens, found.weights, strict=True)]
    drawn = re.findall(r'aria-label="attention at (\w+)">(.*?)</svg>', html)[:12]
    for (token, svg), shares in zip(drawn, found.weights, strict=True):
        row, column = divmod(int(shares.argmax()), 6)
        assert token in found.tokens
        assert f"M{column} {row}h" in re.findall(r'fill-opacity="0.83" d="(.*?)"', svg)[0]  # the largest weight
    assert found.text in "".join(page.text)
    assert "all 60 together, 10 rows of 6, add up to 1" in "".join(page.text)


def test_a_tint_by_pencil() -> None:
    """Opacity 0.8 times the share of the largest weight, in twelfths: 0.8 -> 10, 0.4 -> 5, 0.2 -> 2, and nothing."""
    svg = tint(np.array([[0.5, 0.25], [0.125, 0.0]], np.float32))
    assert re.findall(r'<path class="warm" fill-opacity="([\d.]+)" d="([^"]*)"/>', svg) == [
        ("0.17", "M0 1h1v1h-1z"),
        ("0.42", "M1 0h1v1h-1z"),
        ("0.83", "M0 0h1v1h-1z"),
    ]
    assert tint(np.zeros((1, 1), np.float32)) == ""


def test_a_grid_by_pencil() -> None:
    assert grid_of(224, 224, 196) == (14, 14)
    assert grid_of(20, 12, 60) == (10, 6)
    assert grid_of(8, 24, 3) == (1, 3)
    for height, width, places in ((20, 12, 7), (20, 12, 61), (20, 12, 241), (9, 25, 9)):  # the last: sides of 5
        with pytest.raises(BundleError, match=f"{places} places of an image {height}x{width}; expected squares"):
            grid_of(height, width, places)


def test_of_a_long_caption_the_first_words_are_drawn(once: Once) -> None:
    folder = once("random-captioner-40", lambda folder: export_recurrent(folder, "captioner", new_tokens=40))
    html = str(draw_captions(Bundle(folder / "bundle"), []))
    assert "The first 32 of 40 tokens." in html
    assert html.count('<use href="#seen-2"/>') == MOST_WORDS == 32  # the second of two photographs
    assert html.count("<image ") == 2


def test_without_a_tokenizer_words_are_ids(random_captioner_bundle: Path, tmp_path: Path) -> None:
    copy = changed_bundle(random_captioner_bundle, tmp_path, lambda fields: fields.pop("target_tokenizer"))
    with ShowAttendTell(Bundle(copy)) as model:
        pixels = pixels_of(model, picture())
        found = caption_of(model, pixels)
        assert found.tokens == [str(token) for token in model.generate(pixels)]
    assert found.text == " ".join(found.tokens)


@pytest.mark.parametrize("kind", ["seq2seq", "captioner"])
def test_a_hostile_token_is_shown_and_not_obeyed(kind: str, once: Once, tmp_path: Path) -> None:
    """Every word of the vocabulary is markup that would break out of text and of attributes."""

    def make(folder: Path) -> None:
        export_recurrent(folder, kind)
        path = folder / "bundle" / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {
            name if name.startswith("<") else f"{EVIL}{number}": number for name, number in vocabulary.items()
        }
        path.write_text(json.dumps(tokenizer))

    folder = once(f"hostile-{kind}", make) / "bundle"
    bundle = Bundle(changed_bundle(folder, tmp_path, signed_again(folder)))
    html = str(draw_captions(bundle, []) if kind == "captioner" else draw_alignments(bundle, []))
    page = Page(html)
    assert "<script" not in html
    assert "\u202e" not in html
    assert "<script>\"'&U+202E" in "".join(page.text)


def signed_again(bundle: Path) -> Any:
    """Return the change that records the tokenizer as it is now."""
    import hashlib

    data = (bundle / "tokenizer.json").read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return lambda fields: fields["files"]["tokenizer.json"].update(entry)
