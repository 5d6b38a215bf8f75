"""Opening a video file: its picture stream, or what is wrong with the file."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from sam3_jax.data.images import printable
from sam3_jax.video.frames import VideoError


@contextlib.contextmanager
def opened(path: Path, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and the first of its picture streams that is no cover; closed at the end.

    Raises:
      VideoError: no such file, not a video, cut off before its index, without pictures.
    """
    _check_file(path, name)
    try:
        # An absolute path, as ffmpeg takes "concat:a" for a protocol; and a playlist must not make
        # it reach into the network.
        limits = {"protocol_whitelist": "file"}
        container = av.open(os.path.abspath(path), container_options=limits)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"{name}: not a video, or cut off before its index ({reason_of(error)}); copy it "
            "again, and let a recording finish"
        ) from error
    with container:
        kind = container.format.name
        if kind in ("tty", "image2") or kind.endswith("_pipe"):  # ffmpeg makes videos of these
            what = "a text" if kind == "tty" else "a picture"
            raise VideoError(f"{name}: is {what}, not a video; name a video file")
        stream = next((s for s in container.streams.video if not _is_cover(s)), None)
        if stream is None:
            if container.streams.audio:
                raise VideoError(f"{name}: has only sound, no video; name a file with pictures")
            raise VideoError(f"{name}: has no video; it may be cut off, copy it again")
        stream.thread_type = "SLICE"  # why: see file.py
        yield container, stream


def _is_cover(stream: VideoStream) -> bool:
    """The cover of an album is a stream of one picture."""
    return bool(stream.disposition & Disposition.attached_pic)


def _check_file(path: Path, name: str) -> None:
    """Raises a VideoError for what cannot be opened, or would wait for ever when opened."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a null byte
        raise VideoError(f"{name}: no such file; check the path") from error
    except OSError as error:
        raise VideoError(f"{name}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(
            f"{name}: is a pipe, a device or a socket; read it in a program of yours and pass an "
            "iterator of its frames"
        )
    if status.st_size == 0:
        raise VideoError(f"{name}: the file is empty; copy it again")


def reason_of(error: BaseException) -> str:
    """One line about an error of ffmpeg."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0])
