"""Photographs in, model input out: reading, resizing, normalising. numpy and Pillow only.

Upstream: ``sam3/model/sam3_image_processor.py``. Which of the two definitions of its resize this
follows, and why, is in ``resize.py``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sam3_jax.data.resize import resize_image

__all__ = ["ImageError", "ImageSource", "load_image", "normalize", "resize_image", "to_model_input"]

ImageSource = str | os.PathLike | Image.Image | np.ndarray

# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


class ImageError(ValueError):
    """An image that cannot be used. The message names the file and what to do."""


def load_image(source: ImageSource) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as 8-bit RGB. The result may be read-only or share memory with the source.

    Files are turned upright by their EXIF orientation. A PIL image or an array is taken as it
    stands, so that results line up with the pixels its owner sees. Modes other than RGB go through
    Pillow's ``convert("RGB")``, which drops transparency; 16-bit grey is scaled to 8 bits (65535
    becomes 255). Of an animation or a stack the first frame counts.

    Args:
      source: path, PIL image, or (h, w, 3) uint8 array.

    Raises:
      ImageError: missing, empty, truncated or not an image; more pixels than Pillow allows (179
        million); pixels without a defined 8-bit range; an array of another shape or dtype.
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
    path = Path(source)
    if not path.exists():
        raise ImageError(f"{path}: no such file")
    if path.is_dir():
        raise ImageError(f"{path}: is a directory; name the image files in it")
    if path.is_file() and path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty")
    with _named_errors(str(path)), Image.open(path) as image:
        return _to_rgb8(_upright(image), str(path))


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
            f"{name}: {error}; set PIL.Image.MAX_IMAGE_PIXELS higher if you trust the file"
        ) from error
    except _DAMAGE as error:
        raise ImageError(
            f"{name}: cannot be decoded, it may be truncated or damaged ({error})"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # now, so that damaged pixels are not taken for damaged EXIF data
    # EXIF data that cannot be read says nothing about the orientation.
    with contextlib.suppress(*_DAMAGE):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb8(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w 3"]:
    if 0 in image.size:
        raise ImageError(f"{name}: has no pixels ({image.width} x {image.height})")
    if image.mode == "F":
        raise ImageError(f"{name}: float pixels have no defined range; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip at 255. Some formats deliver 16 bits in the 32-bit mode "I".
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name}: 32-bit values from {values.min()} to {values.max()} have no defined "
                "brightness; convert it to 8 or 16 bits"
            )
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours; straight to RGB Pillow warns
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
