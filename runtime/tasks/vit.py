"""Tasks of the Vision Transformer: labels and features of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from transom.runtime.tasks.image_bundle import ImageBundle
from transom.runtime.tasks.postprocess import Ranked, as_list, label_scores, ranked
from transom.runtime.tasks.task import (
    TOP_K,
    FamilyTasks,
    Result,
    RunOptions,
    Task,
    each,
    label_lines,
    ranked_json,
    vector_lines,
)

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource


class ViT(ImageBundle):
    """A loaded Vision Transformer. Images are paths, bytes, PIL images or uint8 arrays (height, width, 3).

    Every method takes one image, or a list of them: a list gets a list.
    """

    GRAPHS: ClassVar = {"model": ("pixel_values",)}

    def classify(self, images: ImageSource | Sequence[ImageSource], top_k: int = 5) -> Any:
        """Return the ``top_k`` most probable labels: ``[(label, probability), ...]`` per image, best first."""
        self.need_task("image-classification")
        single, batch = as_list(images)
        answers: list[Ranked] = [[]] * len(batch)
        for places, logits in self.image_batches(batch, "logits"):
            scores = label_scores(logits, self.manifest.options.get("problem_type"))
            labels = self.labels(scores.shape[1])
            for place, row in zip(places, scores, strict=True):
                answers[place] = ranked(row, labels, top_k)
        return answers[0] if single else answers

    def features(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """Return the class token after the last LayerNorm: float32 (E,) for one image, (N, E) for a list."""
        single, batch = as_list(images)
        rows = self.image_rows(batch, "last_hidden_state", lambda hidden: hidden[:, 0])
        return cast(NDArray[np.float32], rows[0] if single else rows)


def ask_classify(bundle: ViT, images: Sequence[str], options: RunOptions) -> list[Result]:
    found = bundle.classify(list(images), top_k=options.top_k or TOP_K)
    return [{"image": image, "labels": ranked_json("label", row)} for image, row in zip(images, found, strict=True)]


def ask_features(bundle: ViT, images: Sequence[str], options: RunOptions) -> list[Result]:
    vectors = bundle.features(list(images))
    return [{"image": image, "features": vector} for image, vector in zip(images, vectors, strict=True)]


FAMILY = FamilyTasks(
    ViT,
    {
        "image-classification": Task(ask_classify, each(label_lines), ranks=True, example="photo.png"),
        "feature-extraction": Task(ask_features, each(vector_lines), array="features", example="photo.png"),
    },
)
