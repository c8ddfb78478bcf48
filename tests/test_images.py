"""pixel_values equal those of transformers' PIL processors, bit for bit; bad images get one clear error."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
from hypothesis import HealthCheck, given, settings
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

from transom.export.image import image_preprocess_from_checkpoint
from transom.runtime.errors import BundleError, CheckpointError, InputError
from transom.runtime.images import MAX_IMAGE_PIXELS, open_image
from transom.runtime.preprocess import FILTERS, ExactSize, ImagePreprocess, ShortestEdge

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"  # china.jpg and flower.jpg, 640x427
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def photo() -> Image:
    with PIL.Image.open(PHOTOS / "china.jpg") as image:
        return image.resize((151, 101))  # small and odd on both sides


def their_pixels(processor: Any, image: Path | Image) -> np.ndarray:
    """transformers: load_image, then the processor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about palettes with transparency
        loaded = load_image(image if isinstance(image, Image) else str(image))
    return np.asarray(processor(loaded, return_tensors="np")["pixel_values"])


def our_preprocess(processor: Any, folder: Path, height: int, width: int) -> ImagePreprocess:
    """Ours, by way of the checkpoint's file and the bundle's JSON."""
    processor.save_pretrained(folder)
    made = image_preprocess_from_checkpoint(folder, height, width)
    return ImagePreprocess.from_json(json.loads(json.dumps(made.to_json())))


def settings_of(**changes: Any) -> ImagePreprocess:
    plain = ImagePreprocess(None, "bilinear", None, None, None, None, 3, 4, 4)
    return replace(plain, **changes)


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


# ---- bad images


def png(width: int, height: int) -> bytes:
    """A PNG's header of that size and next to no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """A WebP animation whose canvas is that large and whose only frame has 16x16 pixels."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (16, 16)).save(buffer, "WEBP")

    def u24(value: int) -> bytes:
        return value.to_bytes(3, "little")

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data

    frame = u24(0) * 2 + u24(15) * 2 + u24(100) + b"\0" + buffer.getvalue()[12:]
    body = chunk(b"VP8X", bytes([2, 0, 0, 0]) + u24(width - 1) + u24(height - 1))
    body += chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return chunk(b"RIFF", b"WEBP" + body)


def gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0;"


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 3, 0, 0, 54) + info + bytes(3)


