"""Read outputs of held-out images, as every family that sees images does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.calib.samples import Sample
from transom.export.families.evaluation import Floats, naming
from transom.runtime.errors import CalibrationError
from transom.runtime.tasks.image_bundle import ImageBundle


def image_rows(bundle: ImageBundle, samples: Sequence[Sample], output: str) -> Iterator[tuple[Sample, Floats]]:
    """Yield ``output`` of each sample's image, or of its raw ``pixel_values``, in batches that the bundle allows."""
    size = bundle.max_size("B")
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        with naming(batch):
            pictures = [sample.image for sample in batch if sample.image is not None]
            if len(pictures) == len(batch):
                pixels = bundle.preprocess()(pictures)
            else:
                pixels = np.concatenate([pixels_of(sample) for sample in batch])
            found = bundle.run({"pixel_values": pixels}, [output])[output]
        yield from zip(batch, found, strict=True)


def pixels_of(sample: Sample) -> NDArray[np.float32]:
    if sample.feeds is None or "pixel_values" not in sample.feeds:
        raise CalibrationError(f"held-out sample {sample.name} has no image, which this model reads. Leave it out.")
    return np.asarray(sample.feeds["pixel_values"], np.float32)
