"""Preprocess an image to ``pixel_values``: open, resize, crop, rescale, normalise, with PIL and numpy.

The arithmetic is that of transformers' PIL image processors (``image_processing_backends.PilBackend``
and ``image_transforms``, 5.23) after ``image_utils.load_image``, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.image_loading import MAX_IMAGE_PIXELS, open_image
from transom.runtime.json_reader import Fields

if TYPE_CHECKING:
    from PIL.Image import Image

    from transom.runtime.image_loading import ImageSource

MAX_FRACTION = 16  # of the shorter side; a crop beyond 1 adds zeros around the image
MAX_SIDE = 8192  # pixels of a model's input or of a resize target; far past any ViT

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # index: PIL's Resampling number


@dataclass(frozen=True)
class ExactSize:
    """Height and width in pixels, whatever the image's proportions."""

    height: int
    width: int

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class ShortestEdge:
    """The shorter side in pixels, proportions kept; ``longest_edge`` bounds the other side."""

    shortest_edge: int
    longest_edge: int | None = None

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) that an image of that size is resized to, rounded as transformers does."""
        edge: float = self.shortest_edge
        short, long = min(height, width), max(height, width)
        if self.longest_edge is not None and long / short * edge > self.longest_edge:
            edge = self.longest_edge * float(short) / long
        new_short, new_long = round(edge), int(edge * long / short)
        if new_short == short:
            new_long = long
        return (new_long, new_short) if width <= height else (new_short, new_long)


@dataclass(frozen=True)
class Fractions:
    """Height and width of a crop, as fractions of the image's shorter side; Perceiver's processor has 224/256 each."""

    height: float
    width: float

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the crop of an image of that size, cut off as transformers does."""
        shorter = min(height, width)
        return int(self.height * shorter), int(self.width * shorter)


