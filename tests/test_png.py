"""PNG files in strips: Pillow reads back what was written."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from sam3_jax.inference import png


@pytest.mark.parametrize("kind", ["colour", "grey", "bits"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (120, 201)])
def test_what_is_written_is_read(tmp_path, monkeypatch, kind, size):
    monkeypatch.setattr(png, "STRIP_BYTES", 2000)  # several strips
    pixels = skimage.data.coffee()[100 : 100 + size[0], 100 : 100 + size[1]]
    pixels = {"colour": pixels, "grey": pixels[..., 0], "bits": pixels[..., 0] > 99}[kind]
    png.write_png(tmp_path / "a.png", size, png.strips_of(pixels))
    with Image.open(tmp_path / "a.png") as image:
        image.verify()  # checksums
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == {"colour": "RGB", "grey": "L", "bits": "1"}[kind]
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_files_of_photographs_are_about_as_small_as_pillows(tmp_path):
    photo = skimage.data.coffee()
    png.write_png(tmp_path / "a.png", photo.shape[:2], png.strips_of(photo))
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG", compress_level=1)
    assert (tmp_path / "a.png").stat().st_size < 1.15 * len(buffer.getvalue())


def test_strips_that_do_not_make_up_the_picture_are_refused(tmp_path):
    rows = np.zeros((5, 9), np.uint8)
    with pytest.raises(ValueError, match="strips of 5 rows for a picture of 6"):
        png.write_png(tmp_path / "a.png", (6, 9), [rows])
    with pytest.raises(ValueError, match="in a picture 8 wide"):
        png.write_png(tmp_path / "a.png", (5, 8), [rows])
    with pytest.raises(ValueError, match="strips of 0 rows"):
        png.write_png(tmp_path / "a.png", (5, 9), [])
