"""Tasks of CLIP: vectors of images and texts in one space, and zero-shot classification of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import BundleError, InputError
from transom.runtime.numeric import softmax
from transom.runtime.tasks.batches import BatchRows, collected
from transom.runtime.tasks.image_bundle import ImageBundle
from transom.runtime.tasks.postprocess import Ranked, as_list, ranked
from transom.runtime.tasks.task import FamilyTasks, Result, RunOptions, Task, each, label_lines, ranked_json
from transom.runtime.tasks.text_bundle import TextBundle

if TYPE_CHECKING:
    from transom.runtime.backends.base import Array
    from transom.runtime.image_loading import ImageSource

Floats = NDArray[np.float32]
BLANK = "{}"  # of a template: where the label goes
MOST_SCALED = 3e38  # the range of float32
LABEL_TEXTS = 1024  # labels in their templates that are embedded before their means are taken
LOGITS = ("logits_per_image", "logits_per_text")


@dataclass(frozen=True)
class Labels:
    """Labels and their vectors, float32 (N, E) of unit length, computed once for many images."""

    names: tuple[str, ...]
    embeds: Floats


class Clip(TextBundle, ImageBundle):
    """A loaded CLIP. Images are paths, bytes, PIL images or uint8 arrays (height, width, 3); texts are str.

    ``embed_image`` and ``embed_text`` take one, or a list: a list gets (N, E). A text longer than the
    bundle's S is an error, unless ``truncate``.
    """

    GRAPHS: ClassVar = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        scale = self.manifest.options.get("logit_scale")
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < MOST_SCALED:
            raise BundleError(f"bundle.json: options.logit_scale is {scale!r}, expected a positive number.")
        self.logit_scale = float(scale)

    def zero_shot(
        self,
        images: ImageSource | Sequence[ImageSource],
        labels: Sequence[str] | Labels,
        *,
        templates: str | Sequence[str] | None = None,
        top_k: int | None = None,
        truncate: bool = False,
    ) -> Any:
        """Return ``[(label, probability), ...]`` per image, best first; all labels unless ``top_k``.

        Probabilities are softmax over the labels of ``logit_scale`` times the cosines. With ``templates``
        ("a photo of a {}"), each label is put into each of them, see ``embed_labels``; that method's result
        may be given as ``labels``, to compute it once for many calls.
        """
        single, batch = as_list(images)
        if not isinstance(labels, Labels):
            labels = self.embed_labels(labels, templates, truncate=truncate)
        elif templates is not None or truncate:
            raise InputError("templates and truncate belong to embed_labels, whose result is given here already.")
        count = len(labels.names) if top_k is None else top_k
        answers: list[Ranked] = [[]] * len(batch)
        for places, vectors in self.image_batches(batch, "image_embeds"):
            if labels.embeds.shape[1:] != vectors.shape[1:]:
                raise InputError(
                    f"the labels have vectors of {labels.embeds.shape[-1]} numbers, this bundle's have "
                    f"{vectors.shape[1]}; call this bundle's own embed_labels."
                )
            probabilities = softmax(self._logits(vectors, labels.embeds))
            for place, row in zip(places, probabilities, strict=True):
                answers[place] = ranked(row, labels.names, count)
        return answers[0] if single else answers

    def embed_image(self, images: ImageSource | Sequence[ImageSource]) -> Floats:
        """Return vectors of unit length: float32 (E,) for one image, (N, E) for a list."""
        single, batch = as_list(images)
        vectors = self.image_rows(batch, "image_embeds")
        return vectors[0] if single else vectors

    def embed_text(self, texts: str | Sequence[str], *, truncate: bool = False) -> Floats:
        """Return vectors of unit length: float32 (E,) for one text, (N, E) for a list."""
        single, batch = as_list(texts)
        vectors = self.text_rows(batch, "text_embeds", truncate=truncate)
        return vectors[0] if single else vectors

    def embed_labels(
        self, labels: Sequence[str], templates: str | Sequence[str] | None = None, *, truncate: bool = False
    ) -> Labels:
        """Return the vector of each label; with ``templates`` the mean over them, of unit length again.

        A template has ``{}`` in the place of the label. The ensemble is Radford et al. (2021), section 3.1.4.
        """
        single, names = as_list(labels)
        if single:
            raise InputError(f"labels is a {type(labels).__name__}; expected a list of str.")
        wanted = [BLANK] if templates is None else as_list(templates)[1]
        check_labels(names, wanted)
        return Labels(tuple(names), collected(self._label_batches(names, wanted, truncate=truncate), len(names)))

    def _label_batches(self, names: Sequence[str], templates: Sequence[str], *, truncate: bool) -> Iterator[BatchRows]:
        """Compute the vectors of as many labels at a time as LABEL_TEXTS allows: one row each, of unit length."""
        each = len(templates)
        step = max(LABEL_TEXTS // each, 1)
        for first in range(0, len(names), step):
            some = names[first : first + step]
            texts = [template.replace(BLANK, name) for name in some for template in templates]
            rows = self.text_rows(texts, "text_embeds", truncate=truncate, name=partial(name_of_label, first, each))
            means = rows.reshape(len(some), each, -1).mean(1)
            lengths = np.linalg.norm(means, axis=1, keepdims=True)
            yield (
                np.arange(first, first + len(some)),
                np.asarray(means / np.maximum(lengths, np.float32(1e-12)), np.float32),
            )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run as ``LoadedBundle.run``; the inputs of both towers give both vectors, and the logits between them.

        ``logits_per_image`` is (images, texts), ``logits_per_text`` its transpose, as transformers' CLIPModel has
        them; each tower has a batch size of its own.
        """
        if not isinstance(inputs, Mapping) or "pixel_values" not in inputs or "input_ids" not in inputs:
            return super().run(inputs, outputs)
        image = super().run({"pixel_values": inputs["pixel_values"]})
        text = super().run({name: array for name, array in inputs.items() if name != "pixel_values"})
        logits = self._logits(image["image_embeds"], text["text_embeds"])
        found = {LOGITS[0]: logits, LOGITS[1]: logits.T.copy(), **text, **image}
        if outputs is not None and not outputs:
            raise InputError("outputs is empty; name at least one, or leave it out for all.")
        unknown = [name for name in outputs or () if name not in found]
        if unknown:
            raise InputError(f"unknown output {unknown[0]!r}; both towers give {', '.join(found)}.")
        return {name: found[name] for name in outputs or found}

    def _logits(self, image_embeds: Floats, text_embeds: Floats) -> Floats:
        """Return the logits (images, texts) in FP32."""
        products = [
            (text_embeds * image).sum(1) for image in image_embeds
        ]  # with @ the sum of a single row differs from the same row's in a batch
        return np.asarray(np.float32(self.logit_scale) * np.stack(products), np.float32)


