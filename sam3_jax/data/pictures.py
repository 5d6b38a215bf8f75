"""Pictures in the orientation that their annotations were made in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sam3_jax.data.images import ImageError, load_image


def load_as_annotated(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a picture of a data set, see :func:`decode_as_annotated`.

    Raises:
      ImageError: unreadable, or of another size.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error
    return decode_as_annotated(data, str(path), size)


def decode_as_annotated(
    data: bytes, name: str, size: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes the bytes of an image file of a data set.

    Annotation files mostly ignore the orientation in a photograph's EXIF data, as upstream's
    loader does; so the stored pixels count, and the upright picture only where its size fits and
    theirs does not.

    Args:
      data: the file's content.
      name: of the picture, for messages.
      size: (height, width) that the annotations name.

    Raises:
      ImageError: not an image, damaged, or of another size.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as stored:
            pixels = load_image(stored)
            upright = pixels if pixels.shape[:2] == size else load_image(_upright(stored))
    except UnidentifiedImageError as error:  # its text names a buffer, not the file
        raise ImageError(f"{name}: is not an image that can be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: cannot be decoded ({error})") from error
    for candidate in (pixels, upright):
        if candidate.shape[:2] == size:
            return candidate
    raise ImageError(
        f"{name}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, its annotations are for "
        f"{size[1]} x {size[0]}; use the pictures that were annotated"
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, IndexError):
        return image  # EXIF data that cannot be read says nothing about the orientation
