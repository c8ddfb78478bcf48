"""pixel_values equal those of transformers' PIL processors, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL.Image import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPProcessor,
    CLIPTokenizer,
    DeiTImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import load_image

from image_cases import FEW, PHOTOS, settings_of, small_photo, their_pixels
from transom.export.processors.image import image_preprocess_from_checkpoint
from transom.runtime.image_loading import open_image
from transom.runtime.image_preprocess import FILTERS, ExactSize, ImagePreprocess, ShortestEdge


@pytest.fixture(scope="module")
def photo() -> Image:
    return small_photo()


def our_preprocess(processor: Any, folder: Path, height: int, width: int) -> ImagePreprocess:
    """Ours, by way of the checkpoint's file and the bundle's JSON."""
    processor.save_pretrained(folder)
    made = image_preprocess_from_checkpoint(folder, height, width)
    return ImagePreprocess.from_json(json.loads(json.dumps(made.to_json())))


# ---- equality with transformers


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("number", range(len(FILTERS)), ids=FILTERS)
def test_every_filter_on_a_photograph(number: int, name: str, tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(resample=number, size={"height": 96, "width": 128})
    ours = our_preprocess(processor, tmp_path, 96, 128)
    assert ours.resample == FILTERS[number]
    np.testing.assert_array_equal(ours([PHOTOS / name]), their_pixels(processor, PHOTOS / name), strict=True)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(),
        DeiTImageProcessorPil(),
        CLIPImageProcessorPil(),
        BitImageProcessorPil(),
        CLIPImageProcessorPil(size={"shortest_edge": 256, "longest_edge": 300}),
        CLIPImageProcessorPil(do_resize=False),
        CLIPImageProcessorPil(do_resize=False, crop_size={"height": 512, "width": 333}),
        CLIPImageProcessorPil(do_normalize=False),
        CLIPImageProcessorPil(do_rescale=False),
        ViTImageProcessorPil(do_rescale=False, do_normalize=False),
        ViTImageProcessorPil(rescale_factor=1 / 127.5, image_mean=[1.0, 1.0, 1.0], image_std=0.7),
        ViTImageProcessorPil(do_center_crop=True, crop_size=[200, 220]),
        DeiTImageProcessorPil(size=[300, 200], crop_size=250),
    ],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_every_processor_on_a_photograph(processor: Any, name: str, tmp_path: Path) -> None:
    theirs = their_pixels(processor, PHOTOS / name)
    ours = our_preprocess(processor, tmp_path, *theirs.shape[2:])
    np.testing.assert_array_equal(ours([PHOTOS / name]), theirs.astype(np.float32), strict=True)


def alpha(image: Image) -> Image:
    return PIL.Image.radial_gradient("L").resize(image.size)


def with_alpha(image: Image, mode: str) -> Image:
    image = image.convert(mode[:-1])
    image.putalpha(alpha(image))
    return image


def sixteen_bit(image: Image) -> Image:
    """PIL clips these at 255 when it makes RGB of them: half of the photograph goes white."""
    return PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 2)


def animated(image: Image) -> dict[str, Any]:
    return {"save_all": True, "append_images": [image.rotate(90)]}


# file name -> (image to save, options); the modes are those that files really come in
VARIANTS: dict[str, Callable[[Image], tuple[Image, dict[str, Any]]]] = {
    "rgb.jpg": lambda i: (i, {"quality": 70}),
    "progressive.jpg": lambda i: (i, {"progressive": True}),
    "grey.jpg": lambda i: (i.convert("L"), {}),
    "cmyk.jpg": lambda i: (i.convert("CMYK"), {}),
    "two_frames.mpo": lambda i: (i, animated(i)),
    "rgb.png": lambda i: (i, {}),
    "grey.png": lambda i: (i.convert("L"), {}),
    "grey_alpha.png": lambda i: (with_alpha(i, "LA"), {}),
    "alpha.png": lambda i: (with_alpha(i, "RGBA"), {}),
    "transparent_colour.png": lambda i: (i, {"transparency": i.getpixel((3, 3))}),
    "palette.png": lambda i: (i.quantize(16), {}),
    "palette_transparent_index.png": lambda i: (i.quantize(16), {"transparency": 3}),
    "palette_alpha.png": lambda i: (i.quantize(16), {"transparency": bytes(range(0, 256, 16))}),
    "one_bit.png": lambda i: (i.convert("1"), {}),
    "sixteen_bit.png": lambda i: (sixteen_bit(i), {}),
    "rgb.webp": lambda i: (i, {"quality": 60}),
    "alpha.webp": lambda i: (with_alpha(i, "RGBA"), {"lossless": True}),
    "two_frames.webp": lambda i: (i, animated(i)),
    "palette.gif": lambda i: (i.quantize(64), {}),
    "two_frames.gif": lambda i: (i.quantize(64), {**animated(i), "transparency": 5}),
    "rgb.bmp": lambda i: (i, {}),
    "palette.bmp": lambda i: (i.quantize(64), {}),
    "rgb.tiff": lambda i: (i, {}),
    "cmyk.tiff": lambda i: (i.convert("CMYK"), {"compression": "tiff_lzw"}),
    "sixteen_bit.tiff": lambda i: (sixteen_bit(i), {}),
    "float.tiff": lambda i: (i.convert("F"), {}),
    "integer.tiff": lambda i: (i.convert("I"), {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_file(name: str, photo: Image, tmp_path: Path) -> None:
    image, options = VARIANTS[name](photo)
    path = tmp_path / name
    image.save(path, **options)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=37)
    ours = our_preprocess(processor, tmp_path, 37, 37)
    theirs = their_pixels(processor, path)
    np.testing.assert_array_equal(ours([path]), theirs, strict=True)
    np.testing.assert_array_equal(ours([path.read_bytes()]), theirs)
    with PIL.Image.open(path) as opened:
        np.testing.assert_array_equal(ours([opened]), theirs)
    assert np.ptp(theirs) > 1, "the variant should still show the photograph"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation: int, suffix: str, photo: Image, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    photo.save(path, exif=exif)
    processor = ViTImageProcessorPil(size={"height": 30, "width": 50})
    ours = our_preprocess(processor, tmp_path, 30, 50)
    np.testing.assert_array_equal(ours([path]), their_pixels(processor, path))
    assert open_image(path).size == ((101, 151) if orientation in (5, 6, 7, 8) else (151, 101))


def test_orientation_turns_this_corner(tmp_path: Path) -> None:
    """Orientation 6 means: stored lying on its left side, so the stored top left is the upright top right."""
    stored = PIL.Image.new("RGB", (3, 2))
    stored.putpixel((0, 0), (255, 0, 0))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == (2, 3)
    assert upright.getpixel((1, 0)) == (255, 0, 0)
    assert open_image(upright).size == (2, 3), "an image that is upright already is not turned again"


def test_orientation_in_xmp(photo: Image, tmp_path: Path) -> None:
    path = tmp_path / "xmp.webp"
    photo.save(path, xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>')
    assert open_image(path).size == load_image(str(path)).size == (101, 151)


SIDE = st.integers(1, 70)


@FEW
@given(
    image_size=st.tuples(SIDE, SIDE),
    size=st.one_of(
        st.none(),
        st.fixed_dictionaries({"height": SIDE, "width": SIDE}),
        st.fixed_dictionaries({"shortest_edge": SIDE}),
        st.fixed_dictionaries({"shortest_edge": SIDE, "longest_edge": st.integers(70, 90)}),
    ),
    crop=st.tuples(SIDE, SIDE),
    number=st.integers(0, 5),
)
def test_any_size(
    image_size: tuple[int, int],
    size: dict[str, int] | None,
    crop: tuple[int, int],
    number: int,
    tmp_path: Path,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*image_size, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(
        size=size,
        do_resize=size is not None,
        crop_size={"height": crop[0], "width": crop[1]},
        resample=number,
    )
    ours = our_preprocess(processor, tmp_path, *crop)
    theirs = their_pixels(processor, PIL.Image.fromarray(noise))
    np.testing.assert_array_equal(ours([noise]), theirs, strict=True)


OPENAI = {  # preprocessor_config.json of OpenAI's CLIP checkpoints
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
AS_CLIPS: dict[str, Callable[[Image], Image]] = {
    "as it is": lambda i: i,
    "wide": lambda i: i.resize((997, 61)),
    "tall": lambda i: i.resize((61, 997)),
    "one pixel wide": lambda i: i.resize((1, 100)),
    "one pixel high": lambda i: i.resize((100, 1)),
    "one pixel": lambda i: i.resize((1, 1)),
    "the size itself": lambda i: i.resize((224, 224)),
    "one short of it": lambda i: i.resize((223, 225)),
    "large": lambda i: i.resize((4001, 2999)),
    "RGBA": lambda i: with_alpha(i, "RGBA"),
    "grey": lambda i: i.convert("L"),
    "grey and alpha": lambda i: with_alpha(i, "LA"),
    "palette": lambda i: i.quantize(16),
    "one bit": lambda i: i.convert("1"),
    "CMYK": lambda i: i.convert("CMYK"),
}


@pytest.mark.parametrize("name", AS_CLIPS)
def test_images_as_openais_clip_takes_them(name: str, photo: Image, tmp_path: Path) -> None:
    """Through the older checkpoint's own file, and through what CLIPProcessor writes today."""
    image = AS_CLIPS[name](photo)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OPENAI))
    ours = image_preprocess_from_checkpoint(tmp_path, 224, 224)
    processor = pil_processor(tmp_path)
    theirs = their_pixels(processor, image)
    np.testing.assert_array_equal(ours([image]), theirs, strict=True)
    assert theirs.shape == (1, 3, 224, 224)
    CLIPProcessor(processor, CLIPTokenizer()).save_pretrained(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").glob("*processor*")] == ["processor_config.json"]
    assert image_preprocess_from_checkpoint(tmp_path / "new", 224, 224) == ours


def pil_processor(folder: Path) -> Any:
    """AutoImageProcessor's, of the backend whose pixels are ours."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert type(processor) is CLIPImageProcessorPil
    return processor


@pytest.mark.parametrize("words", [None, {}, {"size": 240, "crop_size": 200}, {"do_normalize": False}], ids=repr)
def test_clips_processor_where_the_file_names_none(words: dict[str, Any] | None, photo: Image, tmp_path: Path) -> None:
    """The model's type decides; without a file transformers has no answer, and CLIP's defaults are ours."""
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    if words is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(words))
    processor = CLIPImageProcessorPil() if words is None else pil_processor(tmp_path)
    theirs = their_pixels(processor, photo)
    ours = image_preprocess_from_checkpoint(tmp_path, *theirs.shape[2:])
    np.testing.assert_array_equal(ours([photo]), theirs, strict=True)


@pytest.mark.parametrize("side", [16, 75, 112, 225, 336])
def test_a_clip_of_another_size_resizes_and_crops_to_it(side: int, photo: Image, tmp_path: Path) -> None:
    """As the processor of OpenAI's 336-pixel model does: both numbers are the model's size."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OPENAI))
    ours = image_preprocess_from_checkpoint(tmp_path, side, side)
    theirs = their_pixels(CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side), photo)
    np.testing.assert_array_equal(ours([photo]), theirs, strict=True)


