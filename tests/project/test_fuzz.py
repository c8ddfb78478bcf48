"""Damaged files of every kind: what comes out is a loaded thing or one of our errors, soon, and in little memory.

A few hundred examples each, always the same ones; ``benchmarks/fuzz_manifests.py`` is the long run.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import as_quantized
from conftest import save_checkpoint
from diskless_bundles import MARIAN, load_manifest, slim
from json_mutations import mutated
from transom.cli.arrays import read_arrays
from transom.cli.describe import gate_line, quantization_fields
from transom.runtime import load
from transom.runtime.errors import BundleError, CheckpointError, InputError, TransomError
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.manifest import MANIFEST, manifest_sha256
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_spec import TokenizerSpec

resource = pytest.importorskip("resource")  # of POSIX

MOST_SECONDS = 60.0  # of one example; they take milliseconds, and a busy machine may stop for a while
MOST_MIB = 300  # by which all the examples of a test may raise the peak of memory
ARCHITECTURES = ("BertForMaskedLM", "ViTForImageClassification", "GPT2LMHeadModel", "MarianMTModel", "CLIPModel")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def examples(count: int) -> Callable[..., Any]:
    """``count`` examples, the same in every run."""
    fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=fixtures)


SEEDS = st.integers(0, 2**32).map(Random)


@contextmanager
def nothing_but(*expected: type[TransomError]) -> Iterator[None]:
    """Let these errors pass, told in one line; any other exception fails the test, and so does a long wait."""
    begun = time.monotonic()
    with suppress(*expected):
        try:
            yield
        except TransomError as error:
            if "\n" in str(error):
                pytest.fail(f"more than one line: {error}")
            raise
    assert time.monotonic() - begun < MOST_SECONDS


@pytest.fixture(scope="module")
def manifests(
    bert_bundle: Path, vit_bundle: Path, gpt_bundle: Path, dates_bundle: Path, clip_bundle: Path
) -> list[dict[str, Any]]:
    """One of each family, and one that says it is quantised."""
    bundles = (bert_bundle, vit_bundle, gpt_bundle, dates_bundle, clip_bundle, clip_bundle)
    found = [slim(json.loads((bundle / MANIFEST).read_text())) for bundle in bundles]
    as_quantized(found[-1], "dynamic")
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of each family, to be damaged."""
    folders = [tmp_path_factory.mktemp(name) for name in ARCHITECTURES]
    return [save_checkpoint(folder, name) for folder, name in zip(folders, ARCHITECTURES, strict=True)]