BOMBS = {
    "png": png(20_000, 20_000),
    "webp": webp(13_000, 13_000),
    "gif": gif(60_000, 60_000),
    "bmp": bmp(30_000, 9_000),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("their_limit", [None, 10, 10**9])
def test_a_decompression_bomb_is_refused_by_its_header(
    kind: str, their_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever PIL's own global limit is, and without its warnings, which pytest would turn into errors."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", their_limit)
    said = r"\d+x\d+ pixels, expected 1 to 64000000 in all\. Scale it down"
    if kind == "webp" and their_limit == 10:
        said = r"is refused by PIL .* Scale it down"  # the one kind that PIL itself checks as it opens it
    with pytest.raises(InputError, match=said):
        open_image(BOMBS[kind])


def test_an_ordinary_image_does_not_depend_on_pils_limit(photo: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    assert open_image(buffer.getvalue()).size == (151, 101)
    assert PIL.Image.MAX_IMAGE_PIXELS == 10


def test_a_large_image_is_refused_in_memory_too() -> None:
    huge = PIL.Image.new("1", (MAX_IMAGE_PIXELS // 4000 + 1, 4000))
    with pytest.raises(InputError, match="the PIL image is 16001x4000 pixels, expected 1 to 64000000"):
        open_image(huge)


def test_an_elongated_image_is_no_bomb_by_way_of_the_resize() -> None:
    """200,000 pixels that would become 224 x 44,800,000 on the way to a crop of 224."""
    ours = settings_of(resize=ShortestEdge(224), crop=ExactSize(224, 224), height=224, width=224)
    with pytest.raises(InputError, match=r"200000x1 pixels .* gives 44800000x224. Crop it first"):
        ours([np.zeros((1, 200_000), dtype=np.uint8)])
    thin = replace(ours, resize=ShortestEdge(224, 300))
    with pytest.raises(InputError, match="gives 300x0"):
        thin([np.zeros((1, 200_000), dtype=np.uint8)])


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    notes = tmp_path / "notes.jpg"
    notes.write_text("not a picture")
    eps = tmp_path / "hostile.png"
    eps.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    svg = tmp_path / "drawing.svg"
    svg.write_text("<svg/>")
    empty = tmp_path / "empty.png"
    empty.touch()
    for path in (notes, eps, svg, empty):
        with pytest.raises(InputError, match="none of PNG, JPEG, WebP, BMP, GIF and TIFF"):
            open_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.1])
def test_a_truncated_file(suffix: str, kept: float, photo: Image, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    photo.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    if (suffix, kept) == ("gif", 0.99):
        return  # the last hundredth of this GIF holds nothing that its pixels need
    with pytest.raises(InputError, match=rf"a\.{suffix}' cannot be decoded: it is damaged or cut short \(.+\)"):
        open_image(path)


@FEW
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), data=st.data())
def test_damaged_bytes_give_an_image_or_our_error(kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((20, 14)).convert("RGB").save(buffer, kind)
    broken = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(2, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about corrupt EXIF
        with contextlib.suppress(InputError):
            assert open_image(bytes(broken)).mode == "RGB"


def test_a_path_that_leads_to_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.png", tmp_path, "a\0b.png", "x" * 10_000, str(tmp_path / "nothing.png")):
        with pytest.raises(InputError, match="is not a file that is there") as caught:
            open_image(path)
        assert len(str(caught.value)) < 400
    with pytest.raises(InputError, match="Download it first"):
        open_image("https://example.org/cat.png")


def test_a_closed_image_is_reported() -> None:
    image = PIL.Image.open(PHOTOS / "china.jpg")
    image.close()
    with pytest.raises(InputError, match="the PIL image cannot be decoded"):
        open_image(image)


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "float32 (4, 4, 3)"),
        (np.zeros((4, 4, 3), dtype=np.uint16), "uint16 (4, 4, 3)"),
        (np.zeros((3, 8, 8), dtype=np.uint8), "uint8 (3, 8, 8)"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "uint8 (4, 4, 2)"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "uint8 (2, 4, 4, 3)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "uint8 (0, 4, 3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_array_that_is_no_image(array: np.ndarray, got: str) -> None:
    with pytest.raises(InputError) as caught:
        open_image(array)
    assert f"is an array of {got}, expected uint8 (height, width), (height, width, 3)" in str(caught.value)


def test_other_things_are_no_images() -> None:
    for thing in (None, 3, [1, 2], object()):
        with pytest.raises(InputError, match="expected a path, the bytes of an image file, a PIL image or a uint8"):
            open_image(thing)  # type: ignore[arg-type]


def test_a_batch_names_the_image_that_failed(photo: Image) -> None:
    ours = settings_of(resize=ExactSize(4, 4))
    with pytest.raises(InputError, match=r"image 1 of 2: 'nothing\.png' is not a file"):
        ours([photo, "nothing.png"])
    for wrong in ("china.jpg", photo, np.zeros((2, 2), dtype=np.uint8)):
        with pytest.raises(InputError, match="expected a list of at least one image"):
            ours(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="images is an empty list"):
        ours([])


def test_without_resize_the_image_must_have_the_size(photo: Image) -> None:
    with pytest.raises(InputError, match=r"151x101 pixels .* does not resize. Hand over 4x4"):
        settings_of()([photo])


# ---- the JSON object


PLAIN: dict[str, Any] = {
    "resize": {"shortest_edge": 8, "longest_edge": 16},
    "resample": "bicubic",
    "crop": {"height": 4, "width": 5},
    "rescale": 1 / 255,
    "mean": [0.5, 0.25, 0],
    "std": [0.5, 0.5, 1],
    "channels": 3,
    "height": 4,
    "width": 5,
    "transparent_to_white": True,
}


def test_json_round_trip() -> None:
    made = ImagePreprocess.from_json(PLAIN)
    assert made.to_json() == PLAIN
    assert ImagePreprocess.from_json(made.to_json()) == made
    bare = settings_of()
    assert ImagePreprocess.from_json(json.loads(json.dumps(bare.to_json()))) == bare


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"resize": 8},
            "resize is 8, expected {height, width}, {shortest_edge} or {shortest_edge, longest_edge}",
        ),
        ({"resize": {"longest_edge": 8}}, "resize is"),
        ({"resize": {"height": 0, "width": 4}}, "resize is"),
        ({"resize": {"height": 10**6, "width": 4}}, "each in 1..8192, or null"),
        ({"resize": {"height": True, "width": 4}}, "resize is"),
        ({"crop": {"height": 4.0, "width": 5}}, "crop is"),
        ({"crop": {"shortest_edge": 4}}, "crop is"),
        ({"crop": None}, "a shortest edge without a crop gives another size for every image"),
        ({"crop": {"height": 9, "width": 5}}, "images end at 9x5, the model takes 4x5"),
        ({"crop": None, "resize": {"height": 3, "width": 3}}, "images end at 3x3, the model takes 4x5"),
        ({"resample": 3}, "resample is 3, expected one of nearest, lanczos, bilinear, bicubic, box, hamming"),
        ({"resample": []}, "resample is []"),
        ({"rescale": float("nan")}, "rescale is nan, expected a number, or null"),
        ({"rescale": 10**400}, "rescale is 1000"),
        ({"rescale": "1"}, "rescale is '1'"),
        ({"mean": [0, 0, float("inf")]}, "mean is [0, 0, inf], expected a list of finite numbers, or null"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"mean": None}, "one of mean and std is null, expected both or neither"),
        ({"mean": [0.5]}, "need one number for each of 3 channels"),
        ({"std": [1, 0, 1]}, "std is 0, or rescale, mean and std leave the range of float32"),
        ({"std": [1, 1e-60, 1]}, "std is 0"),
        ({"channels": 4}, "channels is 4, expected 3 (RGB) or 1 (grey)"),
        ({"channels": True}, "channels is True"),
        ({"height": -1}, "height is -1, expected 1..8192"),
        ({"width": "5"}, "width is '5'"),
        ({"transparent_to_white": 1}, "transparent_to_white is 1, expected true or false"),
        ({"gamma": 2}, "preprocess has the unknown key 'gamma'"),
    ],
    ids=repr,
)
def test_json_that_is_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError) as caught:
        ImagePreprocess.from_json({**PLAIN, **change})
    assert said in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(BundleError, match=r"crop is missing; .*height is 0, .*; preprocess.width is None"):
        ImagePreprocess.from_json({"height": 0, "width": None, "resize": None, "mean": None, "std": None})
    with pytest.raises(BundleError, match="preprocess is a list, expected an object"):
        ImagePreprocess.from_json([])


