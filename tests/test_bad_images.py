"""Files as they lie about in real folders: each gives pixels or an ImageError of one line.

What a picture of each mode and depth becomes is in ``test_images.py``; here are the containers,
and everything that is no picture.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sam3_jax.data import images
from sam3_jax.data.images import ImageError, load_image, to_model_input

FORMATS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "PPM": ".ppm",
    "JPEG2000": ".jp2",
    "AVIF": ".avif",
}


def error_of(path: Path | str) -> str:
    """The message of the ImageError that loading gives; never waits for more than ten seconds."""
    caught: list[BaseException] = []

    def load() -> None:
        try:
            load_image(path)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), f"hangs on {path}"
    assert caught, f"gives pixels of {path}"
    assert type(caught[0]) is ImageError, caught[0]
    message = str(caught[0])
    assert message.isprintable()  # one line, and no terminal or log file chokes on it
    return message


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture with a hue in each corner: what compression changes little."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def encoded(form: str, image: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form)
    return buffer.getvalue()


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of given chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# ---- damaged


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the damage, before it raises
def test_half_a_file(tmp_path, form):
    data = encoded(form)
    path = tmp_path / f"half{FORMATS[form]}"
    path.write_bytes(data[: len(data) // 2])
    assert str(path) in error_of(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_header_and_nothing_else(tmp_path, form):
    path = tmp_path / f"header{FORMATS[form]}"
    path.write_bytes(encoded(form)[:24])
    assert str(path) in error_of(path)


def test_corrupt_pixels_of_a_png(tmp_path):
    data = bytearray(encoded("PNG"))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\0" * 40
    (tmp_path / "a.png").write_bytes(data)
    assert "truncated or damaged" in error_of(tmp_path / "a.png")


def test_zeros(tmp_path):
    """What a crash of the machine leaves of a file."""
    (tmp_path / "a.jpg").write_bytes(bytes(4096))
    assert "not an image" in error_of(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("text.tif", "η γάτα".encode()),
        ("archive.webp", b"PK\x03\x04" + bytes(60)),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ],
)
def test_other_files_with_the_name_of_a_picture(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: not an image")


def test_postscript_is_not_run(tmp_path):
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(program)
    assert "PostScript is a program" in error_of(tmp_path / "a.jpg")


def test_whatever_a_decoder_raises(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    for raised, word in [
        (zlib.error("Error -3"), "Error -3"),
        (KeyError("tag"), "damaged"),
        (MemoryError(), "too large for this machine's memory"),
        (OSError("broken\ndata\n"), "(broken)"),
    ]:

        def load(self: Image.Image, error: BaseException = raised) -> None:
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        assert word in error_of(tmp_path / "a.png")


# ---- large and small


def test_a_small_file_that_claims_400_million_pixels(tmp_path):
    """A decompression bomb: refused by its header, before memory is taken."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, (b"IDAT", zlib.compress(bytes(99)))))
    tracemalloc.start()
    try:
        message = error_of(tmp_path / "a.png")
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
    assert "400000000 pixels" in message
    assert "--max-megapixels" in message


def test_a_text_that_unpacks_to_gigabytes(tmp_path):
    text = b"Comment\0\0" + zlib.compress(bytes(10**8), 9)
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = (b"IDAT", zlib.compress(bytes(4)))
    (tmp_path / "a.png").write_bytes(png(header, (b"zTXt", text), pixels))
    tracemalloc.start()
    try:
        message = error_of(tmp_path / "a.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "Decompressed data too large" in message
    assert peak < 10**7


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_20000_pixels_take_little_more_than_their_array(tmp_path, mode):
    image = Image.new(mode, (20000, 1000), 0)
    ImageDraw.Draw(image).rectangle((19000, 900, 19999, 999), fill=255 if mode == "L" else "red")
    path = tmp_path / "a.png"
    image.save(path, compress_level=1)
    expected = [255, 255, 255] if mode == "L" else [255, 0, 0]
    tracemalloc.start()
    try:
        pixels = load_image(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pixels.shape == (1000, 20000, 3)
    assert pixels[950, 19500].tolist() == expected
    assert pixels[850, 19500].tolist() == [0, 0, 0]
    # The array, and a strip of a fifth of it twice; converted at once it was at least two arrays.
    assert peak < 1.6 * pixels.nbytes
    assert to_model_input(pixels, (112, 112)).shape == (112, 112, 3)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (1, 1), (2, 1)])
