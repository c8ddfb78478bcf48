"""Quantised exports of what cannot be quantised: one error that says what to do, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from command_line import transom
from transom.calib.table import RANGES
from transom.export.pipeline import export
from transom.export.quantization.options import QuantizeOptions
from transom.runtime.errors import CalibrationError, ExportError
from transom.runtime.manifest import MANIFEST

TEXTS = [f"{subject} {verb}" for subject in ("the people", "a city", "paris", "who", "she") for verb in ("see", "go")]


def texts(folder: Path, count: int = 10) -> str:
    path = folder / "texts.txt"
    path.write_text("\n".join(TEXTS[:count]))
    return str(path)


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "raw.npz", **arrays)
    return str(folder / "raw.npz")


def pixels(count: int) -> NDArray[np.float32]:
    """Different images, as the reference ViT takes them: smooth, for noise is refused."""
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).cumsum(3).astype(np.float32)


def refused(source: Path | str, out: Path, kind: type[ExportError] = CalibrationError, **options: Any) -> str:
    """What the one error says; nothing is left at ``out``, or beside it."""
    precision, before = options.pop("precision", "int8"), sorted(out.parent.iterdir())
    with pytest.raises(kind) as raised:
        export(str(source), out, precision=precision, quantize=QuantizeOptions(**options))
    message = str(raised.value)
    assert "\n" not in message
    assert sorted(out.parent.iterdir()) == before
    return message


@pytest.mark.usefixtures("traced_once")
def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    """None, too few, random, of another kind, not there."""
    empty, nothing = tmp_path / "empty.txt", tmp_path / "nothing"
    empty.write_text("\n \n")
    nothing.mkdir()
    for given, message in {
        str(empty): "empty.txt",
        str(nothing): "nothing",
        "random": "random inputs have ranges that no real input has",
        str(tmp_path / "absent.txt"): "is not there; expected one of austen, digits,",
        texts(tmp_path): "samples that don't fit the graph. This vit takes images",
        "austen": "samples that don't fit the graph. This vit takes images",
    }.items():
        assert message in refused("vit", tmp_path / "out", calibration_data=(given,)), given
    for count in (1, 7):
        few = refused("vit", tmp_path / "out", calibration_data=(npz(tmp_path, pixel_values=pixels(count)),))
        assert f"raw.npz holds {count} distinct sample" in few
        assert "at least 8 are needed" in few


@pytest.mark.usefixtures("traced_once")
def test_a_sample_that_is_not_finite_is_named_with_where_it_showed(tmp_path: Path) -> None:
    """The fifth of 32 images holds NaN in one pixel: it is calibrated on, or held out, and named either way."""
    images = pixels(32)
    images[4, 0, 3, 3] = np.nan
    message = refused("vit", tmp_path / "out", calibration_data=(npz(tmp_path, pixel_values=images),))
    assert "raw.npz[4]" in message
    assert "NaN" in message or "not finite" in message


@pytest.mark.usefixtures("traced_once")
def test_raw_inputs_of_another_shape_are_named(tmp_path: Path) -> None:
    images = pixels(16).reshape(16, 3, 4, 16)
    message = refused("vit", tmp_path / "out", calibration_data=(npz(tmp_path, pixel_values=images),))
    assert "raw.npz[" in message
    assert "(1, 3, 4, 16)" in message


@pytest.mark.usefixtures("traced_once")
def test_noise_is_refused_whatever_its_name(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    message = refused("vit", tmp_path / "out", calibration_data=(npz(tmp_path, pixel_values=noise),))
    assert "looks random to the graph 'model': neighbouring pixels have a correlation of" in message


def test_data_and_options_are_refused_before_the_checkpoint_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transom.export.pipeline.onnx_from_module", None)
    out, images = tmp_path / "out", npz(tmp_path, pixel_values=pixels(16))
    assert "no file that is there" not in refused("vit", out, calibration_data=("austen",))
    assert "a text: samples that don't fit the graph" in refused("vit", out, calibration_data=(images, "dates"))
    assert "never reach the graph 'text'" in refused("clip", out, calibration_data=("digits",))
    assert "--weight-bits is 5" in refused("vit", out, ExportError, weight_bits=5)
    assert "cannot be read" in refused("vit", out, ranges=tmp_path / "absent.json")


def test_a_model_that_is_no_reference_needs_data(bert_checkpoint: Path, tmp_path: Path) -> None:
    message = refused(bert_checkpoint, tmp_path / "out", ExportError)
    assert f"quantising {bert_checkpoint} needs inputs like those it will see" in message
    assert "Name some with --calibration-data: a .txt or .jsonl of texts, a folder of images, a .npz" in message


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_options_of_quantisation_need_a_quantised_precision(
    bert_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    for options in (
        {"method": "minmax"},
        {"gate": False},
        {"calibration_data": ("austen",)},
        {"weight_bits": 7},
        {"weight_bits": 8},  # the default, but said
        {"block_size": 32},
    ):
        message = refused(bert_checkpoint, tmp_path / "out", ExportError, precision=precision, **options)
        assert f"--precision is {precision}, which is not quantised" in message


@pytest.mark.usefixtures("traced_once")
def test_combinations_that_mean_nothing(tmp_path: Path) -> None:
    message = refused("vit", tmp_path / "out", ExportError, precision="int4", activations="static")
    assert "--precision int4 is of weights alone" in message
    message = refused("vit", tmp_path / "out", ExportError, activations="dynamic", optional_sites=("attention",))
    assert "--also needs ranges fixed beforehand" in message


def with_table(bundle: Path, folder: Path, change: Callable[[Any], object]) -> Path:
    """The bundle's table of ranges, changed."""
    words = json.loads((bundle / RANGES).read_text())
    change(words)
    path = folder / "changed.json"
    path.write_text(json.dumps(words))
    return path


