"""A checkpoint's image processor, read as the object ``preprocess`` of bundle.json.

Follows ``transformers.models.auto.image_processing_auto`` and the PIL processors' defaults, 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transom.models.json_files import read_optional
from transom.runtime.errors import CheckpointError
from transom.runtime.image_preprocess import FILTERS, ExactSize, Fractions, ImagePreprocess, ShortestEdge

HALF = (0.5, 0.5, 0.5)  # transformers' IMAGENET_STANDARD_MEAN and _STD
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Defaults:
    """Settings of an image processor where its file has none."""

    size: ExactSize | ShortestEdge
    resample: str
    crop: ExactSize | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    convert_rgb: bool = False
    crop_first: bool = False  # ``crop`` against ``size`` is the part of the image that is kept, before the resize


VIT = Defaults(ExactSize(224, 224), "bilinear", None, HALF, HALF)
DEIT = Defaults(ExactSize(256, 256), "bicubic", ExactSize(224, 224), HALF, HALF)
PERCEIVER = Defaults(ExactSize(224, 224), "bicubic", ExactSize(256, 256), IMAGENET_MEAN, IMAGENET_STD, crop_first=True)
CLIP = Defaults(ShortestEdge(224), "bicubic", ExactSize(224, 224), CLIP_MEAN, CLIP_STD, convert_rgb=True)

PROCESSORS = {
    "ViTImageProcessor": VIT,
    "DeiTImageProcessor": DEIT,
    "CLIPImageProcessor": CLIP,
    "BitImageProcessor": CLIP,
    "PerceiverImageProcessor": PERCEIVER,
    "ViTHybridImageProcessor": CLIP,
}
PROCESSOR_OF = {  # by config.json's model_type; the others' is ViTImageProcessor
    "clip": "CLIPImageProcessor",
    "perceiver": "PerceiverImageProcessor",
    "vit-hybrid": "ViTHybridImageProcessor",
}


def image_preprocess_from_checkpoint(folder: Path, height: int, width: int, channels: int = 3) -> ImagePreprocess:
    """Read how images of this checkpoint become (channels, height, width), the size of the exported model.

    Reads preprocessor_config.json, or the image_processor within processor_config.json, which wins as
    in transformers; where neither names a processor it is that of config.json's model type, and without
    either file that one's defaults. Where the file was written for another size than the model's, resize
    and crop are scaled to the model's. Raises CheckpointError for a processor or a setting that is not
    defined here, and for a file that is damaged.
    """
    settings, path = _read(folder)
    defaults = _defaults(settings, path, read_optional(folder / "config.json").get("model_type"))
    for name in ("do_pad", "use_square_size"):
        if _flag(settings, name, False, path):
            raise _refusal(path, f"{name} is true, which Transom does not define")
    resize = _size(settings, defaults, path) if _flag(settings, "do_resize", True, path) else None
    cropping = _flag(settings, "do_center_crop", defaults.crop is not None, path)
    crop = _crop(settings, defaults, path) if cropping else None
    first = None
    if defaults.crop_first:
        first, crop = _first(settings, defaults, crop, path), None
    resize, crop = _scaled(resize, crop, height, width, path)
    rescaling = _flag(settings, "do_rescale", True, path)
    normalising = _flag(settings, "do_normalize", True, path)
    made = ImagePreprocess(
        resize=resize,
        resample=_filter(settings, defaults, path) if resize else defaults.resample,
        crop=crop,
        rescale=_given(settings, "rescale_factor", 1 / 255, path) if rescaling else None,
        mean=_per_channel(settings, "image_mean", defaults.mean, channels, path) if normalising else None,
        std=_per_channel(settings, "image_std", defaults.std, channels, path) if normalising else None,
        channels=channels,
        height=height,
        width=width,
        transparent_to_white=_flag(settings, "do_convert_rgb", defaults.convert_rgb, path),
        crop_first=first,
    )
    problems = made.problems()  # the reader's own checks, before anything is written
    if problems:
        raise _refusal(path, "; ".join(problems))
    return made


def processor_size(folder: Path) -> tuple[int, int] | None:
    """Return (height, width) that the checkpoint's image processor resizes to; None where its file gives no such size.

    Another size of the model is settled by ``image_preprocess_from_checkpoint``.
    """
    size = _read(folder)[0].get("size")
    if _is_side(size):
        size = {"height": size, "width": size}
    if not isinstance(size, dict) or size.keys() != {"height", "width"} or not all(map(_is_side, size.values())):
        return None
    return size["height"], size["width"]


def _read(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the processor's settings and the path of their file; empty settings without a file."""
    nested, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    settings = read_optional(nested).get("image_processor")
    if settings is not None:
        if not isinstance(settings, dict):
            raise _refusal(nested, f"image_processor is a {type(settings).__name__}, expected an object")
        return settings, nested
    return read_optional(own), own


