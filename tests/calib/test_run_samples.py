"""Calibration samples reach the graphs as users' inputs do: what each graph was given is written down and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from transom.calib.data import CalibrationData, Sample, open_calibration_data
from transom.calib.run_samples import check_reach, run_batch, run_sample, sample_batches
from transom.export.families.base import export_family
from transom.export.families.bert import text_row
from transom.export.families.greedy_tokens import NEW_TOKENS
from transom.export.families.transformer import translation_cases
from transom.runtime.backends import open_backend
from transom.runtime.backends.base import Array, Backend
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, CalibrationError
from transom.runtime.loading import load_with_backends
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.bert import Bert
from transom.runtime.text.batch import ROW_STEP

Call = tuple[str, dict[str, Array]]


class Recorder:
    """A backend that notes the feeds of each call, but for caches."""

    device = "cpu"

    def __init__(self, inner: Backend, calls: list[Call]) -> None:
        self.graph = inner.graph
        self._inner = inner
        self._calls = calls

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        noted = {name: array.copy() for name, array in feeds.items() if "cache" not in name}
        self._calls.append((self.graph.name, noted))
        return self._inner.run(feeds, shapes)


def recorded(folder: Path, calls: list[Call], **changed: Any) -> LoadedBundle:
    bundle = Bundle(folder)
    bundle.manifest = replace(bundle.manifest, **changed)
    opened = (open_backend(file, bundle.read, "cpu", 1) for file in bundle.manifest.graphs)
    return load_with_backends(bundle, {backend.graph.name: Recorder(backend, calls) for backend in opened})


def calls_of(folder: Path, *samples: Sample, **changed: Any) -> list[Call]:
    calls: list[Call] = []
    with recorded(folder, calls, **changed) as bundle:
        runner = export_family(bundle.manifest.family).samples
        for sample in samples:
            run_sample(bundle, sample, runner)
    return [(graph, without_padding(feeds)) for graph, feeds in calls]


def without_padding(feeds: Any) -> Any:
    """Rows are padded by fours as they are run, and padding is not counted."""
    mask = feeds.get("attention_mask")
    if mask is None or mask.shape[1] % ROW_STEP:
        return feeds
    longest, padded = int(mask.sum(1).max()), mask.shape[1]
    cut = ("input_ids", "attention_mask", "token_type_ids")
    return {name: a[:, :longest] if name in cut and a.shape[1] == padded else a for name, a in feeds.items()}


def refused(folder: Path, sample: Sample, **changed: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        calls_of(folder, sample, **changed)
    message = str(caught.value)
    assert message.startswith(sample.name)
    assert message.endswith(".")
    assert "\n" not in message
    return message


SCAN = np.arange(64, dtype=np.uint8).reshape(8, 8)
TEXT = Sample("review.txt:17", text="The city is on the water.")
IMAGE = Sample("photos/1.png", image=SCAN)


# ---- the inputs of the graphs


def test_interleaved_samples_are_for_models_that_read_them(bert_bundle: Path) -> None:
    """Their texts alone would be other inputs than the user gave."""
    message = refused(bert_bundle, Sample("a.jsonl:1", parts=("a", "b")))
    assert "holds parts in their order and a text: samples that don't fit the graph. This bert takes texts" in message


def test_bert_reads_one_text_without_padding_and_cut_to_its_length(bert_bundle: Path) -> None:
    calls = calls_of(bert_bundle, TEXT, Sample("b", text="water " * 500), Sample("c", text="a", text_pair="b"))
    assert [name for name, _ in calls] == ["model"] * 3
    shapes = [feeds["input_ids"].shape for _, feeds in calls]
    assert shapes[0] == (1, 9)  # [CLS], seven tokens, [SEP]
    assert shapes[1] == (1, 67)
    assert shapes[2] == (1, 5)
    assert all(feeds["attention_mask"].all() for _, feeds in calls)
    assert calls[2][1]["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]


def test_a_masked_language_model_gets_gaps(exported: Any) -> None:
    _, bundle = exported("BertForMaskedLM")
    with recorded(bundle, []) as loaded:
        mask = loaded.manifest.tokenizer["mask_id"] if loaded.manifest.tokenizer else None
    ids = calls_of(bundle, Sample("a", text="the city and a word " * 4), Sample("b", text="the [MASK] and a word"))
    long, own = (feeds["input_ids"][0] for _, feeds in ids)
    assert np.flatnonzero(long == mask).tolist() == [4, 11, 18]  # position 0 is [CLS]
    assert np.flatnonzero(own == mask).tolist() == [2]


@pytest.mark.parametrize("words", [1, 2, 3, 6, 7, 8, 40, 500])
def test_calibration_reads_the_tokens_that_the_gate_counts(exported: Any, words: int) -> None:
    """Texts of fewer tokens than there are between two gaps, and one that is cut."""
    folder = exported("BertForMaskedLM")[1]
    sample = Sample("a", text="water " * words)
    with recorded(folder, []) as bert:
        row = text_row(cast(Bert, bert), sample)
        assert row.counted.any()
        calibrated = [feeds["input_ids"][0] for _, feeds in calls_of(folder, sample)]
        assert [ids.tolist() for ids in calibrated] == [row.feeds["input_ids"].tolist()]


def test_calibration_translates_the_sources_of_the_gate(dates_bundle: Path) -> None:
    """One that is too long loses tokens before its last, which closes it."""
    sample = Sample("a", text="3 May 1979 " * 200)
    (source,) = (feeds["input_ids"][0] for name, feeds in calls_of(dates_bundle, sample) if name == "encoder")
    asked: list[Any] = []
    with recorded(dates_bundle, []) as transformer:
        fp32 = cast(Any, transformer)
        generate = fp32.generate
        fp32.generate = lambda rows, **options: asked.extend(rows) or generate(rows, **options)
        translation_cases(fp32, [sample], 9)
        assert len(source) == fp32.max_size("S")
        assert source[-1] == fp32.tokenizer().encode(["3 May 1979"], truncate=False).rows[0].ids[-1]
    assert asked == [source.tolist()]


def test_the_features_of_a_text_are_read_behind_the_prompt(bert_bundle: Path) -> None:
    plain, prompted, pair = (
        calls_of(bert_bundle, sample, options={**Bundle(bert_bundle).manifest.options, "prompt": prompt})
        for sample, prompt in ((TEXT, ""), (TEXT, "of: "), (replace(TEXT, text_pair="a"), "of: "))
    )
    lengths = [calls[0][1]["input_ids"].shape[1] for calls in (plain, prompted, pair)]
    assert lengths == [9, 11, 11]


def test_vit_sees_an_image_and_passes_over_its_caption(vit_bundle: Path) -> None:
    alone, captioned = calls_of(vit_bundle, IMAGE, replace(IMAGE, text="sixty-four greys"))
    assert alone[1]["pixel_values"].shape == (1, 3, 8, 8)
    np.testing.assert_allclose(alone[1]["pixel_values"][0, 1], SCAN / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(alone[1]["pixel_values"], captioned[1]["pixel_values"])


def test_clip_sees_both(clip_bundle: Path) -> None:
    calls = calls_of(clip_bundle, IMAGE, replace(TEXT, text="seven " * 100), replace(IMAGE, text="seven"))
    assert [name for name, _ in calls] == ["image", "text", "image", "text"]
    assert calls[1][1]["input_ids"].shape == (1, 48)


def test_gpt_reads_one_context_at_most(gpt_bundle: Path) -> None:
    calls = calls_of(gpt_bundle, Sample("a", text="\n" + "It is a truth. " * 500))
    read = np.concatenate([feeds["input_ids"] for _, feeds in calls], axis=1)
    assert read.shape == (1, 256)
    (name, feeds), *more = calls_of(gpt_bundle, Sample("b", text="\n"))
    assert (name, feeds["input_ids"].shape, more) == ("decoder", (1, 1), [])


def test_the_transformer_translates_greedily_and_not_without_end(dates_bundle: Path) -> None:
    calls = calls_of(dates_bundle, Sample("a", text="3 May 1979"))
    assert [name for name, _ in calls] == ["encoder"] + ["decoder"] * (len("1979-05-03") + 1)
    whole = calls[0][1]["input_ids"][0]
    with recorded(dates_bundle, []) as bundle:
        most = bundle.max_size("S")
    calls = calls_of(dates_bundle, Sample("b", text="3 May 1979 " * 100))
    assert calls[0][1]["input_ids"].shape == (1, most)
    assert calls[0][1]["input_ids"][0, -1] == whole[-1]  # the token that closes a source
    assert len(calls) <= 1 + NEW_TOKENS


# ---- samples that run together


def test_texts_of_equal_rows_run_together_in_the_tokens_of_one(bert_bundle: Path) -> None:
    """Of 67 tokens, as the bundle allows: five rows of twelve; what is no text alone stays alone."""
    short = [Sample(f"short {index}", text=f"The city is on the {word}.") for index, word in enumerate("abcdefg")]
    long = Sample("long", text="water " * 40)
    others = [raw(input_ids=[[1, 2, 3]]), replace(TEXT, name="both", image=SCAN), Sample("blank", text="\x07")]
    calls: list[Call] = []
    with recorded(bert_bundle, calls) as bundle:
        runner = export_family("bert").samples
        batches = [*sample_batches(bundle, [*others, *short[:2], long, *short[2:]], runner)]
        most = bundle.max_size("S") // 12
        names = [[sample.name for sample in batch] for batch in batches]
        assert names[:3] == [["ids.npz[3]"], ["both"], ["blank"]]
        assert names[3:] == [["long"], [each.name for each in short[:most]], [each.name for each in short[most:]]]
        run_batch(bundle, short[:most], runner)
    ((_, feeds),) = calls
    assert feeds["input_ids"].shape == (most, 12)
    alone = [feeds["input_ids"][0].tolist() for _, feeds in calls_of(bert_bundle, *short[:most])]
    assert [row[: len(found)] for row, found in zip(feeds["input_ids"].tolist(), alone, strict=True)] == alone


def test_texts_that_run_together_get_the_gaps_of_each(exported: Any) -> None:
    folder = exported("BertForMaskedLM")[1]
    samples = [Sample(str(index), text=text) for index, text in enumerate(("the city and", "a word " * 2))]
    calls: list[Call] = []
    with recorded(folder, calls) as bundle:
        (batch,) = sample_batches(bundle, samples, export_family("bert").samples)
        run_batch(bundle, batch, export_family("bert").samples)
    ((_, feeds),) = calls
    alone = [feeds["input_ids"][0].tolist() for _, feeds in calls_of(folder, *samples)]
    assert [row[: len(found)] for row, found in zip(feeds["input_ids"].tolist(), alone, strict=True)] == alone


# ---- raw inputs


def raw(**feeds: Any) -> Sample:
    return Sample("ids.npz[3]", feeds={name: np.asarray(value) for name, value in feeds.items()})


def test_raw_inputs_go_to_the_graph_that_has_them(bert_bundle: Path, clip_bundle: Path) -> None:
    ((name, feeds),) = calls_of(bert_bundle, raw(input_ids=[[1, 2, 3]], attention_mask=[[1, 1, 0]]))
    assert (name, feeds["input_ids"].tolist()) == ("model", [[1, 2, 3]])
    pixels = np.zeros((1, 3, 8, 8), np.float32)
    assert [name for name, _ in calls_of(clip_bundle, raw(pixel_values=pixels))] == ["image"]
    assert [name for name, _ in calls_of(clip_bundle, raw(pixel_values=pixels, input_ids=[[1, 2]]))] == [
        "image",
        "text",
    ]


def test_raw_ids_of_decoders_are_read_as_texts_are(gpt_bundle: Path, dates_bundle: Path) -> None:
    ((name, feeds),) = calls_of(gpt_bundle, raw(input_ids=[[5, 6, 7, 8]], attention_mask=[[1, 1, 1, 0]]))
    assert (name, feeds["input_ids"].tolist()) == ("decoder", [[5, 6, 7]])
    calls = calls_of(dates_bundle, raw(input_ids=[[5, 6, 7]]))
    assert [name for name, _ in calls[:2]] == ["encoder", "decoder"]
    assert calls[0][1]["input_ids"].tolist() == [[5, 6, 7]]


def test_a_decoder_takes_its_own_raw_inputs(gpt_bundle: Path) -> None:
    sample = raw(input_ids=[[5, 6]], write_indices=[0], logits_positions=[[1]])
    ((name, feeds),) = calls_of(gpt_bundle, sample)
    assert (name, feeds["logits_positions"].tolist()) == ("decoder", [[1]])


# ---- samples that don't fit


@pytest.mark.parametrize(
    ("fixture", "sample", "message"),
    [
        ("vit_bundle", TEXT, "holds a text: samples that don't fit the graph. This vit takes images (or a .npz"),
        ("bert_bundle", IMAGE, "holds an image: samples that don't fit the graph. This bert takes texts (or a .npz"),
        ("clip_bundle", raw(x=[[1]]), "holds x: samples that don't fit the graph. This clip takes images (or a .npz"),
        ("gpt_bundle", IMAGE, "This gpt takes texts (or a .npz file with input_ids)."),
        ("bert_bundle", raw(input_ids=[[1, 2]], mask=[[1, 1]]), "unknown input 'mask'; this bundle takes input_ids"),
        ("bert_bundle", raw(input_ids=[1]), "input 'input_ids' has shape (1,); expected 2 axes (B, S)"),
        ("bert_bundle", raw(input_ids=[[1.5]]), "input 'input_ids' has dtype float64; expected int64"),
        ("bert_bundle", raw(input_ids=[[10**6]]), "input 'input_ids' holds 1000000; expected values in 0.."),
        ("bert_bundle", Sample("a", text="\x07"), "has no tokens"),
        ("vit_bundle", raw(pixel_values=np.zeros((1, 3, 9, 8), np.float32)), "this axis is fixed at 8"),
        ("vit_bundle", Sample("a", image=SCAN[:0]), "an image is an array of uint8 (0, 8)"),
        ("gpt_bundle", raw(input_ids=[5]), "input_ids is int64 (1,) for one sample, attention_mask (1,); expected"),
        ("gpt_bundle", raw(input_ids=[[5.0]]), "input_ids is float64 (1, 1) for one sample"),
        ("gpt_bundle", raw(input_ids=[[5, 10**6]]), "a prompt holds the id 1000000; expected 0..1023"),
        ("gpt_bundle", raw(input_ids=[[5]], attention_mask=[[0]]), "a prompt is empty"),
        ("gpt_bundle", raw(input_ids=[[5]], attention_mask=[[1, 1]]), "attention_mask (1, 2); expected integers"),
        ("gpt_bundle", replace(TEXT, text_pair="b"), "it has a text_pair, and only BERT takes pairs"),
        ("dates_bundle", replace(TEXT, text_pair="b"), "it has a text_pair, and only BERT takes pairs"),
        ("clip_bundle", replace(TEXT, text_pair="b"), "it has a text_pair, and only BERT takes pairs"),
    ],
)
def test_a_sample_that_does_not_fit(fixture: str, sample: Sample, message: str, request: pytest.FixtureRequest) -> None:
    assert message in refused(request.getfixturevalue(fixture), sample)


def test_a_damaged_image_is_named(vit_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    sample = Sample("photos/torn.png", image=tmp_path / "torn.png")
    assert "cannot be decoded: it is damaged or cut short" in refused(vit_bundle, sample)


@pytest.mark.parametrize("fixture", ["bert_bundle", "gpt_bundle", "clip_bundle"])
def test_texts_need_a_tokenizer(fixture: str, request: pytest.FixtureRequest) -> None:
    message = refused(request.getfixturevalue(fixture), TEXT, tokenizer=None)
    assert "has no tokenizer, since its checkpoint had none. Give a .npz file with input_ids." in message


def test_images_need_preprocessing(vit_bundle: Path) -> None:
    message = refused(vit_bundle, IMAGE, preprocess=None)
    assert "has no image preprocessing, since its checkpoint had none. Give a .npz file with pixel_values." in message


def test_other_errors_and_ctrl_c_pass_through(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyboardInterrupt(), BackendError("gone."), CalibrationError("NaN in layer 3.")):

        def fail(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(Recorder, "run", fail)
        with pytest.raises(type(error)) as caught:
            calls_of(vit_bundle, IMAGE)
        assert caught.value is error


# ---- before the first sample


def data_of(tmp_path: Path, *lines: Any) -> CalibrationData:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return open_calibration_data([str(path)])


def test_clip_needs_texts_and_images(tmp_path: Path) -> None:
    check = partial(check_reach, "clip", export_family("clip").samples, tokenizer=True, preprocess=True)
    check(open_calibration_data(["digit-captions"]))
    check(open_calibration_data(["digits", "dates"]))
    with pytest.raises(
        CalibrationError,
        match=r"^digits holds an image, which never reach the graph 'text' of this clip: it takes texts",
    ):
        check(open_calibration_data(["digits"]))
    with pytest.raises(CalibrationError, match=r"never reach the graph 'image' of this clip: it takes images"):
        check(data_of(tmp_path, *({"text": f"{n}"} for n in range(9))))


def test_a_sample_of_another_kind_is_found_before_anything_runs() -> None:
    with pytest.raises(CalibrationError, match=r"^dates\[0\] holds a text: samples that don't fit the graph"):
        check_reach(
            "vit",
            export_family("vit").samples,
            open_calibration_data(["digits", "dates"]),
            tokenizer=False,
            preprocess=True,
        )
    with pytest.raises(CalibrationError, match=r"but this bert has no tokenizer, .* Give a \.npz file with input_ids"):
        check_reach(
            "bert", export_family("bert").samples, open_calibration_data(["dates"]), tokenizer=False, preprocess=False
        )


def test_arrays_that_no_graph_takes_are_found_before_anything_runs(tmp_path: Path) -> None:
    np.savez(tmp_path / "raw.npz", tokens=np.arange(24).reshape(8, 3), scale=np.arange(8))
    data = open_calibration_data([str(tmp_path / "raw.npz")])
    with pytest.raises(
        CalibrationError,
        match=r"^raw\.npz\[0\] holds scale and tokens: samples .* takes texts \(or a \.npz file with input_ids",
    ):
        check_reach("gpt", export_family("gpt").samples, data, tokenizer=True, preprocess=False)
    with pytest.raises(CalibrationError, match=r"takes images \(or a \.npz file with pixel_values\) and texts"):
        check_reach("clip", export_family("clip").samples, data, tokenizer=True, preprocess=True)


def test_each_reference_model_takes_its_own_set(
    vit_bundle: Path,
    gpt_bundle: Path,
    dates_bundle: Path,
    lists_bundle: Path,
    clip_bundle: Path,
    captions_bundle: Path,
) -> None:
    own = {"digits": vit_bundle, "austen": gpt_bundle, "dates": dates_bundle, "digit-captions": clip_bundle}
    own |= {"date-lists": lists_bundle, "digit-compositions": captions_bundle}
    for name, folder in own.items():
        data = open_calibration_data([name])
        calls: list[Call] = []
        with recorded(folder, calls) as bundle:
            manifest = bundle.manifest
            runner = export_family(manifest.family).samples
            there = {"tokenizer": manifest.tokenizer is not None, "preprocess": manifest.preprocess is not None}
            check_reach(manifest.family, runner, data, **there)
            for sample in data.samples[:8]:
                run_sample(bundle, sample, runner)
            assert {graph for graph, _ in calls} == {file.graph.name for file in bundle.manifest.graphs}
