"""What ``evaluate.py`` does when the ground truth is of videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_jax.data.annotations import MAX_BAD
from sam3_jax.evaluation.video.annotations import load_video_annotations
from sam3_jax.evaluation.video.davis import score_objects
from sam3_jax.evaluation.video.davis_folders import (
    annotated_frames,
    load_sequences,
    read_frames,
    sequences_folder,
)
from sam3_jax.evaluation.video.measure import measure_videos
from sam3_jax.evaluation.video.predictions import load_tracks, load_video_predictions
from sam3_jax.evaluation.video.records import VideoDataset, VideoPredictions
from sam3_jax.evaluation.video.report import write_davis_report, write_track_report
from sam3_jax.inference.files import UsageError

if TYPE_CHECKING:
    from sam3_jax.video.predictor import VideoPredictor


def run_videos(args: argparse.Namespace, layouts: Sequence[str | None]) -> int:
    """Measures predictions, or a checkpoint, as the command's arguments say.

    Args:
      args: of ``evaluation/cli.py``.
      layouts: of the files of ``--gt``, as :func:`~.annotations.video_layout` names them.

    Returns:
      how many videos failed, which are in no figure.

    Raises:
      AnnotationError: annotations or predictions cannot be used.
      UsageError: several files, a bad checkpoint, or an output folder that cannot be made.
      OSError: a file cannot be written.
    """
    gt, output = args.gt[0], args.output
    if len(args.gt) > 1:
        raise UsageError(
            f"{', '.join(map(str, args.gt))}: several files are the answers of several annotators "
            "to pictures; evaluate annotations of videos one by one"
        )
    names = _names(args.sequences)
    if layouts[0] == "davis":
        if args.checkpoint is None:
            evaluate_davis(gt, args.predictions, output, names=names, max_bad=args.max_bad)
            return 0
        return _davis_of_checkpoint(args, gt, names)
    options = {
        "negatives": args.negatives == "all",
        "threshold": args.threshold,
        "max_bad": args.max_bad,
    }
    if args.checkpoint is None:
        evaluate_tracks(gt, args.predictions, output, **options)
        return 0
    return _tracks_of_checkpoint(args, gt, **options)


def _predictor(args: argparse.Namespace) -> VideoPredictor:
    from sam3_jax.checkpoint import CheckpointError
    from sam3_jax.video.command import config_of
    from sam3_jax.video.predictor import VideoPredictor

    try:
        return VideoPredictor.from_pretrained(
            args.checkpoint, args.dtype, video=config_of(args.preset)
        )
    except (CheckpointError, RuntimeError) as error:  # RuntimeError: it has no tracker
        raise UsageError(str(error)) from error


def _predictions(args: argparse.Namespace) -> Path:
    folder = args.output / "predictions"
    _make(folder)
    return folder


def _info(args: argparse.Namespace, predictor: VideoPredictor) -> dict[str, Any]:
    return {
        "checkpoint": args.checkpoint,
        "ground_truth": str(args.gt[0]),
        "preset": args.preset,
        "dtype": predictor.engine.dtype.name,
    }


def _tracks_of_checkpoint(
    args: argparse.Namespace, gt: Path, *, negatives: bool, threshold: float, max_bad: float
) -> int:
    """Predicts, then measures; how many videos failed."""
    from sam3_jax.evaluation.video.predict import predict_tracks

    dataset = load_video_annotations(gt, negatives=negatives, max_bad=max_bad)
    _warn(gt, dataset.problems.lines())
    folder = _predictions(args)
    predictor = _predictor(args)
    predicted = predict_tracks(
        predictor, dataset, args.images or gt.parent, folder, info=_info(args, predictor)
    )
    failed = predicted.failed
    if not predicted.files:
        raise UsageError(f"no video could be predicted; the first: {next(iter(failed.values()))}")
    dataset = dataset._replace(
        videos={i: video for i, video in dataset.videos.items() if i not in failed},
        pairs={key: pair for key, pair in dataset.pairs.items() if key[0] not in failed},
    )
    found = load_tracks(predicted.files, dataset, max_bad)
    lost = [f"{number}: {why}" for number, why in failed.items()]
    info = {"predictions": str(folder), "checkpoint": args.checkpoint, "failed_videos": lost}
    _report(args.output, dataset, found, threshold, {**info, "negatives": args.negatives})
    return len(failed)


def _davis_of_checkpoint(args: argparse.Namespace, gt: Path, names: Sequence[str] | None) -> int:
    """Follows the objects of the first masks, then measures; how many sequences failed."""
    from sam3_jax.evaluation.video.predict_masks import frames_folder, predict_masks

    annotations = sequences_folder(gt)
    sequences = annotated_frames(annotations, names)
    frames = args.images or frames_folder(gt, annotations)
    folder = _predictions(args)
    predictor = _predictor(args)
    summary = predict_masks(predictor, sequences, frames, folder, info=_info(args, predictor))
    kept = [name for name in sequences if name not in summary.failed]
    if not kept:
        first = next(iter(summary.failed.values()))
        raise UsageError(f"no sequence could be predicted; the first: {first}")
    info = {"checkpoint": args.checkpoint, "failed_sequences": summary.failed}
    evaluate_davis(gt, folder, args.output, names=kept, max_bad=args.max_bad, info=info)
    return len(summary.failed)


def evaluate_tracks(
    gt: Path,
    predictions: Path,
    output: Path,
    *,
    negatives: bool = True,
    threshold: float = 0.5,
    max_bad: float = MAX_BAD,
) -> None:
    """cgF1, HOTA and TETA of a JSON file of videos: prints the table, writes the files.

    Raises:
      AnnotationError: annotations or predictions cannot be used.
      UsageError: the output folder cannot be made.
      OSError: a file cannot be written.
    """
    dataset = load_video_annotations(gt, negatives=negatives, max_bad=max_bad)
    _warn(gt, dataset.problems.lines())
    found = load_video_predictions(predictions, dataset, max_bad)
    _warn(predictions, [*found.problems.lines(), *found.notes])
    info = {"predictions": str(predictions), "negatives": "all" if negatives else "none"}
    _report(output, dataset, found, threshold, info)


def _report(
    output: Path,
    dataset: VideoDataset,
    found: VideoPredictions,
    threshold: float,
    info: dict[str, Any],
) -> None:
    _make(output)
    evaluation = measure_videos(dataset, found, threshold)
    print(write_track_report(output, dataset, found, evaluation, info))


def evaluate_davis(
    gt: Path,
    predictions: Path,
    output: Path,
    *,
    names: Sequence[str] | None = None,
    max_bad: float = MAX_BAD,
    info: dict[str, Any] | None = None,
) -> None:
    """J&F of folders of indexed PNGs: prints the table, writes the files.

    Args:
      gt: folder with a folder of PNGs a sequence, or a copy of DAVIS.
      predictions: the same of a model.
      output: folder for the results.
      names: of the sequences to measure; None: all.
      max_bad: largest share of frames that may be missing or unreadable.
      info: further facts for the report.

    Raises:
      AnnotationError: annotations or predictions cannot be used.
      UsageError: the output folder cannot be made.
      OSError: a file cannot be written.
    """
    data, problems, notes = load_sequences(gt, predictions, names)
    _make(output)
    scores, frames = [], 0
    for sequence in data:
        scores += score_objects(sequence.name, read_frames(sequence, problems), sequence.objects)
        frames += len(sequence.frames)
    _warn(predictions, [*problems.lines(), *notes])
    problems.check(str(predictions), frames, max_bad)
    info = {"ground_truth": str(gt), "predictions": str(predictions), **(info or {})}
    print(write_davis_report(output, scores, problems, notes, info))


def _names(file: Path | None) -> list[str] | None:
    """Those of a text file, one a line."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}, the names of sequences: {error}") from error


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {output}: {error}") from error


def _warn(source: Path, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"warning: {source}: {line}", file=sys.stderr)