@dataclass(frozen=True)
class ImagePreprocess:
    """The object ``preprocess`` of bundle.json: settings that turn an image into (channels, height, width) floats.

    resize    target of the resize, or None to leave the size alone
    resample  filter of the resize, one of FILTERS
    crop      centre crop after it, zeros around an image that is smaller; or None
    rescale   factor of the 0..255 levels, or None
    mean, std one number per channel, subtracted and divided by, or both None
    channels  3 (RGB), or 1 (luma, ITU-R 601-2)
    transparent_to_white  paint white what a file marks as its transparent colour (PNG's tRNS, GIF); an
              alpha channel is dropped either way
    crop_first  centre crop before the resize, zeros around an image that is smaller; or None
    """

    resize: ExactSize | ShortestEdge | None
    resample: str
    crop: ExactSize | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channels: int
    height: int
    width: int
    transparent_to_white: bool = False
    crop_first: Fractions | None = None

    @classmethod
    def from_json(cls, obj: object) -> ImagePreprocess:
        """Read and check the JSON object; BundleError lists everything that is wrong with it."""
        fields = Fields(obj, "preprocess")
        made = cls._read(fields)
        fields.done()
        return made

    @classmethod
    def _read(cls, fields: Fields) -> ImagePreprocess:
        """Take the fields; problems, contradictions among them too, are noted there."""
        sides, numbers = f"each in 1..{MAX_SIDE}, or null", "a list of finite numbers, or null"
        resize = fields.take(
            "resize", _is_resize, f"{{height, width}}, {{shortest_edge}} or {{shortest_edge, longest_edge}}, {sides}"
        )
        crop = fields.take(
            "crop", lambda value: value is None or _is_sides(value, EXACT), f"{{height, width}}, {sides}"
        )
        mean, std = (fields.take(name, _are_numbers, numbers) for name in ("mean", "std"))
        first = fields.take(
            "crop_first", _is_fractions, f"{{height, width}}, each a number in 0..{MAX_FRACTION}, or null", None
        )
        made = cls(
            resize=resize and (ExactSize(**resize) if resize.keys() == EXACT else ShortestEdge(**resize)),
            resample=fields.text("resample", among=FILTERS),
            crop=crop and ExactSize(**crop),
            rescale=fields.take("rescale", lambda value: value is None or _is_number(value), "a number, or null"),
            mean=mean and tuple(mean),
            std=std and tuple(std),
            channels=fields.take(
                "channels", lambda value: type(value) is int and value in (1, 3), "3 (RGB) or 1 (grey)"
            ),
            height=fields.integer("height", 1, MAX_SIDE),
            width=fields.integer("width", 1, MAX_SIDE),
            transparent_to_white=fields.boolean("transparent_to_white"),
            crop_first=first and Fractions(**first),
        )
        if not fields.problems:
            fields.problems += made._contradictions()
        return made

    def problems(self) -> list[str]:
        """Return what ``from_json`` would refuse in these settings; normally nothing."""
        fields = Fields(self.to_json(), "preprocess", [])
        self._read(fields)
        return fields.problems

    def _contradictions(self) -> list[str]:
        """Return what keeps these settings from giving (channels, height, width) for every image."""
        final = self.crop or self.resize
        if self.crop_first is not None and not isinstance(final, ExactSize):
            return ["a crop to a part of the image without a resize or crop behind it gives images of any size"]
        if isinstance(final, ShortestEdge):
            return ["a resize to a shortest edge without a crop gives another size for every image"]
        if final is not None and (final.height, final.width) != (self.height, self.width):
            return [f"images end at {final.height}x{final.width}, the model takes {self.height}x{self.width}"]
        if (self.mean is None) != (self.std is None):
            return ["one of mean and std is null, expected both or neither"]
        if self.mean is not None and not len(self.mean) == len(self.std or ()) == self.channels:
            return [f"mean {self.mean} and std {self.std} need one number for each of {self.channels} channels"]
        if not np.isfinite(self.levels).all():
            return ["std is 0, or rescale, mean and std leave the range of float32"]
        return []

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``from_json`` reads back to an equal value."""
        found = asdict(self)
        for name in ("resize", "crop"):
            found[name] = found[name] and {k: v for k, v in found[name].items() if v is not None}
        for name in ("mean", "std"):
            found[name] = found[name] and list(found[name])
        if self.crop_first is None:  # versions before it know no such key
            del found["crop_first"]
        return found

    @cached_property
    def levels(self) -> NDArray[np.float32]:
        """(channels, 256): the float that each level of a channel becomes.

        As transformers computes per pixel: rescaled in float64, rounded to float32, normalised in float32.
        """
        with np.errstate(all="ignore"):  # ``problems`` reports results that are not finite
            row = np.arange(256, dtype=np.float64)
            row = row if self.rescale is None else row * self.rescale
            table = np.repeat(row.astype(np.float32)[np.newaxis], self.channels, axis=0)
            if self.mean is not None and self.std is not None:
                mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
                table = (table - mean[:, np.newaxis]) / std[:, np.newaxis]
        return table

    def __call__(self, images: Sequence[ImageSource], name: Callable[[int], str] | None = None) -> NDArray[np.float32]:
        """Return ``pixel_values``, float32 (N, channels, height, width), of anything that ``open_image`` takes.

        Raises InputError naming the image when one cannot be opened or does not fit, as ``name`` says or by its
        place in ``images``.
        """
        if not isinstance(images, (list, tuple)) or not images:
            got = "an empty list" if isinstance(images, (list, tuple)) else f"a {type(images).__name__}"
            raise InputError(f"images is {got}, expected a list of at least one image.")
        out = np.empty((len(images), self.channels, self.height, self.width), dtype=np.float32)
        for index, source in enumerate(images):
            try:
                pixels = self._fit(open_image(source))
            except InputError as error:
                which = f"image {index} of {len(images)}" if name is None else name(index)
                raise InputError(f"{which}: {error}") from None
            for channel, table in enumerate(self.levels):
                out[index, channel] = table[pixels[:, :, channel]]
        return out

    def _fit(self, image: Image) -> NDArray[np.uint8]:
        """Resize and crop: uint8 (height, width, channels)."""
        if self.transparent_to_white and image.info.get("transparency") is not None:
            image = _on_white(image)
        if self.channels == 1:
            image = image.convert("L")
        if self.crop_first is not None:
            image = _cropped(image, *self.crop_first.size_for(image.height, image.width))
        if self.resize is not None:
            height, width = self.resize.size_for(image.height, image.width)
            if not 0 < height * width <= MAX_IMAGE_PIXELS:
                raise InputError(
                    f"it is {image.width}x{image.height} pixels (width x height), so elongated that resizing "
                    f"its shorter side gives {width}x{height}. Crop it first."
                )
            image = image.resize((width, height), resample=FILTERS.index(self.resample))
        pixels = np.atleast_3d(np.asarray(image))
        if self.crop is not None:
            return centre_crop(pixels, self.crop.height, self.crop.width)
        if pixels.shape[:2] != (self.height, self.width):
            raise InputError(
                f"it is {image.width}x{image.height} pixels (width x height) and this bundle does not "
                f"resize. Hand over {self.width}x{self.height}."
            )
        return pixels


def centre_crop(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return the middle (height, width) of (H, W, C) levels, zeros where the image is smaller.

    Of an odd margin the larger part lies below and to the right of a crop, but above and to the left
    of a padded image, as ``transformers.image_transforms.center_crop`` has it.
    """
    starts, margins = [], []
    for have, wanted in ((pixels.shape[0], height), (pixels.shape[1], width)):
        starts.append(max(0, have - wanted) // 2)
        lacking = max(0, wanted - have)
        margins.append((lacking - lacking // 2, lacking // 2))
    top, left = starts
    return np.pad(pixels[top : top + height, left : left + width], [*margins, (0, 0)])


def _cropped(image: Image, height: int, width: int) -> Image:
    """Return the middle of an image as ``centre_crop`` does."""
    from PIL.Image import fromarray

    if not 0 < height * width <= MAX_IMAGE_PIXELS:
        raise InputError(
            f"it is {image.width}x{image.height} pixels (width x height), of which the middle {width}x{height} is "
            "used. Hand over a larger image."
        )
    pixels = centre_crop(np.atleast_3d(np.asarray(image)), height, width)
    return fromarray(pixels[:, :, 0] if image.mode == "L" else pixels)


def _on_white(image: Image) -> Image:
    """Convert as ``transformers.image_transforms.convert_to_rgb``: the transparent colour of RGB becomes white."""
    from PIL.Image import alpha_composite, new

    return alpha_composite(new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


EXACT, EDGE, EDGES = {"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}


def _is_sides(value: object, keys: set[str]) -> bool:
    """Return whether ``value`` is an object of these keys, each a number of pixels."""
    sides = value.values() if isinstance(value, dict) and value.keys() == keys else [0]
    return all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)


def _is_resize(value: object) -> bool:
    return value is None or any(_is_sides(value, keys) for keys in (EXACT, EDGE, EDGES))


def _is_fractions(value: object) -> bool:
    if value is None:
        return True
    sides = value.values() if isinstance(value, dict) and value.keys() == EXACT else [0]
    return all(_is_number(side) and 0 < side <= MAX_FRACTION for side in sides)


def _is_number(value: object) -> bool:
    """Return whether ``value`` is a number that float32 can hold; NaN is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e38


def _are_numbers(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_number, value)))
