"""Photographs in, model input out: reading, resizing, normalising. numpy and Pillow only.

Upstream: ``sam3/model/sam3_image_processor.py``. Which of the two definitions of its resize this
follows, and why, is in ``resize.py``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sam3_jax.data.resize import resize_image

__all__ = ["ImageError", "ImageSource", "load_image", "normalize", "resize_image", "to_model_input"]

ImageSource = str | os.PathLike | Image.Image | np.ndarray

# Converted at a time: Pillow hands pixels out in a copy, and needs another one for each change of
# mode. Beside Pillow's own 4 bytes a pixel there are then 3 and not 6: 1.1 GB at 20,000 x 8,000.
_STRIP_PIXELS = 1 << 22


class ImageError(ValueError):
    """An image that cannot be used. The message, one line, names the file and what to do."""


def load_image(source: ImageSource) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as 8-bit RGB. The result may be read-only or share memory with the source.

    Files are turned upright by their EXIF orientation. A PIL image or an array is taken as it
    stands, so that results line up with the pixels its owner sees. Modes other than RGB go through
    Pillow's ``convert("RGB")``, which drops transparency; 16-bit grey is scaled to 8 bits (65535
    becomes 255). Of an animation or a stack the first frame counts.

    Args:
      source: path, PIL image, or (h, w, 3) uint8 array.

    Raises:
      ImageError: missing, unreadable, no ordinary file (a pipe, a device), empty, truncated or not
        an image; more pixels than Pillow allows (179 million) or memory holds; pixels without a
        defined 8-bit range; PostScript; an array of another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise ImageError(
                "an image array must be (height, width, 3) uint8 with at least one pixel, "
                f"got shape {source.shape} and dtype {source.dtype}"
            )
        return np.ascontiguousarray(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "PIL image"
        with _named_errors(name):
            return _to_rgb8(source, name)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            "an image must be a path, a PIL image or a (height, width, 3) uint8 array, "
            f"got {type(source).__name__}"
        )
    path = Path(os.fsdecode(source))
    name = printable(str(path))
    _check_file(path, name)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from error
    # The file, not its name: of a name Pillow maps the file, which another program may cut.
    with file, _named_errors(name), Image.open(file) as image:
        if image.format == "EPS":  # Pillow would have Ghostscript run it
            raise ImageError(f"{name}: PostScript is a program, not pixels; convert it to PNG")
        return _to_rgb8(_upright(image), name)


def normalize(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """Scale 0..255 to -1..1, (x / 255 - .5) / .5, in float32 with torchvision's rounding."""
    return _normalized_values()[image]


def to_model_input(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> Float32[np.ndarray, "oh ow 3"]:
    """Resize to ``size`` (height, width) and normalise: what the vision encoder takes."""
    return normalize(resize_image(image, size))


@functools.cache
def _normalized_values() -> Float32[np.ndarray, " 256"]:
    # torchvision multiplies by the float32 reciprocal of 255; dividing differs in the last bit.
    scaled = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


def printable(name: str) -> str:
    """A name on one line, in characters that any terminal and any file can take."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _check_file(path: Path, name: str) -> None:
    """Raises an ImageError for what cannot be opened, or would wait for ever when opened."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a null byte
        raise ImageError(f"{name}: no such file") from error
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: is a directory; name the image files in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: is a pipe, a device or a socket; save the image to a file first")
    if status.st_size == 0:
        raise ImageError(f"{name}: the file is empty")


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn what Pillow raises into an ImageError that names the file."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image, or of a format Pillow cannot read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: {str(error).rstrip('.')}; if you trust the file, allow more with "
            "--max-megapixels (in Python: PIL.Image.MAX_IMAGE_PIXELS, half as many)"
        ) from error
    except MemoryError as error:
        raise ImageError(f"{name}: too large for this machine's memory; shrink it") from error
    except Exception as error:  # of damaged files the decoders raise many kinds, none documented
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ImageError(
            f"{name}: cannot be decoded, it may be truncated or damaged ({reason})"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # now, so that damaged pixels are not taken for damaged EXIF data
    # EXIF data that cannot be read says nothing about the orientation.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb8(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w 3"]:
    if 0 in image.size:
        raise ImageError(f"{name}: has no pixels ({image.width} x {image.height})")
    if image.mode == "F":
        raise ImageError(f"{name}: float pixels have no defined range; convert it to 8 or 16 bits")
    if image.mode == "I":  # some formats deliver 16 bits in this mode of 32
        extremes = [f(np.asarray(strip)) for _, strip in _strips(image) for f in (np.min, np.max)]
        if min(extremes) < 0 or max(extremes) > 65535:
            raise ImageError(
                f"{name}: 32-bit values from {min(extremes)} to {max(extremes)} have no defined "
                "brightness; convert it to 8 or 16 bits"
            )
    if image.width * image.height <= _STRIP_PIXELS:
        return _strip_to_rgb8(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, strip in _strips(image):
        pixels[rows] = _strip_to_rgb8(strip)
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Parts of full width from top to bottom, and the rows they hold."""
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _strip_to_rgb8(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip at 255.
        grey = ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours; straight to RGB Pillow warns
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
