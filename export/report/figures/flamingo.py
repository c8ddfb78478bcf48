"""Draw where Flamingo looks in an image for each word of a question and its answer, and how far its gates opened.

A word reads the latents of one image (Alayrac et al., 2022, arXiv:2204.14198, section 2.3), which the resampler made of
its patches: the product of both attentions says which patches a word's vector comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from transom.export.bundle_graphs import graph_file
from transom.export.reference_models import examples_for
from transom.export.report.figures.attention import ExposedAttention, Weights
from transom.export.report.figures.decoder_steps import GREEDY
from transom.export.report.figures.show_attend_tell import grid_of, tint
from transom.export.report.images import data_uri, image_from_pixels, is_small
from transom.export.report.rendering import render
from transom.export.report.svg import LinearAxis, Matrix, bar, chart
from transom.runtime.backends.base import Array
from transom.runtime.bundle import Bundle
from transom.runtime.feeds import IMAGE_INDICES, checked_feeds
from transom.runtime.image_cache import image_inputs
from transom.runtime.tasks.flamingo import PIXELS, Flamingo
from transom.runtime.tasks.image_prompts import Pixels
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt
from transom.runtime.tasks.interleaved_task import marked_prompts
from transom.runtime.tasks.task import RunOptions

MOST_PROMPTS = 6  # that are drawn
MOST_WORDS = 24  # tokens that are drawn of those that see an image: the last, an answer's among them
NEW_TOKENS = 16
GATE_BAR = 14  # pixels


@dataclass(frozen=True)
class Word:
    """A token, the image it sees, its ``weights`` over the image's patches (P,), and whether the model wrote it."""

    token: str
    image: int
    weights: Matrix
    written: bool


def draw_answers(bundle: Bundle, images: Sequence[str], questions: Sequence[str]) -> Markup:
    """Draw the answers to ``questions`` about ``images``, or captions of these; without either a few examples.

    Questions take images as those of `transom run` do: one for each mark, or one in front of a question without a mark.
    """
    with Flamingo(bundle) as model:
        prompts = prompts_of(model, images, questions) if images or questions else examples_of(model)
        looks = Looks(bundle, model)
        drawn = [figure_of(model, looks, prompt) for prompt in prompts[:MOST_PROMPTS]]
        return render("figures/flamingo", answers=drawn, gates=gate_bars(model.manifest.options["gates"]))


def prompts_of(model: Flamingo, images: Sequence[str], questions: Sequence[str]) -> list[InterleavedPrompt]:
    """Return what the model is asked; ``images`` are paths."""
    options = RunOptions(None, truncate=False, images=images if questions else ())
    marked = marked_prompts(model, questions or images, options)
    return [model.reader().open(prompt) for prompt in marked]


def examples_of(model: Flamingo) -> list[InterleavedPrompt]:
    """Return the reference model's examples; of any other checkpoint captions of photographs."""
    found = examples_for(model.manifest.source.get("checkpoint"))
    if found.prompts:
        return [model.prompt_of(list(parts)) for parts in found.prompts]
    return [model.caption_prompt(image) for image in found.images]