def test_a_batch_of_different_images(photo: Image, tmp_path: Path) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    ours = our_preprocess(processor, tmp_path, 24, 24)
    images = [
        PHOTOS / "china.jpg",
        photo.convert("L"),
        np.asarray(photo),
        np.asarray(with_alpha(photo, "RGBA")),
    ]
    theirs = [their_pixels(processor, image if isinstance(image, Path) else as_image(image)) for image in images]
    batch = ours(images)
    assert batch.shape == (4, 3, 24, 24)
    np.testing.assert_array_equal(batch, np.concatenate(theirs))


def as_image(image: Image | np.ndarray) -> Image:
    return image if isinstance(image, Image) else PIL.Image.fromarray(image)


# ---- numbers that can be checked by eye


def test_levels_become_these_numbers() -> None:
    plain = settings_of(height=1, width=3)
    image = np.array([[[0, 51, 255], [1, 2, 3], [255, 255, 255]]], dtype=np.uint8)
    np.testing.assert_array_equal(plain([image])[0, :, 0], [[0, 1, 255], [51, 2, 255], [255, 3, 255]])
    scaled = replace(plain, rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25))
    np.testing.assert_allclose(scaled([image])[0, :, 0, 0], [-1.0, -0.6, 2.0], rtol=0, atol=1e-6)


