"""What goes through a run over many videos: settings, videos with their names and prompts."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.data.images import ImageError
from sam3_jax.inference.clicks import read_mask
from sam3_jax.inference.jobs import Job
from sam3_jax.inference.prompts import PromptError
from sam3_jax.video.cut import Span, cut
from sam3_jax.video.frames import VideoError
from sam3_jax.video.reader import VideoSource, open_video
from sam3_jax.video.session import Session

FAILURES = (VideoError, PromptError, ImageError, MemoryError)  # of one video, not of the run


class VideoSettings(NamedTuple):
    """How a run works and what it writes."""

    span: Span = Span()
    fps: Fraction | None = None  # of folders of frames
    delay: int | None = None  # see VideoPredictor.start
    overlay: bool = True  # and the contact sheet
    verbose: bool = False
    workers: int = 4  # threads that draw and make run lengths


class VideoWork(NamedTuple):
    """One video: how it is opened, what a session of it is asked, what its outputs are called."""

    index: int  # in the whole list
    key: str  # identifies it across restarts
    file_name: str  # as the user named it
    name: str
    phrases: tuple[str, ...]  # what results call the prompts
    open: Callable[[], VideoSource]
    ask: Callable[[Session], Any]


def work_of(index: int, job: Job, name: str, settings: VideoSettings) -> VideoWork:
    """A job as it is worked on."""

    def open_it() -> VideoSource:
        return cut(open_video(job.image, fps=settings.fps), settings.span)

    return VideoWork(
        index=index,
        key=job.key,
        file_name=job.image.as_posix(),
        name=name,
        phrases=job.names,
        open=open_it,
        ask=lambda session: ask(session, job, settings.span),
    )


def ask(session: Session, job: Job, span: Span) -> None:
    """Gives a session the prompts of a job.

    Raises:
      PromptError: on a prompt that cannot be used.
      VideoError: when its frame does not exist, or cannot be read.
      ImageError: when its mask cannot be read.
    """
    frame = 0 if job.frame is None else span.place(job.frame, session.video.name)
    if job.threshold is not None:
        raise PromptError(
            f"{job.image}: a video has no threshold of its own: leave out the job's, and give "
            "--threshold for all videos of a run"
        )
    if not job.about_object:
        boxes = {"boxes": job.boxes, "labels": job.box_labels, "frame": frame} if job.boxes else {}
        for phrase in job.phrases or (None,):
            session.add_text(phrase, **boxes)
        return
    object_id = None
    if job.mask_prompt:
        mask = read_mask(Path(job.mask_prompt), session.video.size)
        object_id = session.add_mask(frame, mask)
    if job.points:
        points, labels = job.points, job.point_labels
        session.add_points(frame, points, labels, object_id, box=job.object_box)
    elif job.object_box:
        session.add_box(frame, job.object_box, object_id)
