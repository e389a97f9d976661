"""Decoding of one image to a square of pixels, whatever it is."""

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from kdcache.datasets import Sample

__all__ = ["LARGE", "decode", "generous"]

LARGE = "--allow-large"  # the option
_TEXT_BYTES = 1 << 26  # of a text or profile in a PNG file; Pillow's limit is 1 MiB, which colour profiles exceed
_AT_ONCE = 1 << 26  # pixels; larger pictures are decoded one after another, as they may not fit into memory together
_LARGE = threading.Lock()

_TURNS: dict[Any, Image.Transpose] = {  # EXIF orientation -> transpose that turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def generous(allow_large: bool) -> Iterator[None]:
    """Let Pillow decode what is sound: large texts and colour profiles in PNG files, and with `allow_large` pictures of any size.

    Its warnings about large pictures, odd palettes and damaged EXIF data are silenced: only pixels matter here. Its limits are
    the process's, and are restored.
    """
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = _TEXT_BYTES, 4 * _TEXT_BYTES
        if allow_large:
            Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS = before


def decode(sample: Sample, size: int) -> tuple[bytes, tuple[int, int]] | str:
    """Pixels, uint8 `[3, size, size]`, and original (width, height) of one sample; or the reason why it has none."""
    try:
        with sample.load() as image, _LARGE if image.width * image.height > _AT_ONCE else nullcontext():
            image.load()  # loads the first frame; for TIFF this also applies the orientation and clears it
            upright = _upright(image)
            # Pillow's reduced-size JPEG decoding is not used: its output depends on the library's version.
            square = _as_rgb(upright).resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(square).transpose(2, 0, 1).tobytes(), upright.size
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"[0-9]+", str(error))
        return f"it has {int(pixels[0]) if pixels else 0:,} pixels: decoded with {LARGE}"
    except UnidentifiedImageError:
        return "not an image of a known format"
    except Exception as error:  # decoders raise many errors for bad bytes: struct.error, IndexError, zlib.error, ...
        if isinstance(error, OSError) and error.errno is not None:  # an error of disk or network, not of the picture
            error.filename = error.filename or sample.key
            raise
        return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged metadata does not damage the picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Three 8-bit channels of an image of any mode.

    Alpha is dropped, as in torchvision's loaders. Pillow clips deep grey at 255, so it is scaled here: 16-bit values to
    their high byte, mode `I` as 16 bits, floats from 0 to 1. Values beyond these ranges have no agreed meaning as grey.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        limit = 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= limit):  # NaN compares as false, too
            raise ValueError(f"grey values from {values.min():g} to {values.max():g} in mode {image.mode}, not 0 to {limit}")
        grey = np.rint(values * 255) if image.mode == "F" else values.astype(np.uint32) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "La":  # Pillow has no direct conversion
        image = image.convert("LA")
    return image.convert("RGB")
