"""Reading images, and resizing them exactly as torchvision does on a CPU."""

from __future__ import annotations

import io
import os
import platform
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from oracle.torch_import import import_torchvision
from sam3_jax.data.images import ImageError, load_image, normalize, resize_image, to_model_input

NATIVE_UINT8 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or (
    platform.machine() in ("aarch64", "arm64")
)
native = pytest.mark.skipif(
    not NATIVE_UINT8, reason="torchvision uses its fixed-point kernel on AVX2 and ARM only"
)
SQUARE = (1008, 1008)


def torch_resize(image: np.ndarray, size: tuple[int, int], dtype: torch.dtype) -> np.ndarray:
    """What torchvision's ``resize_image`` calls: uint8 as such (CPU), or float32 rounded (CUDA)."""
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(dtype)
    out = torch.nn.functional.interpolate(
        batch, size=size, mode="bilinear", align_corners=False, antialias=True
    )
    if dtype != torch.uint8:
        out = out.round().to(torch.uint8)
    return out[0].permute(1, 2, 0).numpy()


def noise(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


# ---- resize


@native
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 1),
        (2, 3),
        (1, 500),
        (480, 640),
        (1008, 756),  # one axis has its size already
        (1007, 1009),
        (2016, 504),  # exact ratios: many ties
        (4032, 3024),  # where float32 just suffices
        (4000, 6000),  # float64
        (3, 20000),
    ],
)
def test_resize_equals_torch_on_cpu(rng, height, width):
    image = noise(rng, height, width)
    np.testing.assert_array_equal(
        resize_image(image, SQUARE), torch_resize(image, SQUARE, torch.uint8)
    )


@native
@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_resize_keeps_constant_images(value):
    # Weights that add up to a little more or less than one must not spill over or lose a step.
    for shape in [(1, 1), (700, 333), (50, 9000)]:
        image = np.full((*shape, 3), value, np.uint8)
        for size in [(96, 130), (1, 1)]:
            assert (resize_image(image, size) == value).all()


@native
def test_resize_equals_torch_on_random_sizes(rng):
    for _ in range(300):
        old, new = int(rng.integers(1, 5000)), int(rng.choice([1, 2, 37, 112, 336, 1008, 1344]))
        image = noise(rng, old, 2, 1) if rng.random() < 0.5 else noise(rng, 2, old, 1)
        size = (new, 2) if image.shape[0] == old else (2, new)
        expected = torch_resize(image, size, torch.uint8)
        np.testing.assert_array_equal(resize_image(image, size), expected, err_msg=f"{old} {new}")


@native
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
@pytest.mark.parametrize("size", [SQUARE, (112, 112), (336, 672)])
def test_resize_of_photographs(name, size):
    image = getattr(photographs, name)()
    np.testing.assert_array_equal(resize_image(image, size), torch_resize(image, size, torch.uint8))


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_resize_is_one_step_from_the_cuda_definition(name):
    image = getattr(photographs, name)()
    difference = np.abs(
        resize_image(image, SQUARE).astype(int) - torch_resize(image, SQUARE, torch.float32)
    )
    # Two roundings of half a step each against one: never more than one step, and .10 to .17 of
    # the values here. A wrong filter, or a shift of a hundredth of a pixel, changes more.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.2


@native
def test_resize_equals_torchvision_itself(rng):
    import_torchvision()
    from torchvision.transforms import v2

    image = noise(rng, 333, 517)
    tensor = v2.functional.to_image(Image.fromarray(image))
    transform = v2.Compose(
        [
            v2.ToDtype(torch.uint8, scale=True),
            v2.Resize(size=(224, 224)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
        ]
    )
    expected = transform(tensor).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(to_model_input(image, (224, 224)), expected)


def test_resize_returns_an_image_of_the_size_unchanged(rng):
    image = noise(rng, 30, 40)
    np.testing.assert_array_equal(resize_image(image, (30, 40)), image)


def test_resize_takes_any_memory_layout(rng):
    image = noise(rng, 60, 80)
    view = image[::2, ::-1]
    np.testing.assert_array_equal(
        resize_image(view, (50, 50)), resize_image(np.ascontiguousarray(view), (50, 50))
    )


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_resize_refuses_empty_sizes(rng, size):
    with pytest.raises(ValueError, match="at least 1"):
        resize_image(noise(rng, 4, 4), size)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_resize_refuses_other_arrays(image):
    # The annotation is checked first in tests; without the hook the function itself speaks up.
    with pytest.raises((ValueError, TypeError)):
        resize_image(image, (8, 8))


def test_resize_is_fast(rng):
    image = noise(rng, 3000, 4000)
    resize_image(image, SQUARE)
    start = time.process_time()
    resize_image(image, SQUARE)
    # .1 s on an idle core; the margin is for a shared machine, a Python loop takes minutes.
    assert time.process_time() - start < 2


# ---- normalise


def test_normalize_every_value():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    out = normalize(image)
    assert out.dtype == np.float32
    # Rounding of 1/255 (2**-24 of a value up to 1) and of the product (2**-25), then doubled.
    np.testing.assert_allclose(out, (image / 255 - 0.5) / 0.5, atol=1.8e-7, rtol=0)
    assert out.min() == -1
    assert out.max() == 1


def test_to_model_input_resizes_then_normalizes(rng):
    image = noise(rng, 20, 31)
    out = to_model_input(image, (14, 28))
    assert out.shape == (14, 28, 3)
    np.testing.assert_array_equal(out, normalize(resize_image(image, (14, 28))))


# ---- load


def test_load_lossless_files(rng, tmp_path):
    image = noise(rng, 5, 7)
    for name in ["a.png", "b.bmp", "c.tif", "d.ppm"]:
        Image.fromarray(image).save(tmp_path / name)
        np.testing.assert_array_equal(load_image(tmp_path / name), image)
        np.testing.assert_array_equal(load_image(str(tmp_path / name)), image)


def test_load_jpeg_as_pillow_decodes_it(rng, tmp_path):
    Image.fromarray(noise(rng, 40, 50)).save(tmp_path / "a.jpg")
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg"), expected)


def test_load_pil_and_array(rng):
    image = noise(rng, 5, 7)
    np.testing.assert_array_equal(load_image(image), image)
    np.testing.assert_array_equal(load_image(Image.fromarray(image)), image)
    flipped = load_image(image[:, ::-1])
    assert flipped.flags.c_contiguous
    np.testing.assert_array_equal(flipped, image[:, ::-1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_load_modes_as_pillow_converts_them(rng, mode):
    picture = Image.fromarray(noise(rng, 6, 8, 4)).convert(mode)
    out = load_image(picture)
    assert out.shape == (6, 8, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.asarray(picture.convert("RGB")))


def test_load_drops_transparency(rng, tmp_path):
    image = noise(rng, 6, 8, 4)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), image[..., :3])


@pytest.mark.filterwarnings("error")
def test_load_palette_with_transparency(rng, tmp_path):
    picture = Image.fromarray(noise(rng, 6, 8)).quantize(16)
    expected = np.asarray(picture.convert("RGB"))
    picture.save(tmp_path / "a.png", transparency=bytes(range(16)))
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_load_16_bit_grey_by_full_scale(tmp_path, name):
    grey = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / name)
    # A step of 8 bits is 257 steps of 16.
    expected = np.array([[0, 0, 1, 1], [127, 128, 254, 255]], np.uint8)
    np.testing.assert_array_equal(load_image(tmp_path / name), expected[..., None].repeat(3, 2))


