"""What ``infer.py`` does with videos: its arguments -> settings, a predictor, a run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.inference.engine import Engine
from sam3_jax.inference.files import output_names
from sam3_jax.inference.jobs import Job, Share
from sam3_jax.video import bulk
from sam3_jax.video.bulk import VideoSummary
from sam3_jax.video.config import NAMED, VideoConfig
from sam3_jax.video.cut import Span
from sam3_jax.video.predictor import VideoPredictor
from sam3_jax.video.work import VideoSettings, work_of


def run_videos(
    args: argparse.Namespace,
    engine: Engine,
    jobs: Sequence[Job],
    output: Path,
    *,
    checkpoint: str,
    share: Share,
) -> VideoSummary:
    """Tracks all videos of a command.

    Args:
      args: of ``inference/arguments.py``.
      jobs: about videos alone.
      output: an existing folder.

    Raises:
      as :func:`~.bulk.run`.
    """
    settings = VideoSettings(
        span=Span(*args.frames),
        fps=args.fps,
        delay=args.delay,
        overlay=not args.no_overlay,
        verbose=args.verbose,
        workers=max(args.workers, 1),
    )
    devices = 1 if engine.mesh is None else engine.mesh.size
    config = config_of(args.preset, args.threshold, devices)
    predictor = VideoPredictor.from_engine(engine, video=config)
    if args.verbose:
        print(_memory(predictor), file=sys.stderr)
    names = output_names([job.image for job in jobs])
    named = zip(jobs, names, strict=True)
    works = [work_of(i, job, name, settings) for i, (job, name) in enumerate(named)]
    phrases = list(dict.fromkeys(name for job in jobs for name in job.names))
    info = {"checkpoint": checkpoint, **_description(args, engine), "phrases": phrases}
    return bulk.run(
        predictor, works, output, settings, info=info, share=share, overwrite=args.overwrite
    )


def config_of(preset: str, threshold: float | None = None, devices: int = 1) -> VideoConfig:
    """A preset without snapshots, as nobody goes back.

    Args:
      threshold: lowest score of detections that count, and of those that begin a new object; None:
        the preset's.
      devices: that share the objects of a bucket, which is enlarged to so many or a multiple.
    """
    config = NAMED[preset]()
    slots = -(-config.tracker.bucket_size // devices) * devices
    config = dataclasses.replace(
        config,
        tracker=dataclasses.replace(config.tracker, bucket_size=slots),
        snapshot_bytes=0,
    )
    if threshold is None:
        return config
    rules = dataclasses.replace(config.concepts, detection_score=threshold, new_score=threshold)
    return dataclasses.replace(config, concepts=rules)


def _description(args: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The settings that results depend on: a run goes on only under the same ones."""
    return {
        "dtype": engine.dtype.name,
        "resolution": engine.config.image_size,
        "preset": args.preset,
        "threshold": args.threshold,
        "delay": args.delay,
        "frames": list(args.frames),
        "fps": None if args.fps is None else float(args.fps),
        "at": args.at,
        "boxes": [[*box, "+" if label else "-"] for box, label in args.box],
        "points": [[*point, "+" if label else "-"] for point, label in args.point],
        "object_box": args.object_box and args.object_box[0],
        "mask_prompt": args.mask_prompt and args.mask_prompt.as_posix(),
    }


def _memory(predictor: VideoPredictor) -> str:
    """What tracking takes, whatever the length of a video."""
    sizes = predictor.state_bytes(1)
    slots = predictor.video.tracker.bucket_size
    return (
        f"memory of objects: {sizes.per_object / 1e6:.3g} MB each, "
        f"{sizes.per_bucket / 1e6:.3g} MB for each {slots} of a session, at any length"
    )
