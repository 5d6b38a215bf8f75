"""One video from its first frame to its files: results, overlay, contact sheet.

Four things happen at the same time: a thread decodes for the model (``features.py``) and the device
tracks; a second one decodes for the overlay, so that no picture waits in memory until what is found
in it is final; a pool of threads draws and makes run lengths; and the caller's thread encodes and
writes, in order. All queues are short: memory does not depend on the length.
"""

from __future__ import annotations

import collections
import contextlib
import glob
import itertools
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from sam3_jax.inference import records
from sam3_jax.inference.files import SHEET_SUFFIX, VIDEO_OVERLAY_SUFFIX
from sam3_jax.video.contact_sheet import ContactSheet
from sam3_jax.video.display import VideoFrame
from sam3_jax.video.frames import Frame
from sam3_jax.video.overlay import draw_objects
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.prefetch import prefetch
from sam3_jax.video.reader import VideoSource
from sam3_jax.video.results import frame_record, open_results, results_path
from sam3_jax.video.session import Session
from sam3_jax.video.tracks import merge_tracks
from sam3_jax.video.work import VideoSettings, VideoWork
from sam3_jax.video.writer import VideoWriter, open_writer

TRACKS_SUFFIX = "_tracks.json"
FOUND_AHEAD = 2  # frames that were tracked and wait to be drawn
OBJECT = "object"  # what results call the objects of points, boxes and masks
MASK_BYTES = 1 << 30  # of the frames that are drawn at the same time


class _Done(NamedTuple):
    """A frame ready to be written."""

    frame: Frame  # without its picture
    record: dict[str, Any] | None  # None: before the first that is followed
    drawn: UInt8[np.ndarray, "h w 3"] | None


def follow(
    predictor: VideoPredictor,
    work: VideoWork,
    output: Path,
    settings: VideoSettings,
    run: dict[str, Any],
    bar: tqdm,
) -> dict[str, Any]:
    """Tracks one video and writes ``NAME_overlay.mp4``, ``NAME_tracks.json``, ``NAME_sheet.jpg``.

    Each of them is there when it is whole. ``frames/NAME.jsonl`` grows as frames get done; what an
    earlier run left there goes.

    Args:
      output: an existing folder.
      run: settings that results depend on, for the files.
      bar: shows the progress; it is reset.

    Returns:
      the record of the video.

    Raises:
      VideoError, PromptError, ImageError: the video or its prompts cannot be used.
      OSError: with the file's name, when something cannot be written.
    """
    start = time.monotonic()
    source = work.open()
    session = predictor.start(source, delay=settings.delay)
    work.ask(session)
    bar.reset(total=source.count())
    path = results_path(output, work.name)
    _discard(output, work.name, path)
    counts = _Counts()
    sheet = ContactSheet()
    with (
        open_results(path, source, run) as results,
        _movie(output / f"{work.name}{VIDEO_OVERLAY_SUFFIX}", source, settings) as movie,
        contextlib.closing(_finished(session, settings)) as finished,
    ):
        for done in finished:
            if movie is not None and done.drawn is not None:
                # Of a frame without a picture there is a gap, in which the one before stays.
                movie.write(done.drawn, done.frame.pts - counts.begin(done.frame.pts))
            if done.record is None:
                continue
            results.write(done.record)
            if done.drawn is not None:
                sheet.add(done.frame.index, done.frame.time, done.drawn)
            counts.add(done.frame, done.record)
            bar.set_postfix(objects=counts.now, refresh=False)
            bar.update()
    merge_tracks(
        path,
        output / f"{work.name}{TRACKS_SUFFIX}",
        phrases=work.phrases,
        frame_names=source.frame_names,
    )
    suffixes = [TRACKS_SUFFIX]
    if settings.overlay:
        sheet.write(output / f"{work.name}{SHEET_SUFFIX}")
        suffixes += [VIDEO_OVERLAY_SUFFIX, SHEET_SUFFIX]
    record = records.ok_record(
        work.key,
        work.file_name,
        index=work.index,
        size=source.size,
        seconds=time.monotonic() - start,
        phrases=work.phrases,
        annotations=[],
        outputs=[f"{work.name}{suffix}" for suffix in suffixes]
        + [path.relative_to(output).as_posix()],
    )
    memory = {"state_bytes": session.state_bytes, "snapshot_bytes": session.snapshot_bytes}
    return record | counts.facts | memory | {"problems": list(source.problems)}