# ---- from the checkpoint's file


def from_words(folder: Path, words: object, height: int = 224, width: int = 224, channels: int = 3) -> ImagePreprocess:
    (folder / "preprocessor_config.json").write_text(json.dumps(words))
    return image_preprocess_from_checkpoint(folder, height, width, channels)


@pytest.mark.parametrize("stem", ["ViT", "DeiT", "CLIP", "Bit"])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"size": 240},
        {"size": [230, 250]},
        {"do_resize": None, "size": None, "do_center_crop": None, "do_rescale": None, "do_convert_rgb": None},
        {"do_center_crop": True, "crop_size": 224},
        {"do_center_crop": True, "crop_size": [224, 224], "size": {"shortest_edge": 230}},
        {"do_normalize": False, "do_convert_rgb": False},
        {"rescale_factor": 0.01, "image_mean": 0.25, "image_std": [1, 2, 3], "do_convert_rgb": True},
    ],
    ids=json.dumps,
)
def test_legacy_and_partial_files_mean_what_they_mean_in_transformers(
    words: dict[str, Any], stem: str, tmp_path: Path
) -> None:
    cls = {
        p.__name__: p
        for p in (ViTImageProcessorPil, DeiTImageProcessorPil, CLIPImageProcessorPil, BitImageProcessorPil)
    }
    processor = cls[f"{stem}ImageProcessorPil"](**words)
    transparent = tmp_path / "key.png"
    with PIL.Image.open(PHOTOS / "flower.jpg") as image:
        image.resize((300, 260)).quantize(8).save(transparent, transparency=2)
    theirs = their_pixels(processor, transparent)
    words = {**words, "feature_extractor_type": f"{stem}FeatureExtractor"}
    ours = from_words(tmp_path, words, *theirs.shape[2:])
    np.testing.assert_array_equal(ours([transparent]), theirs.astype(np.float32))