@pytest.mark.usefixtures("traced_once")
def test_tables_that_are_not_of_this_model(int8_bundle: Path, tmp_path: Path) -> None:
    """Another graph's, one without a range, one with factors for other channels, no table at all, and --also."""
    out = tmp_path / "out"

    def model(words: Any) -> Any:
        return words["graphs"]["model"]

    for change, expected in [
        (
            lambda words: model(words).update(sha256="0" * 64),
            "is from another graph 'model': its sha256 is 000000000000",
        ),
        (lambda words: words["graphs"].update(decoder=words["graphs"].pop("model")), "is of decoder, this model has"),
        (lambda words: model(words)["tensors"].pop("select"), "has none of 'select' of the graph 'model'"),
        (
            lambda words: model(words)["smoothing"].update(select={"alpha": 0.5, "factors": [1.0]}),
            "by 1 factors; expected",
        ),
        (lambda words: words.update(format="notes"), "is no usable table of ranges"),
    ]:
        assert expected in refused("vit", out, ranges=with_table(int8_bundle, tmp_path, change)), expected
    for path, expected in [
        (tmp_path / "absent.json", "cannot be read"),
        (int8_bundle / MANIFEST, "no usable table"),
        (tmp_path, "is no"),
    ]:
        assert expected in refused("vit", out, ranges=path), path
    message = refused("vit", out, ranges=int8_bundle / RANGES, optional_sites=("attention",))
    assert "which is to be quantised. Leave out --also" in message


@pytest.mark.parametrize(
    ("option", "value", "listed"),
    [
        ("--method", "best", ("minmax", "percentile", "entropy", "mse")),
        ("--activations", "half", ("static", "dynamic", "none")),
        ("--also", "softmax", ("attention", "residual")),
        ("--precision", "int2", ("fp32", "fp16", "bf16", "int8", "int4")),
    ],
)
def test_unknown_words_are_a_wrong_call_that_lists_the_known_ones(
    tmp_path: Path, option: str, value: str, listed: tuple[str, ...]
) -> None:
    result = transom("export", "vit", "--out", tmp_path / "out", "--precision", "int8", option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert all(f"'{word}'" in result.stderr for word in (value, *listed))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_it_in_one_line(bert_checkpoint: Path, tmp_path: Path) -> None:
    result = transom("export", bert_checkpoint, "--out", tmp_path / "out", "--precision", "int8")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("transom.runtime.errors.ExportError: quantising ")
    result = transom("export", "vit", "--out", tmp_path / "out", "--method", "mse", "--no-gate")
    assert "--precision is fp32, which is not quantised" in result.stderr


@pytest.mark.usefixtures("traced_once")
def test_an_interrupted_quantisation_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while calibration runs the FP32 bundle, which is in memory."""
    seen: list[list[str]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("calibrating (1 of 512)"):
            seen.append([path.name for path in tmp_path.rglob("bundle.json")])
            raise KeyboardInterrupt

    out, options = tmp_path / "new" / "out", QuantizeOptions(smooth=False)
    with pytest.raises(KeyboardInterrupt):
        export("vit", out, precision="int8", quantize=options, progress=interrupt)
    assert seen == [[]]
    assert list(tmp_path.iterdir()) == []


def test_ranges_are_taken_of_fp32_alone_and_once(
    int8_bundle: Path, exported_fp16: Path, vit_bundle: Path, tmp_path: Path
) -> None:
    before = sorted(int8_bundle.iterdir())
    assert "is quantised already; ranges are taken of FP32" in last_line(transom("calibrate", int8_bundle))
    assert sorted(int8_bundle.iterdir()) == before
    assert "is in fp16; ranges are taken of FP32" in last_line(transom("calibrate", exported_fp16))
    mine = Path(shutil.copytree(vit_bundle, tmp_path / "mine"))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    expected = last_line(transom("calibrate", mine, "--calibration-data", tmp_path / "texts.txt"))
    assert "samples that don't fit the graph. This vit takes images" in expected
    assert transom("calibrate", mine, "--no-smooth-quant").exit_code == 0
    expected = last_line(transom("calibrate", mine))
    assert f"has a {RANGES}; give --force to replace it." in expected


def last_line(result: Any) -> str:
    assert (result.exit_code, result.stdout) == (1, "")
    return str(result.stderr.splitlines()[-1])


@pytest.fixture
def exported_fp16(tmp_path: Path, traced_once: None) -> Path:
    export("vit", tmp_path / "fp16", precision="fp16")
    return tmp_path / "fp16"