def name_of_label(first: int, each: int, text: int) -> str:
    """Return the name of a text in errors: ``each`` texts, one per template, make a label; ``first`` labels precede."""
    label = f"label {first + text // each}"
    return label if each == 1 else f"{label} in template {text % each}"


def check_labels(names: Sequence[Any], templates: Sequence[Any]) -> None:
    """Raise InputError for lists that are empty or hold anything but str, and for templates without a blank."""
    for what, given in (("labels", names), ("templates", templates)):
        if not given:
            raise InputError(f"{what} is empty; give at least one.")
        for index, text in enumerate(given):
            if not isinstance(text, str):
                raise InputError(f"{what}[{index}] is a {type(text).__name__}; expected a str.")
    for index, template in enumerate(templates):
        if template.count(BLANK) != 1:
            raise InputError(
                f"templates[{index}] is {template[:60]!r}; expected one {BLANK} in it, in place of the label: "
                "'a photo of a {}'."
            )


def ask_zero_shot(bundle: Clip, images: Sequence[str], options: RunOptions) -> list[Result]:
    found = bundle.zero_shot(
        list(images),
        list(options.labels),
        templates=list(options.templates) or None,
        top_k=options.top_k,
        truncate=options.truncate,
    )
    return [{"image": image, "labels": ranked_json("label", row)} for image, row in zip(images, found, strict=True)]


FAMILY = FamilyTasks(
    Clip,
    {
        "zero-shot-image-classification": Task(
            ask_zero_shot,
            each(label_lines),
            ranks=True,
            labelled=True,
            example="photo.png --label 'a photo of a cat' --label 'a photo of a dog'",
        ),
    },
)
