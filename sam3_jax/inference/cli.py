"""``infer.py``: find things in pictures and videos and write masks and overlays.

Exit status: 0 all done, 1 some failed (the others are in the results), 2 could not start,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from sam3_jax.demo.weights import KNOWN, weights_path
from sam3_jax.inference.argument_values import parse_threshold
from sam3_jax.inference.arguments import build_parser
from sam3_jax.inference.files import UsageError, expand_inputs, is_video
from sam3_jax.inference.jobs import BadLine, Job, JobError, Share, make_job, read_jobs

if TYPE_CHECKING:
    from sam3_jax.inference.bulk import Summary
    from sam3_jax.inference.engine import Engine
    from sam3_jax.inference.work import Settings

__all__ = ["main", "parse_threshold"]

THRESHOLD = 0.5  # of pictures
# Options with their defaults that one kind of input does not have.
OF_PICTURES = {
    "no_presence": False,
    "nms": "none",
    "nms_threshold": 0.5,
    "max_instances": 0,
    "boxes": "auto",
    "tile": 0,
    "masks": False,
    "semantic": False,
    "labelme": False,
    "yolo": False,
    "batch_size": None,
}
OF_VIDEOS = {"at": None, "frames": (0, None, 1), "fps": None, "preset": "default", "delay": None}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        if args.merge:
            return _merge(args)
        if args.export:
            return _export(args)
        with _termination_interrupts():
            return _run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; the results hold what was done, the same command goes on from there",
            file=sys.stderr,
        )
        return 130


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM, with which clusters end jobs, leaves the results as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _merge(args: argparse.Namespace) -> int:
    from sam3_jax.inference.merge import merge
    from sam3_jax.inference.records import PARTS

    output = _output(args)
    if (output / "videos").is_dir() and not any(output.glob(PARTS)):
        raise UsageError(f"{output} has results of videos only, which need no merging")
    print(merge(output))
    return 0


def _export(args: argparse.Namespace) -> int:
    from sam3_jax.inference.export import export_checkpoint

    made = export_checkpoint(
        _checkpoint(args),
        args.export,
        dtype=args.dtype,
        batch=args.batch_size,
        overwrite=args.overwrite,
    )
    print(made)
    return 0


def _output(args: argparse.Namespace) -> Path:
    if args.output is None:
        raise UsageError("say where the results go: --output DIR")
    return args.output


def _checkpoint(args: argparse.Namespace) -> str:
    """The folder of the weights; without ``--checkpoint`` the bundled ones, and a word about it."""
    if args.checkpoint is not None:
        return args.checkpoint
    try:
        path = weights_path()
    except FileNotFoundError as error:
        raise UsageError(f"no --checkpoint DIR, and {error}") from error
    print(
        f"no --checkpoint: using {KNOWN}; see README.md for SAM 3's own (convert_torch_weights.py)",
        file=sys.stderr,
    )
    return str(path)


def read_work(args: argparse.Namespace) -> list[Job | BadLine]:
    """The jobs of the command line or of its job file, each once.

    Raises:
      UsageError: on prompts or inputs that make no sense.
    """
    prompts = {
        "phrases": list(dict.fromkeys(args.prompt)),
        "boxes": [box for box, _ in args.box],
        "box_labels": [label for _, label in args.box],
        "points": [point for point, _ in args.point],
        "point_labels": [label for _, label in args.point],
        "object_box": args.object_box and args.object_box[0],
        "mask_prompt": args.mask_prompt,
    }
    given = any(value for value in prompts.values()) or args.everything
    if args.jobs:
        if given or args.input:
            raise UsageError("--jobs names inputs and prompts: leave out --input and prompts")
        return list(read_jobs(args.jobs))
    if not args.input:
        raise UsageError("say which pictures or videos: --input FILE..., or --jobs FILE")
    if not given:
        raise UsageError('say what to look for: --prompt "cat", --box x0,y0,x1,y1, or both')
    if not all(phrase.strip() for phrase in prompts["phrases"]):
        raise UsageError("--prompt has an empty phrase")
    if args.everything:
        if any(value for value in prompts.values()):
            raise UsageError("--everything takes no prompts")
        prompts = {"phrases": ["object"]}
    files = expand_inputs(args.input, recursive=args.recursive, as_videos=args.video)
    try:
        return [make_job(file, **prompts, frame=args.at) for file in files]
    except JobError as error:
        raise UsageError(str(error)) from error


def split_work(
    args: argparse.Namespace, work: Sequence[Job | BadLine]
) -> tuple[list[Job | BadLine], list[Job]]:
    """Pictures, with lines that cannot be used, and videos.

    Raises:
      UsageError: on options of the one kind where there is only the other.
    """
    pictures: list[Job | BadLine] = []
    videos: list[Job] = []
    for job in work:
        about_video = isinstance(job, Job) and (args.video or is_video(job.image))
        (videos if about_video else pictures).append(job)
    for options, of, there, hint in (
        (OF_PICTURES, "pictures", pictures, ""),
        (OF_VIDEOS, "videos", videos, "; a folder of frames is one with --video"),
    ):
        for name, default in options.items():
            if not there and getattr(args, name) != default:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is for {of}, and there are none{hint}")
    if videos and args.everything:
        raise UsageError("--everything is for pictures; leave out the videos")
    return pictures, videos


def _run(args: argparse.Namespace) -> int:
    output = _output(args)
    pictures, videos = split_work(args, read_work(args))
    checkpoint = _checkpoint(args)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {output}: {error}") from error

    # Warnings of Pillow are about what it then reads, or refuses with an error that we report.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    PIL.Image.MAX_IMAGE_PIXELS = args.max_megapixels * 500_000 or None  # refused from twice that on
    share = _share(args)
    engine, failed = _load(args, checkpoint), 0
    try:
        if pictures:
            failed += _run_pictures(args, engine, pictures, output, checkpoint, share)
        if videos:
            failed += _run_videos(args, engine, videos, output, checkpoint, share)
    except OSError as error:
        print(f"error: cannot write the results: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # of the devices, or weights that the checkpoint lacks
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if failed:
        print(f"{failed} failed; the results say why", file=sys.stderr)
    return int(failed > 0)


def _load(args: argparse.Namespace, checkpoint: str) -> Engine:
    # Only now what takes seconds to import: --help and mistakes answer at once.
    from sam3_jax.checkpoint import CheckpointError
    from sam3_jax.inference import bulk

    try:
        return bulk.load_engine(checkpoint, dtype=args.dtype, resolution=args.resolution)
    except (CheckpointError, ValueError) as error:
        raise UsageError(str(error)) from error


def _run_pictures(
    args: argparse.Namespace,
    engine: Engine,
    work: Sequence[Job | BadLine],
    output: Path,
    checkpoint: str,
    share: Share,
) -> int:
    """How many failed."""
    from sam3_jax.inference import bulk

    try:
        settings = _settings(args, engine)
    except ValueError as error:
        raise UsageError(str(error)) from error
    info = {"checkpoint": checkpoint, **_description(args, engine)}
    start = time.monotonic()
    summary = bulk.run(
        engine, work, output, settings, info=info, share=share, overwrite=args.overwrite
    )
    print(_report(summary, time.monotonic() - start))
    return summary.failed


def _run_videos(
    args: argparse.Namespace,
    engine: Engine,
    jobs: Sequence[Job],
    output: Path,
    checkpoint: str,
    share: Share,
) -> int:
    """How many failed."""
    from sam3_jax.video.command import run_videos

    start = time.monotonic()
    summary = run_videos(args, engine, jobs, output, checkpoint=checkpoint, share=share)
    done = f"{summary.done} of {summary.done + len(summary.failed)} videos"
    before = f" ({summary.skipped} done before)" if summary.skipped else ""
    seconds = time.monotonic() - start
    print(
        f"{done}{before}, {summary.frames} frames, {summary.objects} objects, {seconds:.1f} s: "
        f"{output}"
    )
    return len(summary.failed)


def _share(args: argparse.Namespace) -> Share:
    """This process's part; joins the other hosts where that was asked for."""
    if args.shard and args.distributed:
        raise UsageError("--distributed finds the parts itself: leave out --shard")
    if not args.distributed:
        return Share(*args.shard) if args.shard else Share()
    import jax

    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"cannot join the other hosts ({error}); away from TPU pods and Slurm give "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from error
    return Share(jax.process_index(), jax.process_count())