def test_without_a_file_it_is_vits_default_at_the_models_size(tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    made = image_preprocess_from_checkpoint(tmp_path, 32, 48)
    assert made == ImagePreprocess(ExactSize(32, 48), "bilinear", None, 1 / 255, half, half, 3, 32, 48)
    grey = image_preprocess_from_checkpoint(tmp_path, 8, 8, channels=1)
    assert (grey.channels, grey.mean, grey.std) == (1, (0.5,), (0.5,))


@pytest.mark.parametrize("ending", ["", "Fast", "Pil"])
@pytest.mark.parametrize(("stem", "resample"), [("ViT", "bilinear"), ("CLIP", "bicubic")])
def test_every_spelling_of_the_class(stem: str, resample: str, ending: str, tmp_path: Path) -> None:
    words = {"image_processor_type": f"{stem}ImageProcessor{ending}"}
    assert from_words(tmp_path, words).resample == resample


def test_the_nested_file_wins(tmp_path: Path) -> None:
    nested = {"image_processor": {"image_processor_type": "ViTImageProcessor", "resample": 0}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert from_words(tmp_path, {"image_processor_type": "ViTImageProcessor", "resample": 1}).resample == "nearest"
    (tmp_path / "processor_config.json").write_text("{}")
    assert from_words(tmp_path, {"image_processor_type": "ViTImageProcessor", "resample": 1}).resample == "lanczos"


def test_another_size_scales_resize_and_crop(tmp_path: Path) -> None:
    deit = from_words(tmp_path, {"image_processor_type": "DeiTImageProcessor"}, 448, 336)
    assert (deit.resize, deit.crop) == (ExactSize(512, 384), ExactSize(448, 336))
    clip = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 256, "longest_edge": 512}}
    made = from_words(tmp_path, clip, 112, 112)
    assert (made.resize, made.crop) == (ShortestEdge(128, 256), ExactSize(112, 112))
    vit = from_words(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 384}, 32, 64)
    assert (vit.resize, vit.crop) == (ExactSize(32, 64), None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "'ConvNextImageProcessor'; defined are ViTImageProcessor, ",
        ),
        ({"feature_extractor_type": "BeitFeatureExtractor"}, "'BeitImageProcessor'; defined are"),
        ({"image_processor_type": 7}, "the image processor is 7"),
        ({"size": "large"}, "size is 'large', expected a positive integer"),
        ({"size": {"longest_edge": 224}}, "size is {'longest_edge': 224}"),
        ({"size": -1}, "size is -1"),
        (
            {"size": {"shortest_edge": 224}},
            "a shortest edge without a crop gives another size for every image",
        ),
        ({"size": None}, "size is null and the step that needs it is on"),
        ({"resample": None}, "resample is null and the step that needs it is on"),
        ({"image_mean": None}, "image_mean is null and the step that needs it is on"),
        ({"do_center_crop": True}, "crop_size is missing and the step that needs it is on"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size is {'shortest_edge': 3}"),
        ({"do_resize": "yes"}, "do_resize is 'yes', expected true or false"),
        ({"do_pad": True}, "do_pad is true, which Transom does not define"),
        ({"resample": 9}, "resample is 9, expected PIL's number of a filter: 0 nearest, 1 lanczos"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"image_mean": [0.5, 0.5]}, "need one number for each of 3 channels"),
        ({"image_mean": "grey"}, "mean is ['grey', 'grey', 'grey']"),
        ({"image_std": [0, 1, 1]}, "std is 0"),
        ({"rescale_factor": float("nan")}, "rescale is nan"),
        ([], "holds a JSON list, expected an object"),
    ],
    ids=repr,
)
def test_a_file_that_cannot_be_followed(words: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_words(tmp_path, words)
    assert said in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)


def test_contradictions_with_the_model(tmp_path: Path) -> None:
    clip = {"image_processor_type": "CLIPImageProcessor"}
    with pytest.raises(CheckpointError, match="cannot be scaled to a model of other proportions, 224x448"):
        from_words(tmp_path, clip, 224, 448)
    with pytest.raises(CheckpointError, match=r"mean .* need one number for each of 1 channels"):
        from_words(tmp_path, {"image_mean": [0.5, 0.5, 0.5]}, channels=1)


@pytest.mark.parametrize("text", ["{", "", '{"size": ', "[" * 100_000, "\xff"])
def test_bad_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is not valid JSON"):
        image_preprocess_from_checkpoint(tmp_path, 224, 224)


def test_importing_preprocess_loads_no_pil() -> None:
    code = "import sys, transom.runtime.preprocess; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