@pytest.fixture(autouse=True, scope="module")
def in_little_memory(manifests: Any, checkpoints: Any) -> Iterator[None]:
    """Beside what the making of bundles and checkpoints took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MIB * 1024


def signed(words: Any) -> bytes:
    if isinstance(words, dict):
        words = {**words, "manifest_sha256": manifest_sha256(words)}
    return json.dumps(words).encode()


def test_whole_manifests_are_accepted(manifests: list[dict[str, Any]]) -> None:
    assert [load_manifest(signed(words)).manifest.family for words in manifests] == [
        "bert", "vit", "gpt", "transformer", "clip", "clip",
    ]  # fmt: skip


@examples(600)
@given(rng=SEEDS)
def test_damaged_manifests(manifests: list[dict[str, Any]], rng: Random) -> None:
    words = mutated(rng.choice(manifests), rng, manifests)
    if isinstance(words, dict):
        words |= {"format": "transom-bundle", "format_version": 1}
    with nothing_but(BundleError):
        load_manifest(signed(words))


@examples(200)
@given(rng=SEEDS)
def test_damaged_figures_of_a_quantisation_can_be_shown(manifests: list[dict[str, Any]], rng: Random) -> None:
    """A reader takes for granted what it checked, and ``inspect`` nothing else."""
    words = manifests[-1] | {"quantization": mutated(manifests[-1]["quantization"], rng, manifests)}
    with nothing_but(BundleError):
        quantization = load_manifest(signed(words)).manifest.quantization
        assert all(isinstance(text, str) for pair in quantization_fields(quantization) for text in pair)
        assert gate_line(quantization).startswith("accuracy gate: ")


@examples(150)
@given(value=JSON, key=st.integers(0, 40))
def test_any_json_in_a_manifest_or_as_one(manifests: list[dict[str, Any]], value: Any, key: int) -> None:
    words = dict(manifests[key % len(manifests)])
    words[list(words)[key % len(words)]] = value
    for made in (words, value):
        with nothing_but(BundleError):
            load_manifest(signed(made))


@examples(150)
@given(data=st.binary(max_size=60), at=st.floats(0, 1))
def test_any_bytes_in_a_manifest(manifests: list[dict[str, Any]], data: bytes, at: float) -> None:
    whole = signed(manifests[0])
    start = int(at * len(whole))
    for made in (data, whole[:start] + data + whole[start + len(data) :]):
        with nothing_but(BundleError):
            load_manifest(made)


def use(encoder: TextTokenizer) -> None:
    """Ask for everything that a tokenizer is asked for; each call may refuse."""
    text = "Hello, world! 3 May 1979 é 中 ☃ \ufffd [MASK] <|endoftext|>"
    for call in (
        lambda: encoder.encode([text], truncate=True),
        lambda: encoder.encode([text], [text], truncate=True),
        lambda: encoder.decode([*range(30), 10**6]),
        lambda: [stream.add(number) for stream in [encoder.detokenizer()] for number in range(30)],
    ):
        with nothing_but(BundleError, InputError):
            call()


STEPS: tuple[dict[str, Any], ...] = (  # parts of a tokenizer.json that real ones of ours do not have
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    {"type": "Strip", "content": "x", "start": 5, "stop": 9},
    {"type": "FixedLength", "length": 0},
    {"type": "BertProcessing", "sep": ["a", 2**31], "cls": ["b", 2]},
    {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]]},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
    {"type": "ByteFallback"},
)  # fmt: skip
PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "model")


@pytest.fixture(scope="module")
def tokenizers(bert_bundle: Path, clip_bundle: Path) -> list[dict[str, Any]]:
    """A WordPiece and a byte-level BPE."""
    return [json.loads((bundle / "tokenizer.json").read_text()) for bundle in (bert_bundle, clip_bundle)]


@examples(250)
@given(rng=SEEDS)
def test_damaged_tokenizers(tokenizers: list[dict[str, Any]], rng: Random) -> None:
    words = mutated(rng.choice(tokenizers), rng, [*tokenizers, *STEPS], most=2)
    if isinstance(words, dict) and rng.random() < 0.4:
        words[rng.choice(PARTS)] = mutated(rng.choice(STEPS), rng, most=1) if rng.random() < 0.5 else rng.choice(STEPS)
    with nothing_but(BundleError):
        use(TextTokenizer(json.dumps(words).encode(), TokenizerSpec("t.json", 64, None, 0, None, None), 64))


@examples(250)
@given(rng=SEEDS)
def test_damaged_marian_tokenizers(rng: Random) -> None:
    with nothing_but(BundleError):
        use(
            TextTokenizer(
                json.dumps(mutated(MARIAN, rng)).encode(),
                TokenizerSpec("t.json", 64, None, 0, None, None, kind="marian"),
                64,
            )
        )


PREPROCESS = {
    "resize": {"shortest_edge": 20}, "resample": "bicubic", "crop": {"height": 20, "width": 20}, "rescale": 1 / 255,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "channels": 3, "height": 20, "width": 20,
    "transparent_to_white": True,
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 20},
    "crop_size": {"height": 20, "width": 20}, "do_center_crop": True, "do_normalize": True, "do_rescale": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "rescale_factor": 1 / 255,
    "do_convert_rgb": True,
}  # fmt: skip
GENERATION = {
    "eos_token_id": [1, 2], "pad_token_id": 0, "bos_token_id": 1, "max_length": 40, "do_sample": True, "top_k": 5,
    "top_p": 0.9, "temperature": 0.7, "num_beams": 2, "bad_words_ids": [[1, 2], [3]], "forced_bos_token_id": 3,
    "suppress_tokens": [1, 2], "stop_strings": ["a", "b"], "early_stopping": "never", "length_penalty": 1.0,
    "min_length": 1, "no_repeat_ngram_size": 2, "decoder_start_token_id": 1, "min_p": 0.0,
}  # fmt: skip


@examples(250)
@given(rng=SEEDS)
def test_damaged_image_settings(rng: Random) -> None:
    image = np.zeros((17, 31, 3), np.uint8)
    with nothing_but(BundleError, InputError):
        assert ImagePreprocess.from_json(mutated(PREPROCESS, rng, most=2))([image]).ndim == 4


@examples(250)
@given(rng=SEEDS)
def test_damaged_preprocessor_config(tmp_path_factory: pytest.TempPathFactory, rng: Random) -> None:
    from transom.export.processors.image import image_preprocess_from_checkpoint

    folder = tmp_path_factory.getbasetemp()
    name, words = rng.choice([("preprocessor_config", PROCESSOR), ("processor_config", {"image_processor": PROCESSOR})])
    (folder / f"{name}.json").write_text(json.dumps(mutated(words, rng, most=3)))
    try:
        with nothing_but(CheckpointError):
            image_preprocess_from_checkpoint(folder, 20, 20)
    finally:
        (folder / f"{name}.json").unlink()


@examples(250)
@given(rng=SEEDS)
def test_damaged_generation_config(tmp_path_factory: pytest.TempPathFactory, rng: Random) -> None:
    from transom.export.processors.generation_config import generation_from_checkpoint

    path = tmp_path_factory.getbasetemp() / "generation_config.json"
    path.write_text(json.dumps(mutated(GENERATION, rng, most=3)))
    with nothing_but(CheckpointError):
        generation_from_checkpoint(path.parent, 100)


def open_source(folder: Path) -> None:
    from transom.export.checkpoint import load_checkpoint

    load_checkpoint(str(folder), task=None, max_sizes={}, image_size=None, ignore_unused=False)


@contextmanager
def with_bytes(path: Path, data: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@examples(80)
@given(rng=SEEDS)
def test_damaged_config(checkpoints: list[Path], rng: Random) -> None:
    folder = rng.choice(checkpoints)
    words = mutated(json.loads((folder / "config.json").read_text()), rng, most=2)
    with with_bytes(folder / "config.json", json.dumps(words).encode()), nothing_but(CheckpointError):
        open_source(folder)


def damaged_safetensors(data: bytes, rng: Random) -> bytes:
    """Cut short, with other bytes in its header, or with another header that is well-formed."""
    size = int.from_bytes(data[:8], "little")
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(8 + size)] = rng.randrange(256)
        return bytes(changed)
    header = json.dumps(mutated(json.loads(data[8 : 8 + size]), rng, most=2)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@examples(80)
@given(rng=SEEDS)
def test_damaged_safetensors_of_a_checkpoint(checkpoints: list[Path], rng: Random) -> None:
    path = rng.choice(checkpoints) / "model.safetensors"
    with with_bytes(path, damaged_safetensors(path.read_bytes(), rng)), nothing_but(CheckpointError):
        open_source(path.parent)


@pytest.fixture(scope="module")
def bundle(bert_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bert_bundle, tmp_path_factory.mktemp("fuzz") / "bundle"))


@examples(40)
@given(rng=SEEDS)
def test_damaged_golden_values(bundle: Path, rng: Random) -> None:
    """Signed as an attacker would: ``selftest`` reads them, and tells what is wrong."""
    from hashlib import sha256

    from transom.runtime.selftest import selftest

    data = damaged_safetensors((bundle / "golden.safetensors").read_bytes(), rng)
    words = json.loads((bundle / MANIFEST).read_text())
    words["files"]["golden.safetensors"] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    with (
        with_bytes(bundle / "golden.safetensors", data),
        with_bytes(bundle / MANIFEST, signed(words)),
        nothing_but(TransomError),
    ):
        selftest(bundle, threads=1)


@pytest.fixture(scope="module")
def bert(bert_bundle: Path) -> Iterator[Any]:
    with load(bert_bundle, threads=1) as loaded:
        yield loaded


DTYPES = (
    "int64",
    "int32",
    "float32",
    "float64",
    "bool",
    "uint8",
    "complex64",
    "<U3",
    ">i8",
    "datetime64[s]",
    "O",
    "V4",
)


def odd_array(rng: Random) -> Any:
    shape = [rng.choice([0, 1, 1, 2, 3, 7, 70]) for _ in range(rng.choice([0, 1, 2, 2, 2, 3]))]
    made = np.zeros(shape, rng.choice(DTYPES))
    if made.dtype == np.int64 and made.size:
        made.flat[0] = rng.choice([0, 1, -1, 5, 2**31, 2**62, -(2**63)])
    if made.dtype == np.float32 and made.size:
        made.flat[0] = rng.choice([np.nan, np.inf, 3e38, -0.0])
    return made


NAMES = ("input_ids", "attention_mask", "token_type_ids", "input_ids", "stranger", "", "a/b")


@examples(200)
@given(rng=SEEDS)
def test_odd_arrays_of_a_raw_run(bert: Any, rng: Random, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What ``transom run BUNDLE inputs.npz`` does with any file of that name."""
    arrays = {name or "x": odd_array(rng) for name in rng.sample(NAMES, rng.randint(0, 4))}
    if rng.random() < 0.5:
        arrays["input_ids"] = np.ones((rng.randint(1, 3), rng.randint(1, 8)), np.int64)
    made = io.BytesIO()
    np.savez(made, **arrays)
    data = bytearray(made.getvalue())
    if rng.random() < 0.4:
        data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data
        for _ in range(rng.randint(0, 5)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    path = tmp_path_factory.getbasetemp() / "odd.npz"
    path.write_bytes(data)
    with nothing_but(InputError):
        bert.run(read_arrays(path))