def _settings(args: argparse.Namespace, engine: Engine) -> Settings:
    from sam3_jax.inference.options import Options
    from sam3_jax.inference.work import Everything, Settings

    options = Options(
        presence=not args.no_presence,
        nms=args.nms,
        nms_threshold=args.nms_threshold,
        max_instances=args.max_instances,
        boxes=args.boxes,
    ).check()
    everything = Everything(args.points_per_side, args.crop_layers) if args.everything else None
    return Settings(
        threshold=THRESHOLD if args.threshold is None else args.threshold,
        options=options,
        batch_size=args.batch_size or engine.default_batch_size,
        tile=args.tile,
        everything=everything,
        overlay=not args.no_overlay,
        masks=args.masks,
        semantic=args.semantic,
        labelme=args.labelme,
        yolo=args.yolo,
        workers=max(args.workers, 1),
    )


def _description(args: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The settings that results depend on: a run goes on only under the same ones."""
    info = {
        "dtype": engine.dtype.name,
        "resolution": engine.config.image_size,
        "threshold": THRESHOLD if args.threshold is None else args.threshold,
        "presence": not args.no_presence,
        "nms": None if args.nms == "none" else [args.nms, args.nms_threshold],
        "max_instances": args.max_instances,
        "boxes_from": args.boxes,
        "tile": args.tile,
        "boxes": [[*box, "+" if label else "-"] for box, label in args.box],
    }
    if args.everything:
        info["everything"] = [args.points_per_side, args.crop_layers]
    return info


def _report(summary: Summary, seconds: float) -> str:
    done = f"{summary.done} of {summary.done + summary.failed} pictures"
    before = f" ({summary.skipped} done before)" if summary.skipped else ""
    return f"{done}{before}, {summary.instances} instances, {seconds:.1f} s: {summary.results}"
