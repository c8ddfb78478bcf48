"""Open a path, bytes, a PIL image or an array as an upright RGB image, with limits on what is decoded.

The pixels are those of ``transformers.image_utils.load_image``, 5.23.
"""

from __future__ import annotations

import io
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageSource = str | os.PathLike[str] | bytes | Image | NDArray[np.uint8]

# Pixels of the largest image that is decoded or resized to: a 64 MP camera's. With four bytes a pixel and
# PIL's copies that is about 1 GB at worst; a header that claims more is taken for a decompression bomb.
MAX_IMAGE_PIXELS = 64_000_000

# What is opened, by its first bytes: raster formats only, so that no file starts an interpreter (EPS, PDF).
# The classes are used directly because PIL.Image.open warns or raises by a limit that is global to the process.
SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PngImagePlugin", "PngImageFile"),
    (b"\xff\xd8\xff", "JpegImagePlugin", "JpegImageFile"),
    (b"GIF8", "GifImagePlugin", "GifImageFile"),
    (b"II*\0", "TiffImagePlugin", "TiffImageFile"),
    (b"MM\0*", "TiffImagePlugin", "TiffImageFile"),
    (b"RIFF", "WebPImagePlugin", "WebPImageFile"),
    (b"BM", "BmpImagePlugin", "BmpImageFile"),
)

EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> name of PIL's transposition that turns the image upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def open_image(source: ImageSource) -> Image:
    """Return an upright RGB image, alpha dropped, as ``transformers.image_utils.load_image`` does.

    A transparent colour stays in ``info["transparency"]`` and 16-bit grey is clipped at 255, as there.

    ``source`` is a path, the bytes of a PNG, JPEG, WebP, BMP, GIF or TIFF file (its first frame), a PIL
    image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4). Raises InputError for anything else, for a
    file that is missing, damaged or no image, and for more than MAX_IMAGE_PIXELS by the header.
    """
    from PIL.Image import Image, fromarray

    check_source(source)
    if isinstance(source, Image):
        return _upright_rgb(source, "the PIL image")
    if isinstance(source, np.ndarray):
        return _upright_rgb(fromarray(np.ascontiguousarray(source)), "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"the image of {len(source)} bytes")
    path = os.fspath(source)
    shown = repr(path if len(path) <= 200 else f"{path[:200]}...")
    if not os.path.isfile(path):  # a pipe or a device would block, or never end
        hint = "Download it first." if str(path).startswith(("http://", "https://")) else "Check the path."
        raise InputError(f"{shown} is not a file that is there. {hint}")
    try:
        with open(path, "rb") as file:
            return _decode(file, shown)
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}). Check its permissions.") from None


def check_source(source: Any) -> None:
    """Raise InputError for what is no image whatever it holds: neither path, bytes nor PIL image, nor such an array."""
    if isinstance(source, np.ndarray):
        shaped = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
        if source.dtype != np.uint8 or not shaped or 0 in source.shape:
            raise InputError(
                f"an image is an array of {source.dtype} {source.shape}, expected uint8 (height, width), "
                "(height, width, 3) or (height, width, 4). Convert floats in 0..1 with "
                "(x * 255).round().astype('uint8') and channels-first with x.transpose(1, 2, 0)."
            )
    elif not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        from PIL.Image import Image

        if not isinstance(source, Image):
            raise InputError(
                f"an image is a {type(source).__name__}, expected a path, the bytes of an image file, a PIL "
                "image or a uint8 array."
            )


def _decode(file: BinaryIO, shown: str) -> Image:
    """Open a file of one of SIGNATURES; the size is checked before any pixel is decoded."""
    head = file.read(16)
    found = next(((module, name) for magic, module, name in SIGNATURES if head.startswith(magic)), None)
    if found is None:
        raise InputError(
            f"{shown} starts with {head[:8]!r}, which is none of PNG, JPEG, WebP, BMP, GIF and TIFF. "
            "Convert it to one of these."
        )
    module, name = found
    plugin = getattr(import_module(f"PIL.{module}"), name)
    file.seek(0)
    try:
        with plugin(file) as image:
            return _upright_rgb(image, shown)
    except InputError:
        raise
    except Exception as error:  # PIL's decoders raise nearly any type for bytes they do not expect
        raise _damaged(shown, error) from None


def _upright_rgb(image: Image, shown: str) -> Image:
    """Decode, turn by the EXIF orientation, convert to RGB: ``load_image`` without its global checks."""
    from PIL.Image import Transpose

    if not 0 < image.width * image.height <= MAX_IMAGE_PIXELS:
        size = f"{image.width}x{image.height}"
        raise InputError(f"{shown} is {size} pixels, expected 1 to {MAX_IMAGE_PIXELS} in all. Scale it down.")
    try:
        image.load()
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
        upright = image.copy() if turn is None else image.transpose(Transpose[turn])
        colour = upright.info.get("transparency")  # per palette entry in bytes: convert would warn and drop it
        kept = colour is not None and not isinstance(colour, bytes)
        upright.info = {"transparency": colour} if kept else {}  # no EXIF, so that nothing is turned twice
        return upright.convert("RGB")
    except Exception as error:  # as in _decode: this is where pixels are decoded
        raise _damaged(shown, error) from None


def _damaged(shown: str, error: Exception) -> InputError:
    from PIL.Image import DecompressionBombError

    reason = one_line(error)
    if isinstance(error, DecompressionBombError):  # WebP and GIF: PIL checks by its limit as it opens
        return InputError(f"{shown} is refused by PIL ({reason}). Scale it down.")
    return InputError(f"{shown} cannot be decoded: it is damaged or cut short ({reason}). Replace it.")
