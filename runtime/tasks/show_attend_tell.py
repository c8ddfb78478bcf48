"""Tasks of Show, Attend and Tell: images are captioned, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from transom.runtime.errors import BundleError
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.tasks.encoder_decoder import EncoderDecoder
from transom.runtime.tasks.generator import PrefillResult
from transom.runtime.tasks.generator_task import generated, generated_lines
from transom.runtime.tasks.image_prompts import ImagePromptReader, Pixels, stacked
from transom.runtime.tasks.task import FamilyTasks, Result, RunOptions, Task

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

PIXELS = "pixel_values"


class ShowAttendTell(EncoderDecoder):
    """A loaded image captioner: ``caption``, ``generate`` and ``stream``.

    Images are paths, bytes, PIL images or uint8 arrays (height, width, 3), and give texts; pixel_values, float32
    (channels, height, width) of one image, give token ids.
    """

    GRAPHS: ClassVar = {"encoder": (PIXELS,), "decoder": ("decoder_input_ids",)}

    def caption(self, images: ImageSource | Sequence[ImageSource], **keywords: Any) -> Any:
        """Describe images: a str for one image, a list for a list.

        Keywords are those of ``generate``: ``num_beams``, ``max_new_tokens``, ... Raises InputError, which names the
        image, for one that cannot be used.
        """
        return self.generate(images, **keywords)

    def open_prompt_reader(self) -> ImagePromptReader:
        inputs = self.backend("encoder").graph.inputs
        shape = next((tensor.shape[1:] for tensor in inputs if tensor.name == PIXELS), ())
        if len(shape) != 3 or not all(isinstance(size, int) for size in shape):
            raise BundleError(
                f"bundle.json: {PIXELS} is no input (B, C, H, W) of fixed sizes; export the bundle again."
            )
        stored = self.manifest.preprocess
        return ImagePromptReader(
            tuple(int(size) for size in shape), None if stored is None else ImagePreprocess.from_json(stored)
        )

    def preprocess(self) -> ImagePreprocess:
        """Return the preprocessing of images into pixels; InputError where the bundle has none."""
        reader = self._prompt_reader
        assert isinstance(reader, ImagePromptReader)
        return reader.preprocess()

    def prefill(self, prompts: Sequence[Pixels]) -> PrefillResult:
        return self.prefill_encoded({PIXELS: stacked(prompts)}, {"B": len(prompts)})

    def prompt_axis(self) -> None:
        return None

    def random_prompts(self, rng: np.random.Generator, rows: int, length: int, images: int = 1) -> list[Any]:
        reader = self._prompt_reader
        assert isinstance(reader, ImagePromptReader)
        return list(rng.standard_normal((rows, *reader.shape), np.float32))


def ask_caption(bundle: ShowAttendTell, images: Sequence[str], options: RunOptions) -> list[Result]:
    """Return one result per caption: as many as images, times ``--num-return-sequences``."""
    pixels = list(bundle.preprocess()(list(images)))
    return generated(bundle, "image", images, bundle.generate(pixels, **options.keywords))


def prompt_of(bundle: ShowAttendTell, image: str, options: RunOptions) -> Pixels:
    """Return the pixels of an image, as ``generate`` and ``stream`` take them."""
    pixels: Pixels = bundle.preprocess()([image])[0]
    return pixels


FAMILY = FamilyTasks(
    ShowAttendTell,
    {"image-to-text": Task(ask_caption, generated_lines, generates=True, prompt=prompt_of, example="photo.png")},
)