class Looks:
    """The attention inside a bundle's two graphs: which latents each token reads, and which patches each latent."""

    def __init__(self, bundle: Bundle, model: Flamingo) -> None:
        self._model = model
        self._resampler = ExposedAttention(bundle, graph_file(bundle, "encoder"), "attention")
        self._cross = ExposedAttention(bundle, graph_file(bundle, "decoder"), "attention")
        gates = np.abs([attention for attention, _ in model.manifest.options["gates"]])
        self._shares = gates / gates.sum() if gates.any() else np.full(len(gates), 1 / len(gates))

    def patches(self, pixels: Sequence[Pixels]) -> Matrix:
        """Return what each latent of each image reads of its patches, float32 (I, N, P), a row adds up to 1."""
        reads = [self._patches_of({PIXELS: image[None]}) for image in pixels]
        return np.stack(reads)

    def _patches_of(self, feeds: Mapping[str, Array]) -> Matrix:
        """Follow the resampler's blocks: a latent reads patches, and the latents that read patches before it.

        Half of each latent passes around a block's attention, as in an attention rollout (Abnar and Zuidema, 2020,
        arXiv:2005.00928).
        """
        found = self._resampler.by_layer(feeds)
        blocks = [weights[0].mean(0) for path, weights in found.items() if "resampler." in path]  # (N, P + N)
        N = len(blocks[0])
        P = blocks[0].shape[1] - N
        reads = np.zeros((N, P), np.float32)
        for weights in blocks:
            reads = 0.5 * reads + 0.5 * (weights[:, :P] + weights[:, P:] @ reads)
        full = self._model.manifest.config.get("vision_feature_select_strategy") == "full"
        reads = reads[:, 1:] if full else reads  # the class token is no place of the image
        shares: Matrix = reads / np.maximum(reads.sum(1, keepdims=True), np.finfo(np.float32).tiny)
        return shares

    def words(self, prompt: InterleavedPrompt, answer: Sequence[int]) -> list[Word]:
        """Return the tokens of a prompt that see an image and of its answer, with what each looks at.

        A token of the prompt looks as it is read. One of the answer looks where the token before it did, from which it
        was chosen. Layers count as far as their gate of attention is open.
        """
        model = self._model
        mark = model.reader().mark
        ids = [*prompt.ids, *answer]
        seen = np.cumsum(np.array(ids) == mark)
        patches = self.patches(prompt.pixels)
        latents = self._latents(prompt.pixels, np.array(ids[:-1]), seen[:-1])  # (S, I, N)
        found = []
        for place, token in enumerate(ids):
            written = place >= len(prompt.ids)
            looks = place - 1 if written else place
            image = int(seen[looks])
            if image and token != mark:
                weights = latents[looks, image - 1] @ patches[image - 1]
                found.append(Word(token_text(model, token), image, weights, written))
        return found

    def _latents(self, pixels: Sequence[Pixels], ids: NDArray[np.int64], seen: NDArray[np.int64]) -> Weights:
        """Return what tokens (S,) read of the latents of all images, float32 (S, I, N): mean of heads and layers.

        ``seen`` (S,) is the image that each token sees, from 1.
        """
        model = self._model
        encoded = model.encode(pixels)
        graph = model.backend("decoder").graph
        names = [tensor.name for tensor in image_inputs(graph)]
        images = {name: np.concatenate([image[name][None] for image in encoded], axis=2) for name in names}
        given = {"input_ids": ids[None], IMAGE_INDICES: seen[None], **images}
        feeds, _ = checked_feeds(graph, model.manifest.axes, given)
        layers = [
            weights[0].mean(0) for path, weights in self._cross.by_layer(feeds).items() if "cross_attention." in path
        ]
        mixed = np.tensordot(self._shares.astype(np.float32), np.stack(layers), axes=1)  # (S, M)
        shape = (len(ids), len(pixels), -1)
        found: Weights = mixed.reshape(shape)
        return found


def figure_of(model: Flamingo, looks: Looks, prompt: InterleavedPrompt) -> dict[str, Any]:
    """Answer a prompt greedily, and draw each of its images with the words that see it."""
    room = model.context - len(prompt)
    answer = model.generate(prompt, **GREEDY, max_new_tokens=max(1, min(NEW_TOKENS, room)))
    words = looks.words(prompt, answer)
    preprocess = model.preprocess()
    images = []
    for number, pixels in enumerate(prompt.pixels, start=1):
        image = image_from_pixels(pixels, preprocess)
        own = [word for word in words if word.image == number]
        rows, columns = grid_of(image.height, image.width, len(own[0].weights)) if own else (1, 1)
        images.append(
            {
                "uri": data_uri(image),
                "small": is_small(image),
                "rows": rows,
                "columns": columns,
                "tokens": len(own),
                "words": [
                    {
                        "token": word.token,
                        "written": word.written,
                        "largest": float(word.weights.max()),
                        "tint": tint(word.weights.reshape(rows, columns)),
                    }
                    for word in own[-MOST_WORDS:]
                ],
            }
        )
    return {"text": model.answer_text(answer), "images": images}


def gate_bars(gates: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Draw how far the two gates of each block are open: a bar of |tanh|, full at 1."""
    axis = LinearAxis(0.0, 1.0)
    return [
        {
            "block": block,
            "gates": [
                {"kind": kind, "value": value, "bar": gate_bar(axis, kind, block, value)}
                for kind, value in zip(("attention", "MLP"), pair, strict=True)
            ],
        }
        for block, pair in enumerate(gates)
    ]


def gate_bar(axis: LinearAxis, kind: str, block: int, value: float) -> Markup:
    title = f"{kind} of block {block}: {value:.3f}"
    return chart(GATE_BAR, title, [bar(0, axis.at(abs(value)), 0, GATE_BAR, "mark" if value >= 0 else "warm", title)])


def token_text(model: Flamingo, token: int) -> str:
    return model.tokenizer().token(token) or str(token)