def test_load_big_endian_16_bit():
    picture = Image.frombytes("I;16B", (2, 1), bytes([0xFF, 0xFF, 0x01, 0x01]))
    assert load_image(picture)[0, :, 0].tolist() == [255, 1]


def test_load_8_bits_of_16_bit_equal_the_8_bit_image(rng):
    grey = noise(rng, 9, 9, 1)[..., 0]
    out = load_image(Image.fromarray(grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(out, grey[..., None].repeat(3, 2))


# Numbers of the EXIF standard: what undoes each orientation.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_load_turns_files_upright_but_not_pil_images(rng, tmp_path, orientation):
    image = noise(rng, 5, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), UPRIGHT[orientation](image))
    np.testing.assert_array_equal(load_image(Image.open(tmp_path / "a.png")), image)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_load_survives_damaged_exif(rng, tmp_path):
    Image.fromarray(noise(rng, 5, 7)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0garbage!")
    assert load_image(tmp_path / "a.jpg").shape == (5, 7, 3)


def test_load_first_frame(rng, tmp_path):
    frames = [Image.fromarray(noise(rng, 5, 7)) for _ in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), np.asarray(frames[0]))


# ---- errors


def png_bytes(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(rng, 50, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def assert_names(path: Path, *words: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_error_missing(tmp_path):
    assert_names(tmp_path / "none.jpg", "no such file")


def test_error_directory(tmp_path):
    assert_names(tmp_path, "is a directory")


def test_error_empty(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert_names(tmp_path / "a.jpg", "empty")


def test_error_not_an_image(tmp_path):
    (tmp_path / "a.jpg").write_text("cat")
    assert_names(tmp_path / "a.jpg", "not an image")


def test_error_truncated(rng, tmp_path):
    (tmp_path / "a.png").write_bytes(png_bytes(rng)[:2000])
    assert_names(tmp_path / "a.png", "truncated")
    with pytest.raises(ImageError, match="truncated"):
        load_image(Image.open(tmp_path / "a.png"))


def test_error_bomb(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an error above twice as many
    (tmp_path / "a.png").write_bytes(png_bytes(rng))
    assert_names(tmp_path / "a.png", "3000 pixels", "MAX_IMAGE_PIXELS")


@pytest.mark.parametrize("values", [[[0, 70000]], [[-1, 5]]])
def test_error_32_bit(values):
    with pytest.raises(ImageError, match="32-bit values from"):
        load_image(Image.fromarray(np.array(values, np.int32)))


def test_error_float():
    with pytest.raises(ImageError, match="float pixels"):
        load_image(Image.fromarray(np.zeros((2, 2), np.float32)))


def test_error_no_pixels():
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_error_array_names_shape_and_dtype(array):
    with pytest.raises(ImageError) as caught:
        load_image(array)
    assert str(array.shape) in str(caught.value)
    assert str(array.dtype) in str(caught.value)


def test_error_other_types():
    # The annotation is checked first in tests; without the hook the function itself speaks up.
    with pytest.raises((ImageError, TypeError)):
        load_image([[1, 2, 3]])


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns about the damage before it raises
def test_damaged_files_give_pixels_or_an_image_error(rng, tmp_path, image_format):
    buffer = io.BytesIO()
    Image.fromarray(noise(rng, 20, 30)).save(buffer, image_format)
    path = tmp_path / f"damaged{os.extsep}{image_format.lower()}"
    messages = []
    for _ in range(60):
        damaged = bytearray(buffer.getvalue())
        for position in rng.integers(0, min(len(damaged), 300), rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)])
        try:
            assert load_image(path).ndim == 3
        except ImageError as error:
            messages.append(str(error))
    assert messages
    assert all(str(path) in message for message in messages)