def test_crop_takes_the_middle_and_pads_with_zeros() -> None:
    row = np.arange(10, 15, dtype=np.uint8).reshape(1, 5)
    assert crop_row(row, 2) == [11, 12]
    assert crop_row(row, 3) == [11, 12, 13]
    assert crop_row(row, 8) == [0, 0, 10, 11, 12, 13, 14, 0]


def crop_row(row: np.ndarray, width: int) -> list[float]:
    values: list[float] = settings_of(crop=ExactSize(1, width), height=1, width=width)([row])[0, 0, 0].tolist()
    return values


def test_padding_is_normalised_like_black() -> None:
    ours = settings_of(crop=ExactSize(4, 4), mean=(1.0, 1.0, 1.0), std=(2.0, 2.0, 2.0))
    pixels = ours([np.full((2, 2), 5, dtype=np.uint8)])
    assert (pixels[0, 0, 0, 0], pixels[0, 0, 1, 1]) == (-0.5, 2.0)


def test_one_channel_is_the_luma_and_leaves_grey_alone() -> None:
    ours = settings_of(channels=1, height=1, width=3)
    image = np.array([[[255, 0, 0], [0, 255, 0], [77, 77, 77]]], dtype=np.uint8)
    assert ours([image]).tolist() == [[[[76.0, 150.0, 77.0]]]]  # 0.299 * 255, 0.587 * 255


def test_the_shortest_edge_keeps_proportions() -> None:
    assert ShortestEdge(224).size_for(427, 640) == (224, 335)  # 335.7 is cut, not rounded
    assert ShortestEdge(224).size_for(640, 427) == (335, 224)
    assert ShortestEdge(224, 300).size_for(427, 640) == (200, 300)
    assert ShortestEdge(8, 199).size_for(7, 200) == get_size_with_aspect_ratio((7, 200), 8, 199) == (7, 200)


def test_the_users_image_is_left_as_it_was(photo: Image) -> None:
    image = photo.quantize(16)
    image.info["transparency"] = bytes(16)
    open_image(image)
    assert image.mode == "P"
    assert image.info["transparency"] == bytes(16)
