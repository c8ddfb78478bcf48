"""Images to labels and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from transom.runtime.tasks.image_bundle import ImageBundle
from transom.runtime.tasks.postprocess import Ranked, label_scores, many, ranked

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource


class ViT(ImageBundle):
    """A loaded Vision Transformer. Images are paths, bytes, PIL images or uint8 arrays (height, width, 3).

    Every method takes one image, or a list of them, and answers in kind.
    """

    GRAPHS: ClassVar = {"model": ("pixel_values",)}

    def classify(self, images: ImageSource | Sequence[ImageSource], top_k: int = 5) -> Any:
        """The ``top_k`` most probable labels: ``[(label, probability), ...]`` per image, best first."""
        self.need_task("image-classification")
        single, batch = many(images)
        answers: list[Ranked] = [[]] * len(batch)
        for places, logits in self.image_batches(batch, "logits"):
            scores = label_scores(logits, self.manifest.options.get("problem_type"))
            labels = self.labels(scores.shape[1])
            for place, row in zip(places, scores, strict=True):
                answers[place] = ranked(row, labels, top_k)
        return answers[0] if single else answers

    def features(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """The class token after the last LayerNorm: float32 (E,) for one image, (N, E) for a list."""
        single, batch = many(images)
        rows = self.image_rows(batch, "last_hidden_state", lambda hidden: hidden[:, 0])
        return cast(NDArray[np.float32], rows[0] if single else rows)
