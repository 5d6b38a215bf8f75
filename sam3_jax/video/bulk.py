"""A whole run over videos: what is left to do, progress, and a line of results for each.

The lines are those of ``sam3_jax/inference/records.py``, in ``videos/`` of the output folder: a
video is done when its line is there and says so, whatever ended the run before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from sam3_jax.inference import records
from sam3_jax.inference.jobs import Share
from sam3_jax.inference.merge import read_done
from sam3_jax.video.follow import follow
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.work import FAILURES, VideoSettings, VideoWork

Follow = Callable[
    [VideoPredictor, VideoWork, Path, VideoSettings, dict[str, Any], tqdm], dict[str, Any]
]
FOLDER = "videos"
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in what jax raises


class VideoSummary(NamedTuple):
    """What came of a run, in this process."""

    done: int  # videos, those of earlier runs included
    skipped: int  # of these, done by earlier runs
    failed: dict[str, str]  # key -> why
    frames: int  # tracked now
    objects: int  # found now


def run(
    predictor: VideoPredictor,
    works: Sequence[VideoWork],
    output: Path,
    settings: VideoSettings,
    *,
    info: dict[str, Any],
    share: Share = Share(),  # noqa: B008  (immutable)
    overwrite: bool = False,
    follow: Follow = follow,
) -> VideoSummary:
    """Does what is left of the videos.

    Args:
      works: of all processes.
      output: an existing folder.
      info: the settings that results depend on.
      share: of this process.
      overwrite: forget earlier results instead of going on.
      follow: what is done with each; :func:`~.follow.follow` writes tracks and overlays.

    Raises:
      UsageError: when the folder holds results of other settings.
      OSError: when results cannot be written.
      RuntimeError: when the devices fail or the checkpoint lacks what a video needs.
    """
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    if overwrite and share.process == 0:
        records.discard(folder)
    before = read_done(folder)
    mine = [work for work in works if work.index % share.processes == share.process]
    left = [work for work in mine if work.key not in before]
    done, failed, frames, objects = len(mine) - len(left), {}, 0, 0
    with records.RecordWriter(records.part_path(folder, *share), info) as writer:
        for place, work in enumerate(left, start=1):
            bar = tqdm(
                unit=" frames",
                desc=f"{place}/{len(left)} {work.name}",
                dynamic_ncols=True,
                disable=None,
            )
            with bar:
                record = _tried(follow, predictor, work, output, settings, info, bar)
            for line in _remarks(record, settings):
                print(line, file=sys.stderr)
            writer.write(record)
            if record["status"] == "ok":
                done += 1
                frames, objects = frames + record["frames"], objects + record["objects"]
            else:
                failed[work.key] = record["error"]
    if share.processes > 1 and jax.process_count() == share.processes:
        # The first host keeps the others' connections.
        multihost_utils.sync_global_devices("sam3_jax: all videos done")
    return VideoSummary(done, len(mine) - len(left), failed, frames, objects)


def _tried(follow: Follow, predictor: VideoPredictor, work: VideoWork, *rest: Any) -> dict:
    """The record of one video, or of what went wrong with it."""
    try:
        return follow(predictor, work, *rest)
    except FAILURES as error:
        return _failed(work, error)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        return _failed(work, error)


def _failed(work: VideoWork, error: BaseException) -> dict[str, Any]:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.removeprefix(f"{work.file_name}: ")
    return records.error_record(work.key, work.file_name, text, index=work.index)


def _remarks(record: dict[str, Any], settings: VideoSettings) -> list[str]:
    name = record["file_name"]
    if record["status"] != "ok":
        return [f"failed: {name}: {record['error']}"]
    lines = [f"warning: {problem}" for problem in record["problems"]]
    if record["bad_frames"]:
        count = record["bad_frames"]
        frames = "1 frame" if count == 1 else f"{count} frames"
        lines.append(f"warning: {name}: {frames} missing or damaged: {record['first_error']}")
    if settings.verbose:
        rate = record["frames"] / max(record["seconds"], 1e-3)
        lines.append(
            f"{name}: {record['width']} x {record['height']}, {record['frames']} frames, "
            f"{rate:.1f} a second with starting; {record['objects']} objects, at most "
            f"{record['objects_at_once']} at once; memory of objects "
            f"{_megabytes(record['state_bytes'])} on the device, copies on the host "
            f"{_megabytes(record['snapshot_bytes'])}"
        )
    return lines


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
