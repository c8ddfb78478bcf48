"""Check prompts in which texts and images alternate, and turn them into token ids and pixels batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.runtime.errors import BundleError, InputError
from transom.runtime.image_loading import check_source
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.tasks.image_prompts import ImagePromptReader, Pixels, is_pixels
from transom.runtime.tasks.prompts import PromptReader, Prompts, Row
from transom.runtime.text.tokenizer import lowered

if TYPE_CHECKING:
    from transom.runtime.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class InterleavedPrompt:
    """A prompt that is ready for the graphs: ids with a mark where an image stands, and the pixels of each mark.

    ``pixels`` are float32 (C, H, W) each, in the order of the marks.
    """

    ids: Row
    pixels: Sequence[Pixels]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class MarkedPrompt:
    """A prompt whose images are not opened yet: ids with a mark where an image stands, and the images or pixels."""

    ids: Row
    images: Sequence[Any]


class InterleavedPromptReader(PromptReader):
    """Reads prompts for a model of ``vocabulary`` tokens, one of which, ``mark``, stands for an image.

    A prompt is a list of parts, each a text or an image: a str is always text; a path, bytes, a PIL image or a uint8
    array is an image, and so is a float32 array (C, H, W) of pixel values. A str alone is a prompt of text, a list of
    ids one of ids, and InterleavedPrompt and MarkedPrompt are prompts of ids with their images. A batch is a list of
    prompts, of which at least one is a list or one of these two, or all are tuples.

    ``images`` reads one image; ``most`` is how many a prompt may have, ``wider`` the advice for more of them.
    """

    def __init__(
        self,
        vocabulary: int,
        tokenizer: TextTokenizer | None,
        mark: int,
        images: ImagePromptReader,
        most: int,
        wider: Callable[[int], str],
    ) -> None:
        super().__init__(vocabulary, tokenizer)
        self.mark, self.images, self.most, self._wider = mark, images, most, wider
        if not 0 <= mark < vocabulary:
            raise BundleError(
                f"bundle.json: options.image_token_id is {mark}, expected a token of the model, 0..{vocabulary - 1}. "
                "Export the bundle again."
            )
        word = None if tokenizer is None else tokenizer.token(mark)
        if tokenizer is not None and (word is None or mark not in tokenizer.row(word, truncate=False).ids):
            raise BundleError(
                f"bundle.json: options.image_token_id is {mark}, which the tokenizer spells {word!r} and does not read "
                "back. Export the bundle again."
            )
        self._word = word

    def word(self) -> str:
        """Return the text that marks an image, ``<image>`` in most checkpoints; InputError without a tokenizer."""
        self.tokenizer()
        assert self._word is not None
        return self._word

    def preprocess(self) -> ImagePreprocess:
        """Return the preprocessing of images into pixels; InputError where the bundle has none."""
        return self.images.preprocess()

    def read(self, prompts: Any) -> Prompts:
        """Check the prompts and count their tokens, a mark as one; InputError for what is no prompt.

        Texts become ids here; an image is opened when its batch comes. All that is wrong with a prompt but an image
        that cannot be read is found here, before anything runs.
        """
        return self.read_batch(*self.batch(prompts))

    def read_batch(self, single: bool, batch: Sequence[Any]) -> Prompts:
        """Check prompts as ``read`` does, ``batch`` what ``batch`` gave: of a single prompt, it alone."""
        named = [("a prompt" if single else f"prompt {place}", given) for place, given in enumerate(batch)]
        kinds = {is_text(given) for _, given in named}
        if len(kinds) == 2:
            raise InputError("prompts holds both texts and ids; give one kind in one call.")
        marked = [self._marked(given, name) for name, given in named]
        return Prompts(single, kinds == {True}, marked, [len(prompt.ids) for prompt in marked])

    def batch(self, prompts: Any) -> tuple[bool, list[Any]]:
        """Return whether this is a single prompt, and the prompts as a list."""
        given = prompts.tolist() if is_id_array(prompts, 1, 2) else prompts
        if not isinstance(given, list | tuple):
            return True, [given]
        if not given:
            raise InputError("a prompt is empty; expected at least one text or image.")
        several = any(isinstance(part, list | InterleavedPrompt | MarkedPrompt) or is_id_array(part) for part in given)
        several = several or all(isinstance(part, tuple) for part in given)
        return (False, list(given)) if several else (True, [list(given)])

    def continuing(self, parts: Sequence[Any]) -> MarkedPrompt:
        """Return parts that follow a prompt, checked as by ``read``, without the tokens that a tokenizer puts first."""
        prompt = self._marked(parts, "a prompt")
        special = self.tokenizer().row("a", truncate=False).special_tokens_mask
        return MarkedPrompt(prompt.ids[special.index(0) :], prompt.images)

    def advice(self, images: int) -> str:
        """Return how to get room for ``images`` in a prompt: ``export again with --max I=9``."""
        return lowered(self._wider(images))

    def placed(self, prompts: Any, images: Any) -> Any:
        """Return prompts with ``images`` at their marks: a list of images for one prompt, a list of those for several.

        Prompts are texts with marks, which become lists of parts, or ids. A str among the images is a path. Raises
        InputError where there are not as many images as marks, and for what is no image.
        """
        if images is None:
            return prompts
        given = prompts.tolist() if is_id_array(prompts, 1, 2) else prompts
        if not isinstance(images, list | tuple):
            raise InputError(
                f"images is a {type(images).__name__}; expected a list of images, in the order of their marks."
            )
        single = isinstance(given, str) or (isinstance(given, list | tuple) and are_ids(given))
        if single:
            return self._with_images(given, images, "a prompt")
        if not isinstance(given, list | tuple):
            raise InputError(f"prompts is a {type(given).__name__}; with images= expected texts with marks, or ids.")
        if len(given) != len(images) or not all(isinstance(own, list | tuple) for own in images):
            raise InputError(
                f"{len(given)} prompts were given and images for {len(images)}; expected a list of images for each "
                "prompt, [] for none."
            )
        return [
            self._with_images(prompt, own, f"prompt {place}")
            for place, (prompt, own) in enumerate(zip(given, images, strict=True))
        ]

    def _with_images(self, prompt: Any, images: Sequence[Any], name: str) -> Any:
        if isinstance(prompt, str):
            texts = prompt.split(self.word())
            self._compare(len(texts) - 1, len(images), name)
            sources = [Path(image) if isinstance(image, str) else image for image in images]  # a part would be text
            for number, image in enumerate(sources):
                self.check_image(image, f"image {number} of {name}")
            return [part for pair in zip(texts, [*sources, ""], strict=True) for part in pair if not is_blank(part)]
        ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        if not (isinstance(ids, list | tuple) and are_ids(ids)):
            raise InputError(
                f"{name} is a {type(prompt).__name__}; with images= expected a text with marks, or ids. In a list of "
                "parts the images stand at their places."
            )
        return MarkedPrompt(list(ids), images)

    def rows(self, prompts: Prompts, places: Sequence[int]) -> list[Any]:
        """Return the prompts at these places: InterleavedPrompts, whose images are opened."""
        return [self.opened(prompts, place) for place in places]

    def opened(self, prompts: Prompts, place: int) -> InterleavedPrompt:
        """Open the images of one prompt; InputError for one that cannot be read."""
        prompt: MarkedPrompt = prompts.given[place]
        of = "" if len(prompts.given) == 1 else f" of prompt {place}"
        return self.open(prompt, of)

    def open(self, prompt: MarkedPrompt, of: str = "") -> InterleavedPrompt:
        """Open the images of a prompt, which ``of`` names in errors."""
        pixels = [self._pixels(image, f"image {number}{of}") for number, image in enumerate(prompt.images)]
        return InterleavedPrompt(list(prompt.ids), pixels)

    def _pixels(self, image: Any, name: str) -> Pixels:
        found: Pixels = image if is_pixels(image) else self.preprocess()([image], lambda _: name)[0]
        return found

    def _marked(self, given: Any, name: str) -> MarkedPrompt:
        """Return a prompt as ids with its images, checked but not opened."""
        if isinstance(given, InterleavedPrompt):
            prompt = MarkedPrompt(given.ids, given.pixels)
        elif isinstance(given, MarkedPrompt):
            prompt = given
        elif isinstance(given, list | tuple) and are_ids(given):
            prompt = MarkedPrompt(list(given), [])
        elif is_id_array(given):
            prompt = MarkedPrompt(given.tolist(), [])
        else:
            prompt = self._of_parts(given if isinstance(given, list | tuple) else [given], name)
        if not len(prompt.ids):
            raise InputError(f"{name} is empty; expected at least one text or image.")
        ids = self._checked(prompt.ids)
        for number, image in enumerate(prompt.images):
            self.check_image(image, f"image {number} of {name}")
        self._compare(ids.count(self.mark), len(prompt.images), name)
        if len(prompt.images) > self.most:
            raise InputError(
                f"{name} has {len(prompt.images)} images; this bundle allows {self.most}. "
                f"{self._wider(len(prompt.images))}."
            )
        if ids[-1] == self.mark:
            raise InputError(after_the_last_text(name))
        return MarkedPrompt(ids, prompt.images)

    def _of_parts(self, parts: Sequence[Any], name: str) -> MarkedPrompt:
        """Join texts and images in their order; a tokenizer reads the text with its marks as a whole."""
        images = [part for part in parts if not isinstance(part, str)]
        for number, part in enumerate(parts):
            if isinstance(part, tuple):
                raise InputError(
                    f"part {number} of {name} is a tuple; a question with its answer is an example for answer(). "
                    "Expected texts and images."
                )
        if not images and not any(parts):
            raise InputError(f"{name} is empty; expected at least one text or image.")
        text = "".join(part if isinstance(part, str) else self.word() for part in parts)
        return MarkedPrompt(list(self.tokenizer().row(text, truncate=False, name=name).ids), images)

    def check_image(self, image: Any, name: str) -> None:
        """Raise InputError for what is no image, whatever a file of that name holds."""
        if is_pixels(image):
            self.images.check(image, name)
            return
        self.preprocess()
        try:
            check_source(image)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _compare(self, marks: int, images: int, name: str) -> None:
        if marks != images:
            word = f"token {self.mark}" if self._word is None else self._word
            raise InputError(
                f"{name} has {marks} image marks ({word}) and {images} images; expected as many. Give an image for "
                "each mark, in their order."
            )


def after_the_last_text(name: str) -> str:
    """Return the error of a prompt that ends in an image."""
    return (
        f"{name} has an image after its last text, so that nothing asks about it. Put a text behind the image; "
        "caption() describes one."
    )


def is_text(prompt: Any) -> bool:
    """Return whether a prompt is of texts and images, and not of ids."""
    if isinstance(prompt, InterleavedPrompt | MarkedPrompt) or is_id_array(prompt):
        return False
    return not (isinstance(prompt, list | tuple) and are_ids(prompt))


def are_ids(parts: Sequence[Any]) -> bool:
    return len(parts) > 0 and all(isinstance(part, int | np.integer) for part in parts)


def is_id_array(prompt: Any, *dimensions: int) -> bool:
    """Return whether this is an array of ids, by default of one dimension; of uint8 or floats it is an image."""
    ids = isinstance(prompt, np.ndarray) and prompt.dtype.kind in "iu" and prompt.dtype != np.uint8
    return ids and prompt.ndim in (dimensions or (1,))


def is_blank(part: Any) -> bool:
    return isinstance(part, str) and not part
