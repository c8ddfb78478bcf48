"""Inputs of parity cases: real text and real photographs, cut to any shape."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image as PillowImage

from transom.export.datasets import passage, photos
from transom.runtime.backends.base import Array
from transom.runtime.graph_spec import Graph, Tensor, shape_of
from transom.runtime.image_loading import open_image
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.text.tokenizer import TextTokenizer


class ParityInputs:
    """Feeds of one graph at any sizes; the same sizes give the same feeds.

    Token ids come from a passage of prose through the checkpoint's own tokenizer (seeded random ids
    below the vocabulary's size where it has none), in rows of different real lengths, the rest
    padding. Ids that the graph looks for, ``marks``, stand somewhere in each row but the last of several.
    Pixels come from photographs through the checkpoint's own image processor.
    """

    def __init__(
        self,
        graph: Graph,
        text: TextTokenizer | None,
        preprocess: ImagePreprocess | None,
        marks: Sequence[int] = (),
    ) -> None:
        self._graph, self._marks = graph, marks
        self._preprocess = preprocess
        self._ids = None if text is None else passage_ids(text)
        self._pad_id = 0 if text is None else text.spec.pad_id
        self._photos = [open_image(photo) for photo in photos()]

    def ids(self, shape: tuple[int, int], below: int) -> Array:
        """Return token ids 0..below-1, int64 (R, n): rows of prose that begin anywhere."""
        rng = np.random.default_rng(zlib.crc32(repr((shape, below)).encode()))
        return self._tokens(Tensor("ids", "int64", (), exclusive_max=below), shape, rng)

    def feeds(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        """Make one array per input of the graph, named axes at ``sizes``."""
        seed = zlib.crc32(repr(sorted(sizes.items())).encode())
        rng = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        for tensor in self._graph.inputs:
            shape = shape_of(tensor, sizes)
            if tensor.name == "pixel_values":
                feeds[tensor.name] = self._pixels(shape, rng)
            elif tensor.name == "attention_mask":
                feeds[tensor.name] = padding_mask(shape)
            elif tensor.name == "token_type_ids":
                feeds[tensor.name] = token_types(shape, tensor.exclusive_max or 1)
            else:
                feeds[tensor.name] = self._tokens(tensor, shape, rng)
        if {"input_ids", "attention_mask"} <= feeds.keys():
            ids, mask = feeds["input_ids"], feeds["attention_mask"]
            feeds["input_ids"] = np.where(mask == 1, ids, np.int64(self._pad_id))
            for row, length in enumerate(mask.sum(1)[: max(1, len(mask) - 1)]):
                for mark in self._marks:
                    feeds["input_ids"][row, rng.integers(0, length)] = mark
        return feeds

    def _tokens(self, tensor: Tensor, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        below = tensor.exclusive_max or 2
        if self._ids is None:
            return rng.integers(0, below, shape, dtype=np.int64)
        starts = rng.integers(0, len(self._ids), (shape[0], 1))
        return np.take(self._ids, starts + np.arange(shape[1]), mode="wrap") % below

    def _pixels(self, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        """Crop the photographs at random, each crop at least a third of the photograph on a side."""
        crops = []
        for row in range(shape[0]):
            photo = self._photos[row % len(self._photos)]
            width, height = (int(side * rng.uniform(1 / 3, 1)) for side in photo.size)
            left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
            crops.append(photo.crop((int(left), int(top), int(left) + width, int(top) + height)))
        if self._preprocess is not None:
            if self._preprocess.resize is None and self._preprocess.crop is None:  # it takes the exact size only
                crops = [crop.resize((shape[3], shape[2])) for crop in crops]
            return self._preprocess(crops)
        return np.stack([plain_pixels(crop, shape[1:]) for crop in crops])


def parity_inputs(
    graphs: Iterable[Graph],
    text: TextTokenizer | None,
    preprocess: ImagePreprocess | None,
    marks: Sequence[int] = (),
) -> dict[str, ParityInputs]:
    """Make the inputs of each graph, by the graph's name."""
    return {graph.name: ParityInputs(graph, text, preprocess, marks) for graph in graphs}


def single_rows(feeds: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Yield the rows of a batch one by one: where rows cannot affect each other, this takes less memory."""
    for row in range(len(next(iter(feeds.values())))):
        yield {name: array[row : row + 1] for name, array in feeds.items()}


def passage_ids(text: TextTokenizer) -> Array:
    """Encode the passage as one array of token ids, (n,), special tokens of each line included."""
    batch = text.encode(passage(), truncate=True)
    return np.extract(batch.attention_mask, batch.input_ids)


def padding_mask(shape: tuple[int, ...]) -> Array:
    """Make an int64 mask (B, S): row 0 full, each further row a seventh of S shorter, at least one token real."""
    S = shape[1]
    lengths = np.array([max(1, S - row * S // 7 % S) for row in range(shape[0])])
    return (np.arange(S) < lengths[:, None]).astype(np.int64)


def token_types(shape: tuple[int, ...], kinds: int) -> Array:
    """Make int64 types (B, S): every second row has its second half of type 1, as a pair of texts would."""
    types = np.zeros(shape, np.int64)
    types[1::2, shape[1] // 2 :] = min(1, kinds - 1)
    return types


def plain_pixels(photo: PillowImage.Image, shape: tuple[int, ...]) -> Array:
    """Return the brightness in -1..1, (C, height, width), for models of other than three channels."""
    grey = np.asarray(photo.convert("L").resize((shape[2], shape[1])), np.float32)
    return np.broadcast_to(grey / 127.5 - 1, shape).astype(np.float32)