def test_extreme_shapes(tmp_path, size):
    picture(*size).save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png")
    assert pixels.shape == (*size[::-1], 3)
    assert np.isfinite(to_model_input(pixels, (112, 112))).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_strips_change_nothing(mode, monkeypatch):
    image = picture(40, 30)
    if mode.startswith("I"):
        wide = np.asarray(image.convert("L")).astype(np.uint16) * 200
        image = Image.fromarray(wide) if mode == "I;16" else Image.fromarray(wide.astype(np.int32))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    whole = load_image(image)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 7 * 40 + 1)  # 30 rows: four strips of 7, one of 2
    np.testing.assert_array_equal(load_image(image), whole)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 1)
    np.testing.assert_array_equal(load_image(image), whole)


def test_32_bit_values_are_judged_as_a_whole(monkeypatch):
    values = np.zeros((9, 4), np.int32)
    values[8, 3] = 70000
    monkeypatch.setattr(images, "_STRIP_PIXELS", 8)
    with pytest.raises(ImageError, match="32-bit values from 0 to 70000"):
        load_image(Image.fromarray(values))


# ---- modes and depths in files


def test_grey_with_transparency(tmp_path):
    picture().convert("LA").save(tmp_path / "a.png")
    grey = np.asarray(picture().convert("L"))
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), grey[..., None].repeat(3, 2))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes(tmp_path, form):
    few = picture().quantize(16)
    path = tmp_path / f"a{FORMATS[form]}"
    few.save(path, form)
    with Image.open(path) as image:
        assert image.mode == "P"
    np.testing.assert_array_equal(load_image(path), np.asarray(few.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_a_transparent_colour(tmp_path):
    """GIF and PNG name one index, one grey or one colour that is transparent: it stays visible."""
    few = picture().quantize(16)
    few.save(tmp_path / "a.gif", transparency=3)
    few.save(tmp_path / "p.png", transparency=3)
    expected = np.asarray(few.convert("RGB"))
    np.testing.assert_array_equal(load_image(tmp_path / "a.gif"), expected)
    np.testing.assert_array_equal(load_image(tmp_path / "p.png"), expected)
    picture().save(tmp_path / "c.png", transparency=(0, 0, 255))
    np.testing.assert_array_equal(load_image(tmp_path / "c.png"), np.asarray(picture()))
    picture().convert("L").save(tmp_path / "g.png", transparency=29)
    assert load_image(tmp_path / "g.png").shape == (48, 64, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.pbm", "a.gif"])
def test_black_and_white(tmp_path, name):
    picture().convert("1").save(tmp_path / name)
    pixels = load_image(tmp_path / name)
    assert set(np.unique(pixels)) == {0, 255}
    np.testing.assert_array_equal(
        pixels[..., 0], np.asarray(picture().convert("1")) * np.uint8(255)
    )


def test_fax(tmp_path):
    picture().convert("1").save(tmp_path / "a.tif", compression="group4")
    expected = np.asarray(picture().convert("1")) * np.uint8(255)
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif")[..., 1], expected)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png(tmp_path, colour, channels):
    """Grey, RGB and both with transparency; 16-bit grey alone keeps its depth until we scale."""
    values = np.linspace(0, 65535, 12 * channels).astype(">u2").reshape(3, 4, channels)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 4, 3, 16, colour, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, (b"IDAT", zlib.compress(rows))))
    pixels = load_image(tmp_path / "a.png").astype(int)
    seen = values[..., :3] if channels > 2 else values[..., :1].repeat(3, axis=2)
    # Rounded to the nearest step for grey, cut off to the high byte by Pillow for the others.
    assert np.abs(pixels - seen.astype(int) / 257).max() < (0.51 if channels == 1 else 1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_of_both_byte_orders(tmp_path, order):
    values = np.array([[0, 257, 32896, 65535]], f"{order}u2")
    entries = [(256, 4, 4), (257, 4, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (277, 3, 1),
               (278, 4, 1), (273, 4, 200), (279, 4, 8)]  # fmt: skip
    folder = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in sorted(entries):
        packed = (
            struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        )
        folder += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    data = (head + folder + bytes(4)).ljust(200, b"\0") + values.tobytes()
    (tmp_path / "a.tif").write_bytes(data)
    assert load_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_jpeg(tmp_path):
    """Such files hold inverted inks, Adobe's custom: a picture must not come out as a negative."""
    picture().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "CMYK"
        assert image.info["adobe_transform"] in (0, 2)
    difference = load_image(tmp_path / "a.jpg").astype(int) - np.asarray(picture())
    assert np.abs(difference).mean() < 4  # JPEG's own loss; a negative is 90 off


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_other_containers(tmp_path, name, orientation):
    upright = picture(32, 32).resize((32, 16))
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}.get(orientation)  # fmt: skip
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if name != "a.tif" else {"tiffinfo": {0x0112: orientation}}
    stored.save(tmp_path / name, **options)
    pixels = load_image(tmp_path / name)
    assert pixels.shape == (16, 32, 3)
    # Compression; a wrong turn moves the corners by 255.
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() < 60


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.avif"])
def test_the_first_of_many_frames(tmp_path, name):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    pixels = load_image(tmp_path / name).astype(int)
    assert pixels.shape == (10, 20, 3)
    assert np.abs(pixels - [255, 0, 0]).max() < 8  # lossy formats


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_later_frame_may_be_damaged(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[:-20])
    assert load_image(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


# ---- what is no file to read


def test_a_missing_folder(tmp_path):
    assert "no such file" in error_of(tmp_path / "none" / "a.jpg")
    (tmp_path / "file").write_text("")
    assert "no such file" in error_of(tmp_path / "file" / "a.jpg")


def test_links(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "good.png").symlink_to("a.png")
    assert load_image(tmp_path / "good.png").shape == (48, 64, 3)
    (tmp_path / "dangling.png").symlink_to("none.png")
    assert "no such file" in error_of(tmp_path / "dangling.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert str(tmp_path / "loop.png") in error_of(tmp_path / "loop.png")
    (tmp_path / "folder.png").symlink_to(tmp_path)
    assert "is a directory" in error_of(tmp_path / "folder.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_pipes_devices_and_sockets_are_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "is a pipe, a device or a socket" in error_of(tmp_path / "pipe.jpg")
    for device in ("/dev/zero", "/dev/null"):
        assert "is a pipe, a device or a socket" in error_of(device)
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jpg")
        assert "is a pipe, a device or a socket" in error_of("s.jpg")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_no_permission(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    picture().save(folder / "a.png")
    (folder / "a.png").chmod(0)
    assert "cannot be read (Permission denied)" in error_of(folder / "a.png")
    folder.chmod(0)
    try:
        assert "cannot be read (Permission denied)" in error_of(folder / "a.png")
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("call", ["stat", "open"])
def test_what_the_system_refuses(tmp_path, monkeypatch, call):
    """The same as root: no permission, a network share that is gone, a bad disk."""
    picture().save(tmp_path / "a.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, call, refuse)
    assert (
        error_of(tmp_path / "a.png") == f"{tmp_path / 'a.png'}: cannot be read (Permission denied)"
    )


NAMES: list[Callable[[], str]] = [
    lambda: "Katze – grün.png",
    lambda: "貓 🐈 قطة.png",
    lambda: "a b'c\"d%s{}$HOME.png",
    lambda: "-x --help.png",
    lambda: "x" * 251 + ".png",  # file systems take 255 bytes
    lambda: os.fsdecode(b"latin-\xe9.png"),  # not UTF-8
    lambda: "two\nlines\t\x1b[31m.png",
]


@pytest.mark.parametrize("name", [name() for name in NAMES], ids=ascii)
def test_names(tmp_path, name):
    path = tmp_path / name
    try:
        path.write_bytes(encoded("PNG"))
    except OSError:
        pytest.skip("the file system does not take this name")
    np.testing.assert_array_equal(load_image(path), np.asarray(picture()))
    np.testing.assert_array_equal(load_image(str(path)), np.asarray(picture()))
    shutil.copyfile(os.devnull, path)
    assert "the file is empty" in error_of(path)  # which checks that it can be printed


@pytest.mark.parametrize("name", ["y" * 256 + ".png", "z/" * 3000 + "a.png"])
def test_names_that_no_file_can_have(tmp_path, name):
    assert "cannot be read (File name too long)" in error_of(tmp_path / name)


def test_a_null_byte_in_a_name(tmp_path):
    assert "a\\x00b.png: no such file" in error_of(f"{tmp_path}/a\0b.png")
