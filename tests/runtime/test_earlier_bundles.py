"""Load and run the bundles that earlier versions wrote, kept in tests/bundles: their format stays readable.

No torch and no onnx: what reads these bundles is the runtime alone. tests/bundles/README.md describes them. Each runs
with ONNX Runtime; those with lists of operators run with the native kernels too, where the library is there.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from paths import TESTS
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.manifest import PRECISIONS
from transom.runtime.native import library
from transom.runtime.saturation import SaturationWarning
from transom.runtime.selftest import selftest

KEPT = TESTS / "bundles"
FAMILIES_OF = {
    "0.1.0": (
        *("bert", "clip", "electra", "gpt", "seq2seq", "show_attend_tell", "swin", "swinv2", "transformer", "vit"),
        *("flamingo", "perceiver", "vit_hybrid"),
    )
}  # of each version
BUNDLES = sorted(path.parent.relative_to(KEPT).as_posix() for path in KEPT.glob("*/*/bundle.json"))
SATURATED = "0.1.0/vit-int8-saturated"  # its golden values are of saturated sums, which nothing computes any more
LISTED = {"bert", "clip", "electra", "gpt", "transformer", "vit"}  # families whose bundles with lists are kept
WITH_LISTS = [name for name in BUNDLES if name.endswith("-native")]
MACHINE_PATH = re.compile(rb"/(?:home|root|tmp|usr|opt|var|mnt|Users)/")

# max|here - there| of the numbers in ANSWERS. FP32 differs in the order of summation; elsewhere a value between two
# representable ones may be rounded to the other one. AVX512-VNNI and AVX2 agree to 1e-4 on all of them.
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "int4": 5e-2}

# What ``answer_*`` gives of each bundle: words or tokens, exactly, and a number. As version 0.1.0 answered on
# AVX512-VNNI; with sums that saturate, it said ("bee", 0.1139) of clip-int8 and 0.9009 of vit-int8-saturated.
ANSWERS: dict[str, tuple[object, float]] = {
    "0.1.0/bert-fp32": ("mixed", 0.7176),
    "0.1.0/bert-fp16": ("mixed", 0.7174),
    "0.1.0/bert-bf16": ("mixed", 0.7274),
    "0.1.0/bert-int8": ("mixed", 0.7406),
    "0.1.0/bert-int4": ("mixed", 0.6376),
    "0.1.0/clip-fp32": ("dog", 0.2277),
    "0.1.0/clip-fp16": ("dog", 0.2287),
    "0.1.0/clip-bf16": ("dog", 0.2339),
    "0.1.0/clip-int8": ("dog", 0.2200),
    "0.1.0/clip-int4": ("dog", 0.2190),
    "0.1.0/electra-fp32": (3, 0.9644),
    "0.1.0/electra-fp16": (3, 0.9643),
    "0.1.0/electra-bf16": (3, 0.9638),
    "0.1.0/electra-int8": (3, 0.9671),
    "0.1.0/electra-int4": (3, 0.9617),
    "0.1.0/flamingo-fp32": ("nine nine", 0.1424),
    "0.1.0/flamingo-fp16": ("nine nine", 0.1435),
    "0.1.0/flamingo-bf16": ("nine nine", 0.1445),
    "0.1.0/flamingo-int8": ("nine nine", 0.1385),
    "0.1.0/flamingo-int4": ("nine nine", 0.0721),
    "0.1.0/gpt-fp32": ([14, 23, 23], 4.9423),
    "0.1.0/gpt-fp16": ([14, 23, 23], 4.9429),
    "0.1.0/gpt-bf16": ([14, 23, 23], 4.9487),
    "0.1.0/gpt-int8": ([14, 23, 23], 4.9232),
    "0.1.0/gpt-int4": ([14, 23, 23], 4.9221),
    "0.1.0/perceiver-fp32": ("good", -4.0699),
    "0.1.0/perceiver-fp16": ("good", -4.0583),
    "0.1.0/perceiver-bf16": ("good", -4.0938),
    "0.1.0/perceiver-int8": ("good", -3.9420),
    "0.1.0/perceiver-int4": ("good", -0.6349),
    "0.1.0/perceiver-fp32-bytes": ("\x0b", 0.2492),
    "0.1.0/perceiver-fp16-bytes": ("\x0b", 0.2492),
    "0.1.0/perceiver-bf16-bytes": ("\x0b", 0.2561),
    "0.1.0/perceiver-int8-bytes": ("\x0b", 0.2351),
    "0.1.0/perceiver-int4-bytes": ("\x0b", 0.2730),
    "0.1.0/seq2seq-fp32": ([21, 2], -0.5456),
    "0.1.0/seq2seq-fp16": ([21, 2], -0.5455),
    "0.1.0/seq2seq-bf16": ([21, 2], -0.5508),
    "0.1.0/seq2seq-int8": ([21, 2], -0.5443),
    "0.1.0/seq2seq-int4": ([21, 2], -0.5631),
    "0.1.0/show_attend_tell-fp32": ("him him him him", 0.7089),
    "0.1.0/show_attend_tell-fp16": ("him him him him", 0.7088),
    "0.1.0/show_attend_tell-bf16": ("him him him him", 0.7059),
    "0.1.0/show_attend_tell-int8": ("him him him him", 0.7059),
    "0.1.0/show_attend_tell-int4": ("him him him him", 0.7106),
    "0.1.0/swin-fp32": ("good", 0.7030),
    "0.1.0/swin-fp16": ("good", 0.7031),
    "0.1.0/swin-bf16": ("good", 0.7002),
    "0.1.0/swin-int8": ("good", 0.6876),
    "0.1.0/swin-int4": ("good", 0.5521),
    "0.1.0/swinv2-fp32": ("good", 0.6688),
    "0.1.0/swinv2-fp16": ("good", 0.6690),
    "0.1.0/swinv2-bf16": ("good", 0.6681),
    "0.1.0/swinv2-int8": ("good", 0.6584),
    "0.1.0/swinv2-int4": ("good", 0.6327),
    "0.1.0/transformer-fp32": ([6, 6, 6, 0], -1.5996),
    "0.1.0/transformer-fp16": ([6, 6, 6, 0], -1.6006),
    "0.1.0/transformer-bf16": ([6, 6, 6, 0], -1.6094),
    "0.1.0/transformer-int8": ([6, 6, 6, 0], -1.6020),
    "0.1.0/transformer-int4": ([6, 6, 6, 0], -1.4584),
    "0.1.0/vit-fp32": ("mixed", 0.7976),
    "0.1.0/vit-fp16": ("mixed", 0.7973),
    "0.1.0/vit-bf16": ("mixed", 0.7962),
    "0.1.0/vit-int8": ("mixed", 0.7934),
    "0.1.0/vit-int4": ("mixed", 0.7951),
    "0.1.0/vit-int8-exact": ("0", 0.9130),
    "0.1.0/vit-int8-saturated": ("0", 0.9130),
    "0.1.0/vit-int8-7bits": ("0", 0.9120),
    "0.1.0/vit_hybrid-fp32": ("bad", 0.4012),
    "0.1.0/vit_hybrid-fp16": ("bad", 0.4013),
    "0.1.0/vit_hybrid-bf16": ("bad", 0.4017),
    "0.1.0/vit_hybrid-int8": ("bad", 0.4011),
    "0.1.0/vit_hybrid-int4": ("bad", 0.3989),
    # made since their CPU files hold operators of com.microsoft
    "0.1.0/bert-int8-fused": ("mixed", 0.7406),
    "0.1.0/clip-int8-fused": ("dog", 0.2200),
    "0.1.0/flamingo-int8-fused": ("nine nine", 0.1385),
    "0.1.0/gpt-int4-fused": ([14, 23, 23], 4.9221),
    "0.1.0/gpt-int8-fused": ([14, 23, 23], 4.9232),
    "0.1.0/perceiver-int8-bytes-fused": ("\x0b", 0.2351),
    "0.1.0/swin-int8-fused": ("good", 0.6876),
    "0.1.0/transformer-int4-fused": ([6, 6, 6, 0], -1.4584),
    "0.1.0/transformer-int8-fused": ([6, 6, 6, 0], -1.6020),
    # made since exports write lists of operators
    "0.1.0/bert-fp32-native": ("mixed", 0.7176),
    "0.1.0/bert-fp16-native": ("mixed", 0.7174),
    "0.1.0/bert-int8-native": ("mixed", 0.7406),
    "0.1.0/clip-fp32-native": ("dog", 0.2277),
    "0.1.0/clip-fp16-native": ("dog", 0.2287),
    "0.1.0/clip-int8-native": ("dog", 0.2200),
    "0.1.0/electra-fp32-native": (3, 0.9644),
    "0.1.0/electra-fp16-native": (3, 0.9643),
    "0.1.0/electra-int8-native": (3, 0.9671),
    "0.1.0/gpt-fp32-native": ([14, 23, 23], 4.9423),
    "0.1.0/gpt-fp16-native": ([14, 23, 23], 4.9429),
    "0.1.0/gpt-int8-native": ([14, 23, 23], 4.9232),
    "0.1.0/transformer-fp32-native": ([6, 6, 6, 0], -1.5996),
    "0.1.0/transformer-fp16-native": ([6, 6, 6, 0], -1.6006),
    "0.1.0/transformer-int8-native": ([6, 6, 6, 0], -1.6020),
    "0.1.0/vit-fp32-native": ("mixed", 0.7976),
    "0.1.0/vit-fp16-native": ("mixed", 0.7973),
    "0.1.0/vit-int8-native": ("mixed", 0.7934),
}

DIGIT = ("005d9100", "00dfaf50", "03f20b80", "04c00880", "05800980", "04b01c70", "02e5ac00", "006da000")  # a zero, / 16
PATTERN = (np.arange(8 * 8 * 3) * 7 % 256).astype(np.uint8).reshape(8, 8, 3)


def scan() -> Any:
    """Return the first of scikit-learn's digits, uint8 (8, 8, 3)."""
    grey = np.array([[16 * int(value, 16) for value in row] for row in DIGIT], np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def answer_bert(bert: Any) -> tuple[object, float]:
    """Classify a text: its label and the probability."""
    ((label, probability),) = bert.classify("paris is blue", top_k=1)
    return label, probability


def answer_clip(clip: Any) -> tuple[object, float]:
    """Compare an image with five texts: the nearest, and its cosine."""
    words = ["cat", "dog", "owl", "fox", "bee"]
    cosines = clip.embed_text(words) @ clip.embed_image(PATTERN)
    ((nearest, _),) = clip.zero_shot(PATTERN, words, top_k=1)
    return nearest, float(cosines.max())


def answer_electra(electra: Any) -> tuple[object, float]:
    """Label the tokens of a text: the number of replaced ones, and the first one's probability."""
    found = electra.tag("paris is blue")
    return sum(token.label == "replaced" for token in found), float(found[0].probability)


def answer_flamingo(flamingo: Any) -> tuple[object, float]:
    """Answer a question about an image, and give one element of the image's latents."""
    pixels = flamingo.preprocess()([PATTERN])
    latents = flamingo.run({"pixel_values": pixels}, ["image_hidden_states"])["image_hidden_states"]
    return flamingo.answer([PATTERN, "how many sevens?"], max_new_tokens=2), float(latents[0, 1, 3])


def answer_gpt(gpt: Any) -> tuple[object, float]:
    """Continue a prompt greedily, and give the mean surprisal of six tokens in nats."""
    return gpt.generate([20, 24, 26], max_new_tokens=3), math.log(gpt.score([20, 24, 26, 14, 5, 9]))


def answer_perceiver(perceiver: Any) -> tuple[object, float]:
    """Classify an image, and give one element of its latents; of the one that reads bytes, fill a gap."""
    if perceiver.manifest.task == "fill-mask":
        ((byte, probability),) = perceiver.fill_mask("o[MASK]l", top_k=1)
        return byte, probability
    ((label, _),) = perceiver.classify(PATTERN, top_k=1)
    return label, float(perceiver.features(PATTERN)[1, 3])


def answer_seq2seq(seq2seq: Any) -> tuple[object, float]:
    """Translate three tokens with two beams, and give one element of the encoder's state."""
    state = seq2seq.run({"input_ids": np.array([[3, 5, 7]])}, ["hidden_state.0"])["hidden_state.0"]
    return seq2seq.generate([19, 9, 28], max_new_tokens=4, num_beams=2), float(as_floats(state)[0, 3])


def answer_show_attend_tell(captioner: Any) -> tuple[object, float]:
    """Caption an image, and give one element of the encoder's state."""
    pixels = captioner.preprocess()([PATTERN])
    state = captioner.run({"pixel_values": pixels}, ["hidden_state.0"])["hidden_state.0"]
    return captioner.caption(PATTERN, max_new_tokens=4), float(as_floats(state)[0, 3])


def as_floats(state: NDArray[Any]) -> NDArray[np.float32]:
    """Return a state as float32; BF16 comes as the upper half of its bits, in uint16."""
    if state.dtype != np.uint16:
        return state.astype(np.float32)
    bits: NDArray[np.uint32] = state.astype(np.uint32) << 16
    return bits.view(np.float32)


def answer_transformer(transformer: Any) -> tuple[object, float]:
    """Translate three tokens greedily, and give one element of the encoder's output."""
    hidden = transformer.run({"input_ids": np.array([[3, 5, 7]])}, ["last_hidden_state"])["last_hidden_state"]
    return transformer.generate([19, 9, 28], max_new_tokens=4), float(hidden[0, 0, 3])


def answer_vit(vit: Any) -> tuple[object, float]:
    """Classify an image: its label and the probability. The reference model reads a digit."""
    image = scan() if "0" in vit.manifest.labels else PATTERN
    ((label, probability),) = vit.classify(image, top_k=1)
    return label, probability


ANSWER: dict[str, Callable[[Any], tuple[object, float]]] = {
    "bert": answer_bert,
    "clip": answer_clip,
    "electra": answer_electra,
    "flamingo": answer_flamingo,
    "gpt": answer_gpt,
    "perceiver": answer_perceiver,
    "seq2seq": answer_seq2seq,
    "show_attend_tell": answer_show_attend_tell,
    "swin": answer_vit,
    "swinv2": answer_vit,
    "transformer": answer_transformer,
    "vit": answer_vit,
    "vit_hybrid": answer_vit,
}


def load_kept(name: str, kernels: str) -> Any:
    """Load a kept bundle; only the one with saturated sums may warn of them."""
    with warnings.catch_warnings():
        if name == SATURATED:
            warnings.simplefilter("ignore", SaturationWarning)
        return load(KEPT / name, threads=1, kernels=kernels)


def runs(*but: str) -> list[Any]:
    """Return the kept bundles, each with the kernels that run it; native ones are skipped where none run here."""
    here = library.native_library() is not None
    skip = pytest.mark.skipif(not here, reason=f"no native kernels run here: {library.status().reason}")
    with_ort = [pytest.param(name, "onnxruntime", id=name) for name in BUNDLES if name not in but]
    return with_ort + [pytest.param(name, "native", id=f"{name}-kernels", marks=skip) for name in WITH_LISTS]


@pytest.mark.parametrize("version", FAMILIES_OF)
def test_every_family_and_precision_of_a_version_has_a_kept_bundle(version: str) -> None:
    """A new version: keep its bundles with tests/bundles/make.py, and name its families in FAMILIES_OF."""
    manifests = [Bundle(KEPT / name).manifest for name in BUNDLES if name.startswith(f"{version}/")]
    kept = {(manifest.family, manifest.precision) for manifest in manifests}
    assert {(family, precision) for family in FAMILIES_OF[version] for precision in PRECISIONS} - kept == set()


@pytest.mark.parametrize("name", BUNDLES)
def test_it_is_what_its_folder_says(name: str) -> None:
    version, _, rest = name.partition("/")
    manifest = Bundle(KEPT / name).manifest
    assert manifest.tools["transom"] == version
    assert rest.split("-")[:2] == [manifest.family, manifest.precision]


def test_every_graph_of_the_families_with_lists_has_one() -> None:
    manifests = [Bundle(KEPT / name).manifest for name in WITH_LISTS]
    assert {(manifest.family, manifest.precision) for manifest in manifests} >= {
        (family, precision) for family in LISTED for precision in ("fp32", "fp16", "int8")
    }
    graphs = [(manifest.family, graph) for manifest in manifests for graph in manifest.graphs]
    assert [(family, graph.graph.name) for family, graph in graphs if "native" not in graph.files] == []


@pytest.mark.parametrize(("name", "kernels"), runs())
def test_it_answers_as_it_did(name: str, kernels: str) -> None:
    with load_kept(name, kernels) as loaded:
        assert {choice.kernels for choice in loaded.kernels.values()} == {kernels}
        words, number = ANSWER[loaded.manifest.family](loaded)
    expected_words, expected = ANSWERS[name]
    assert words == expected_words
    assert number == pytest.approx(expected, abs=TOLERANCES[loaded.manifest.precision])


@pytest.mark.parametrize(("name", "kernels"), runs(SATURATED))
def test_its_selftest_passes(name: str, kernels: str) -> None:
    report = selftest(KEPT / name, threads=1, kernels=kernels)
    assert report.cases
    assert report.worst.error <= report.tolerance


def test_nothing_kept_names_a_path_of_a_machine() -> None:
    files = [path for path in sorted(KEPT.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    assert [path.relative_to(KEPT).as_posix() for path in files if MACHINE_PATH.search(path.read_bytes())] == []
    sources = {name: PurePosixPath(Bundle(KEPT / name).manifest.source["checkpoint"]) for name in BUNDLES}
    assert {name: str(path) for name, path in sources.items() if path.is_absolute() or len(path.parts) > 2} == {}