def _discard(output: Path, name: str, results: Path) -> None:
    """Deletes what a run that was killed left of a video."""
    results.unlink(missing_ok=True)
    for suffix in (TRACKS_SUFFIX, VIDEO_OVERLAY_SUFFIX, SHEET_SUFFIX):
        for left in output.glob(f".{glob.escape(name + suffix)}.*.tmp"):
            left.unlink(missing_ok=True)


class _Counts:
    """What is counted of a video's frames."""

    def __init__(self):
        self.frames = self.now = self._most = self._bad = 0
        self._ids: set[int] = set()
        self._error: str | None = None
        self._begin: int | None = None

    def begin(self, pts: int) -> int:
        """When the first picture was shown."""
        self._begin = pts if self._begin is None else self._begin
        return self._begin

    def add(self, frame: Frame, record: dict[str, Any]) -> None:
        """Counts a frame."""
        ids = [item["id"] for item in record["objects"]]
        self.frames, self.now, self._most = self.frames + 1, len(ids), max(self._most, len(ids))
        self._ids.update(ids)
        if frame.error is not None:
            self._bad += 1
            self._error = self._error or frame.error

    @property
    def facts(self) -> dict[str, Any]:
        """As the record has them; of the errors the first: all are in the video's own results."""
        objects = {"objects": len(self._ids), "objects_at_once": self._most}
        bad = {"bad_frames": self._bad, "first_error": self._error}
        return {"frames": self.frames, **objects, **bad}


@contextlib.contextmanager
def _movie(
    path: Path, source: VideoSource, settings: VideoSettings
) -> Iterator[VideoWriter | None]:
    """The overlay's writer, None where there is to be none."""
    if not settings.overlay:
        yield None
        return
    timing = {"rate": source.rate, "time_base": source.time_base}
    with open_writer(path, source.size, **timing) as writer:
        yield writer


def _found(
    session: Session, *, pictures: bool
) -> Generator[tuple[VideoFrame | None, Frame], None, None]:
    """Frames of the session, each with its picture where that is wanted.

    Pictures come from the video's first on, so that the overlay has the video's times: those before
    the first frame that is followed are with None.
    """
    with contextlib.ExitStack() as stack:
        own = None
        found = stack.enter_context(contextlib.closing(prefetch(session.propagate(), FOUND_AHEAD)))
        for one in found:
            frame = Frame(one.index, 0, one.time, None, one.error)
            if pictures and own is None:
                again = prefetch(session.video.frames(), 2 * FOUND_AHEAD)
                own = stack.enter_context(contextlib.closing(again))
                for before in itertools.islice(own, one.index):
                    yield None, before
            yield one, frame if own is None else next(own, frame)


def _finished(session: Session, settings: VideoSettings) -> Generator[_Done, None, None]:
    """Frames in order, drawn and with their records."""
    size, named = session.video.size, bool(session.phrases)
    waiting: collections.deque[Future[_Done]] = collections.deque()
    with (
        ThreadPoolExecutor(settings.workers, "draw") as pool,
        contextlib.closing(_found(session, pictures=settings.overlay)) as frames,
    ):
        try:
            for found, frame in frames:
                waiting.append(pool.submit(_finish, found, frame, size, named))
                held = max(0 if found is None else found.masks.nbytes, 1)
                while len(waiting) > min(2 * settings.workers, MASK_BYTES // held):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finish(found: VideoFrame | None, frame: Frame, size: tuple[int, int], named: bool) -> _Done:
    """One frame, in a thread of the pool."""
    if found is None:
        return _Done(frame._replace(image=None), None, frame.image)
    objects = found.objects
    objects = objects._replace(phrases=tuple(phrase or OBJECT for phrase in objects.phrases))
    drawn = None
    if frame.image is not None:
        drawn = draw_objects(frame.image, objects, show_phrases=named)
    return _Done(frame._replace(image=None), frame_record(frame, objects, size), drawn)
