"""Images to labels and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.preprocess import ImagePreprocess
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.answers import Ranked, label_scores, many, ranked

if TYPE_CHECKING:
    from transom.runtime.images import ImageSource


class ViT(LoadedBundle):
    """A loaded Vision Transformer. Images are paths, bytes, PIL images or uint8 arrays (height, width, 3).

    Every method takes one image, or a list of them, and answers in kind.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        words = self.manifest.preprocess
        self._preprocess = None if words is None else ImagePreprocess.from_json(words)

    def classify(self, images: ImageSource | Sequence[ImageSource], top_k: int = 5) -> Any:
        """The ``top_k`` most probable labels: ``[(label, probability), ...]`` per image, best first."""
        self.need_task("image-classification")
        single, batch = many(images)
        scores = label_scores(self._outputs(batch, "logits"), self.manifest.options.get("problem_type"))
        labels = self.labels(scores.shape[1])
        answers: list[Ranked] = [ranked(row, labels, top_k) for row in scores]
        return answers[0] if single else answers

    def features(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """The class token after the last LayerNorm: float32 (E,) for one image, (N, E) for a list."""
        single, batch = many(images)
        hidden = self._outputs(batch, "last_hidden_state")[:, 0]
        return cast(NDArray[np.float32], hidden[0] if single else hidden)

    def _outputs(self, images: Sequence[ImageSource], output: str) -> NDArray[np.float32]:
        """One output for all images, in batches that the bundle allows."""
        if self._preprocess is None:
            raise InputError("this bundle's channels are not red, green, blue; call run() with pixel_values instead.")
        if not images:
            raise InputError("the list of images is empty; give at least one.")
        size = self.max_size("B")
        parts = [
            self.run({"pixel_values": self._preprocess(images[start : start + size])}, [output])[output]
            for start in range(0, len(images), size)
        ]
        return np.concatenate(parts)
