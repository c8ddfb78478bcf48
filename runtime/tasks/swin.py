"""Tasks of Swin: labels and features of images, as ViT's, but the features are the mean of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from transom.runtime.tasks import vit
from transom.runtime.tasks.postprocess import as_list

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource


class Swin(vit.ViT):
    """A loaded Swin, of either version. Images are paths, bytes, PIL images or uint8 arrays (height, width, 3)."""

    def features(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """Return the mean of the last map's tokens: float32 (E,) for one image, (N, E) for a list."""
        single, batch = as_list(images)
        rows = self.image_rows(batch, "pooler_output")
        return cast(NDArray[np.float32], rows[0] if single else rows)


FAMILY = replace(vit.FAMILY, bundle=Swin)
