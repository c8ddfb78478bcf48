"""Tasks of Flamingo: images are described, questions about them answered, texts with images among them continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from transom.runtime.errors import BundleError, InputError, RowsError
from transom.runtime.feeds import IMAGE_INDICES, LOGITS_POSITIONS, WRITE_INDICES
from transom.runtime.graph_spec import IMAGES, shape_of
from transom.runtime.image_cache import EncodedImage, image_inputs
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.interleaved_decoder import InterleavedDecoder
from transom.runtime.json_reader import Fields
from transom.runtime.tasks.dialogue import Dialogue
from transom.runtime.tasks.generator import Generator, PrefillResult, Stream, in_kind
from transom.runtime.tasks.generator_task import generated_lines
from transom.runtime.tasks.image_prompts import ImagePromptReader, Pixels, stacked
from transom.runtime.tasks.interleaved_prompts import (
    InterleavedPrompt,
    InterleavedPromptReader,
    after_the_last_text,
    is_text,
)
from transom.runtime.tasks.interleaved_task import ask_about_images, prompt_of_input
from transom.runtime.tasks.prompts import Prompts, padded
from transom.runtime.tasks.task import FamilyTasks, Task

if TYPE_CHECKING:
    from transom.runtime.backends.base import Array
    from transom.runtime.generation import GenerationConfig

PIXELS = "pixel_values"


@dataclass(frozen=True)
class Templates:
    """The words around what is asked: ``{}`` is the question, in ``example`` the question and then its answer."""

    question: str
    caption: str
    example: str

    @property
    def separator(self) -> str:
        """Return what stands between an answer and the next question."""
        return self.example.rpartition("{}")[2]


class Flamingo(Generator):
    """A loaded Flamingo: ``caption``, ``answer``, ``generate``, ``stream`` and ``dialogue``.

    A prompt is a list of parts, texts and images in any order: a str is text, anything else an image, namely a path,
    bytes, a PIL image, a uint8 array (height, width, 3), or pixel values, float32 (channels, height, width). Or it is a
    text with ``<image>`` where an image stands, with ``images=[...]``, where a str is a path; or ids with the token of
    that mark, which get ids for an answer. A text sees the latest image before it; text before the first image sees
    none. A list of prompts is a batch: ``[[image, "a question"], [image, "another"]]``.

    An image that cannot be read fails its own row. The other rows of the batch are answered, then RowsError is raised,
    which has their answers; with ``return_exceptions=True`` errors stand among the answers instead. All else that is
    wrong with a prompt raises InputError before anything runs: marks and images that are not as many, an image after
    the last text, more images than the bundle allows, what is neither text nor image.
    """

    GRAPHS: ClassVar = {
        "encoder": (PIXELS,),
        "decoder": ("input_ids", WRITE_INDICES, LOGITS_POSITIONS, IMAGE_INDICES),
    }

    def open_prompt_reader(self) -> InterleavedPromptReader:
        below = self.prompt_tokens().exclusive_max
        inputs = self.backend("encoder").graph.inputs
        shape = next((tensor.shape[1:] for tensor in inputs if tensor.name == PIXELS), ())
        if below is None or len(shape) != 3 or not all(isinstance(size, int) for size in shape):
            raise BundleError(
                f"bundle.json: the tokens have no bound, or {PIXELS} no fixed size; export the bundle again."
            )
        stored = self.manifest.preprocess
        images = ImagePromptReader(
            tuple(int(size) for size in shape), None if stored is None else ImagePreprocess.from_json(stored)
        )
        return InterleavedPromptReader(
            below,
            self.open_tokenizer(self.manifest.tokenizer),
            self._options[0],
            images,
            self.max_size(IMAGES),
            lambda count: self.wider(**{IMAGES: count}),
        )

    @cached_property
    def _options(self) -> tuple[int, Templates]:
        """Return the mark's token and the templates; BundleError lists what is wrong with the bundle's options."""
        fields = Fields(self.manifest.options, "bundle.json: options")
        mark = fields.integer("image_token_id", 0, 2**31 - 1)
        blocks = len(image_inputs(self.backend("decoder").graph)) // 2  # keys and values of each
        fields.take("gates", are_gates_of(blocks), f"{blocks} pairs of numbers in -1..1, one for each block")
        templates = Templates(
            *(
                fields.take(f"{name}_template", has_places(places), f"a text with {places} {{}}, and no other braces")
                for name, places in (("question", 1), ("caption", 0), ("example", 2))
            )
        )
        fields.done()
        return mark, templates

    @property
    def templates(self) -> Templates:
        """The words around questions, captions and examples."""
        return self._options[1]

    def reader(self) -> InterleavedPromptReader:
        """Return the reader of prompts."""
        reader = self._prompt_reader
        assert isinstance(reader, InterleavedPromptReader)
        return reader

    def preprocess(self) -> ImagePreprocess:
        """Return the preprocessing of images into pixels; InputError where the bundle has none."""
        return self.reader().preprocess()

    def generate(self, prompts: Any, *, images: Any = None, return_exceptions: bool = False, **keywords: Any) -> Any:
        """Continue prompts of texts and images with text, or of ids with ids: their texts are taken as they are.

        ``images`` are those of the marks in ``prompts``: a list for one prompt, a list of lists for several. Keywords
        are those of every bundle that generates (``Generator.generate``); the token that marks an image is never
        generated. Raises as the class says, and InputError as ``Generator.generate`` does.
        """
        reader = self.reader()
        return self._answers(reader.read(reader.placed(prompts, images)), keywords, return_exceptions)

    def caption(self, images: Any, *, return_exceptions: bool = False, **keywords: Any) -> Any:
        """Describe images, each with the caption template behind it: a str for one image, a list for a list.

        Here a str is a path. Blanks around a caption are left out. Keywords and errors are those of ``generate``.
        """
        single = not isinstance(images, list | tuple)
        batch = [images] if single else list(images)
        if not batch:
            raise InputError("the list of images is empty; give at least one.")
        prompts = [self.caption_parts(image) for image in batch]
        return self._answers(self.reader().read_batch(single, prompts), keywords, return_exceptions, strip=True)

    def answer(self, prompts: Any, *, images: Any = None, return_exceptions: bool = False, **keywords: Any) -> Any:
        """Answer questions about images: a str for one prompt, a list for a list.

        The last text of a prompt is the question, which gets the words that the model was trained with; a pair
        ``("a question", "its answer")`` anywhere before is an example. Other texts are taken as they are. Blanks around
        an answer are left out. ``images``, keywords and errors are those of ``generate``.
        """
        reader = self.reader()
        single, batch = reader.batch(reader.placed(prompts, images))
        names = ["a prompt"] if single else [f"prompt {place}" for place in range(len(batch))]
        asked = [self.question_parts(prompt, name) for prompt, name in zip(batch, names, strict=True)]
        return self._answers(reader.read_batch(single, asked), keywords, return_exceptions, strip=True)

    def stream(self, prompt: Any, *, images: Any = None, **keywords: Any) -> Stream:
        """Yield what ``generate`` returns for one prompt, piece by piece: whole characters, or ids for ids.

        Raises as ``generate`` does, at once, also for an image that cannot be read.
        """
        return super().stream(self.reader().placed(prompt, images), **keywords)

    def dialogue(self) -> Dialogue:
        """Return a dialogue, which keeps what was said and seen: no later question reads it again."""
        return Dialogue(self)

    def caption_parts(self, image: Any) -> list[Any]:
        """Return the parts of a prompt that asks for a caption; a str is the image's path."""
        return [Path(image) if isinstance(image, str) else image, self.templates.caption]

    def question_parts(self, prompt: Any, name: str = "a prompt") -> list[Any]:
        """Return the parts of a prompt of ``answer`` with the words around its question and its examples."""
        if not is_text(prompt):
            raise InputError(f"{name} is of ids; answer() takes texts. Call generate().")
        parts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if not parts:
            raise InputError(f"{name} is empty; expected a question, with images before it.")
        *before, question = parts
        if is_example(question):
            raise InputError(f"{name} ends in an example, a question with its answer; expected a question behind it.")
        if not isinstance(question, str):
            self.reader().check_image(question, f"the last part of {name}")
            raise InputError(after_the_last_text(name))
        if not question.strip():
            raise InputError(f"{name} ends in an empty text; expected a question.")
        example = self.templates.example
        return [
            *(example.format(*part) if is_example(part) else part for part in before),
            self.templates.question.format(question),
        ]

    def prompt_of(self, parts: Any) -> InterleavedPrompt:
        """Return what ``answer`` feeds for a prompt, its images opened."""
        reader = self.reader()
        return reader.open(reader.read_batch(True, [self.question_parts(parts)]).given[0])

    def caption_prompt(self, image: Any) -> InterleavedPrompt:
        """Return what ``caption`` feeds for an image, opened."""
        reader = self.reader()
        return reader.open(reader.read_batch(True, [self.caption_parts(image)]).given[0])

    def answer_text(self, ids: Sequence[int]) -> str:
        """Return what ``answer`` makes of generated ids."""
        return self.target_tokenizer().decode(ids).strip()

    def _answers(self, read: Prompts, keywords: dict[str, Any], return_exceptions: bool, *, strip: bool = False) -> Any:
        """Generate batch by batch; a row whose images cannot be read leaves its batch, which goes on around it."""
        config = self._config(keywords, read)
        size = self.prompts_at_once(config)
        answers: list[Any] = []
        errors: dict[int, InputError] = {}
        for first in range(0, len(read.given), size):
            ready: list[InterleavedPrompt] = []
            for place in range(first, min(first + size, len(read.given))):
                try:
                    ready.append(self.reader().opened(read, place))
                except InputError as error:
                    answers += self._batch(ready, config, place - len(ready), read.text, strip)
                    answers.append(None)
                    errors[place], ready = error, []
            stop = min(first + size, len(read.given))
            answers += self._batch(ready, config, stop - len(ready), read.text, strip)
        if return_exceptions:
            answers = [errors.get(place, answer) for place, answer in enumerate(answers)]
        elif errors:
            raise errors[0] if read.single else RowsError(answers, errors)
        return answers[0] if read.single else answers

    def _batch(
        self, prompts: Sequence[InterleavedPrompt], config: GenerationConfig, first: int, text: bool, strip: bool
    ) -> list[Any]:
        """Return an answer for each prompt, a list of them where several sequences are asked for."""
        if not prompts:
            return []
        found = self._generated(prompts, config, range(first, first + len(prompts)), text=text)
        found = [answer.strip() for answer in found] if strip else found
        grouped: list[Any] = in_kind(found, single=False, each=config.num_return_sequences)
        return grouped

    def _config(self, keywords: dict[str, Any], prompts: Prompts, *, streaming: bool = False) -> GenerationConfig:
        config = super()._config(keywords, prompts, streaming=streaming)
        return replace(config, suppress_tokens=(*config.suppress_tokens, self.reader().mark))

    def prefill(self, prompts: Sequence[InterleavedPrompt]) -> PrefillResult:
        return self.prefill_call(prompts)()

    def prefill_call(self, prompts: Sequence[InterleavedPrompt]) -> Callable[[], PrefillResult]:
        encoded = self._by_row([prompt.pixels for prompt in prompts])
        return partial(self._prefilled, [list(prompt.ids) for prompt in prompts], encoded)

    def _prefilled(self, ids: Sequence[list[int]], images: Sequence[Sequence[EncodedImage]]) -> PrefillResult:
        decoder = self.new_decoder(len(ids))
        decoder.append_images(images)
        logits = decoder.prefill(*padded(ids))
        return PrefillResult(decoder, list(ids), logits)

    def append_images(self, decoder: InterleavedDecoder, images: Sequence[Sequence[Pixels]]) -> None:
        """Encode images, a list of pixels for each row of the decoder, and append them: their marks are read next."""
        decoder.append_images(self._by_row(images))

    def _by_row(self, images: Sequence[Sequence[Pixels]]) -> list[list[EncodedImage]]:
        encoded = iter(self.encode([pixels for row in images for pixels in row]))
        return [[next(encoded) for _ in row] for row in images]

    def encode(self, pixels: Sequence[Pixels]) -> list[EncodedImage]:
        """Return keys and values of images, float32 (C, H, W) each, in batches that the bundle allows."""
        encoder, most = self.backend("encoder"), self.max_size("B")
        read = {tensor.name for tensor in image_inputs(self.backend("decoder").graph)}
        made = [tensor for tensor in encoder.graph.outputs if tensor.name in read]
        found: list[EncodedImage] = []
        for first in range(0, len(pixels), most):
            batch = stacked(pixels[first : first + most])
            shapes = {tensor.name: shape_of(tensor, {"B": len(batch)}) for tensor in made}
            outputs = encoder.run({PIXELS: batch}, shapes)
            found += [{name: array[row] for name, array in outputs.items()} for row in range(len(batch))]
        return found

    def new_decoder(self, rows: int, encoder_outputs: Mapping[str, Array] | None = None) -> InterleavedDecoder:
        return InterleavedDecoder(
            self.backend("decoder"),
            rows,
            self.context,
            self.reader().mark,
            self.max_size(IMAGES),
            most_logits=self.max_size("P"),
        )

    def random_prompts(
        self, rng: np.random.Generator, rows: int, length: int, images: int = 1
    ) -> list[InterleavedPrompt]:
        reader = self.reader()
        images = min(images, length - 1)  # no prompt ends in an image
        ids = rng.integers(0, reader.vocabulary, (rows, length))
        ids[ids == reader.mark] = (reader.mark + 1) % reader.vocabulary
        ids[:, [place * length // images for place in range(images)]] = reader.mark
        pixels = rng.standard_normal((rows, images, *reader.images.shape), np.float32)
        return [InterleavedPrompt(row.tolist(), list(own)) for row, own in zip(ids, pixels, strict=True)]

    def decoder_length(self, prompt: Sequence[Any]) -> int:
        return len(prompt)


def is_example(part: Any) -> bool:
    """Return whether a part of a prompt is a question with its answer."""
    return isinstance(part, tuple) and len(part) == 2 and all(isinstance(text, str) for text in part)


def are_gates_of(blocks: int) -> Callable[[object], bool]:
    """Return the check of the gates: two numbers for each of the ``blocks`` of cross-attention."""

    def check(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) == blocks
            and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_gate, pair)) for pair in value)
        )

    return check


def is_gate(value: object) -> bool:
    """Return whether this is tanh of something."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1


def has_places(places: int) -> Callable[[object], bool]:
    """Return the check of a template: a text with this many ``{}`` and no other braces."""

    def check(value: object) -> bool:
        return isinstance(value, str) and value.count("{}") == places and not set("{}") & set(value.replace("{}", ""))

    return check


FAMILY = FamilyTasks(
    Flamingo,
    {
        "image-text-to-text": Task(
            ask_about_images,
            generated_lines,
            generates=True,
            prompt=prompt_of_input,
            asks=True,
            example="'what is in the picture?' --image photo.png",
        )
    },
)