def _defaults(settings: Mapping[str, Any], path: Path, model_type: object) -> Defaults:
    """Return the defaults of the processor's class, by its name since or before transformers 4.26."""
    name = settings.get("image_processor_type")
    if name is None:
        name = str(settings.get("feature_extractor_type") or PROCESSOR_OF.get(str(model_type), "ViTImageProcessor"))
        name = name.replace("FeatureExtractor", "ImageProcessor")
    known = PROCESSORS.get(str(name).removesuffix("Fast").removesuffix("Pil"))
    if known is None:
        raise _refusal(path, f"the image processor is {name!r}; defined are {', '.join(PROCESSORS)}")
    return known


def _given(settings: Mapping[str, Any], name: str, default: Any, path: Path) -> Any:
    """Return a setting that is needed; null is an error and not the default, as in transformers."""
    value = settings.get(name, default)
    if value is None:
        lack = "null" if name in settings else "missing"
        raise _refusal(path, f"{name} is {lack} and the step that needs it is on")
    return value


def _flag(settings: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    value = settings.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise _refusal(path, f"{name} is {value!r}, expected true or false")
    return bool(value)


def _size(settings: Mapping[str, Any], defaults: Defaults, path: Path) -> ExactSize | ShortestEdge:
    """Return ``size``; a single number is the side of a square, or the shortest edge with CLIP's defaults."""
    value = _given(settings, "size", defaults.size, path)
    if _is_side(value):
        return ExactSize(value, value) if isinstance(defaults.size, ExactSize) else ShortestEdge(value)
    return _target(value, "size", path)


def _crop(settings: Mapping[str, Any], defaults: Defaults, path: Path) -> ExactSize:
    value = _given(settings, "crop_size", defaults.crop, path)
    target = ExactSize(value, value) if _is_side(value) else _target(value, "crop_size", path)
    if isinstance(target, ShortestEdge):
        raise _refusal(path, f"crop_size is {value!r}, expected an integer or height and width")
    return target


def _first(settings: Mapping[str, Any], defaults: Defaults, crop: ExactSize | None, path: Path) -> Fractions | None:
    """Return the part of an image that Perceiver's processor keeps: size against crop_size, of the shorter side."""
    if crop is None:
        return None
    size = _size(settings, defaults, path)
    if not isinstance(size, ExactSize):
        raise _refusal(path, f"size is {settings.get('size')!r}, expected an integer or height and width")
    return Fractions(size.height / crop.height, size.width / crop.width)


def _target(value: object, name: str, path: Path) -> ExactSize | ShortestEdge:
    """Parse [height, width], {height, width}, {shortest_edge} or {shortest_edge, longest_edge}."""
    if isinstance(value, (ExactSize, ShortestEdge)):
        return value
    if isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if isinstance(value, dict) and all(map(_is_side, value.values())):
        if value.keys() == {"height", "width"}:
            return ExactSize(**value)
        if value.keys() in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}):
            return ShortestEdge(**value)
    raise _refusal(
        path,
        f"{name} is {value!r}, expected a positive integer, [height, width], or an object with height and "
        "width, with shortest_edge, or with shortest_edge and longest_edge",
    )


def _scaled(
    resize: ExactSize | ShortestEdge | None, crop: ExactSize | None, height: int, width: int, path: Path
) -> tuple[ExactSize | ShortestEdge | None, ExactSize | None]:
    """Scale resize and crop to a model of (height, width), in the file's proportion.

    Without a crop an exact resize goes straight to the model's size.
    """
    if crop is None:
        return (ExactSize(height, width) if isinstance(resize, ExactSize) else resize), None
    if isinstance(resize, ExactSize):
        rows, columns = resize.height * height / crop.height, resize.width * width / crop.width
        resize = ExactSize(round(rows), round(columns))
    elif resize is not None and crop != ExactSize(height, width):
        if crop.height * width != crop.width * height:
            source = f"{path}:" if path.is_file() else f"{path.parent} has no {path.name}; its model type's default"
            raise CheckpointError(
                f"{source} resizes the shortest edge and crops to {crop.height}x{crop.width}, which cannot be scaled "
                f"to a model of other proportions, {height}x{width}. Ask for an --image-size of the same proportions, "
                f"or write a {path.name} whose crop_size is the model's."
            )
        longest = resize.longest_edge
        resize = replace(
            resize,
            shortest_edge=round(resize.shortest_edge * height / crop.height),
            longest_edge=None if longest is None else round(longest * height / crop.height),
        )
    return resize, ExactSize(height, width)


def _filter(settings: Mapping[str, Any], defaults: Defaults, path: Path) -> str:
    number = _given(settings, "resample", FILTERS.index(defaults.resample), path)
    if type(number) is not int or not 0 <= number < len(FILTERS):
        known = ", ".join(f"{index} {name}" for index, name in enumerate(FILTERS))
        raise _refusal(path, f"resample is {number!r}, expected PIL's number of a filter: {known}")
    return FILTERS[number]


def _per_channel(
    settings: Mapping[str, Any], name: str, default: tuple[float, ...], channels: int, path: Path
) -> tuple[float, ...]:
    """Return one number per channel; a single number stands for all. Types are checked with the rest."""
    value = _given(settings, name, default[:channels], path)
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * channels


def _is_side(value: object) -> bool:
    return type(value) is int and value > 0


def _refusal(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}. Correct the file, or use another checkpoint.")
