"""Images that are damaged, hostile or none: one clear error each, and no more memory than they deserve."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL.Image import Image

from image_cases import FEW, PHOTOS, settings_of, small_photo
from transom.runtime.errors import InputError
from transom.runtime.image_loading import MAX_IMAGE_PIXELS, open_image
from transom.runtime.image_preprocess import ExactSize, ShortestEdge


@pytest.fixture(scope="module")
def photo() -> Image:
    return small_photo()


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
