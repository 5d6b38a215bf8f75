"""What ``evaluate.py`` does when the ground truth is of videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sam3_jax.data.annotations import MAX_BAD
from sam3_jax.evaluation.video.annotations import load_video_annotations
from sam3_jax.evaluation.video.davis import score_objects
from sam3_jax.evaluation.video.davis_folders import load_sequences, read_frames
from sam3_jax.evaluation.video.measure import measure_videos
from sam3_jax.evaluation.video.predictions import load_video_predictions
from sam3_jax.evaluation.video.report import write_davis_report, write_track_report
from sam3_jax.inference.files import UsageError


def run_videos(args: argparse.Namespace, layouts: Sequence[str | None]) -> None:
    """Measures predictions as the command's arguments say.

    Args:
      args: of ``evaluation/cli.py``.
      layouts: of the files of ``--gt``, as :func:`~.annotations.video_layout` names them.

    Raises:
      AnnotationError: annotations or predictions cannot be used.
      UsageError: several files, a checkpoint, or an output folder that cannot be made.
      OSError: a file cannot be written.
    """
    gt, predictions, output = args.gt[0], args.predictions, args.output
    if len(args.gt) > 1:
        raise UsageError(
            f"{', '.join(map(str, args.gt))}: several files are the answers of several annotators "
            "to pictures; evaluate annotations of videos one by one"
        )
    if predictions is None:
        raise UsageError(
            f"{gt}: has annotations of videos, which are measured with --predictions alone; "
            "infer.py on the videos makes these"
        )
    if layouts[0] == "davis":
        evaluate_davis(gt, predictions, output, sequences=args.sequences, max_bad=args.max_bad)
        return
    negatives = args.negatives == "all"
    evaluate_tracks(
        gt,
        predictions,
        output,
        negatives=negatives,
        threshold=args.threshold,
        max_bad=args.max_bad,
    )


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
    _make(output)
    info = {"predictions": str(predictions), "negatives": "all" if negatives else "none"}
    evaluation = measure_videos(dataset, found, threshold)
    print(write_track_report(output, dataset, found, evaluation, info))


def evaluate_davis(
    gt: Path,
    predictions: Path,
    output: Path,
    *,
    sequences: Path | None = None,
    max_bad: float = MAX_BAD,
) -> None:
    """J&F of folders of indexed PNGs: prints the table, writes the files.

    Args:
      gt: folder with a folder of PNGs a sequence, or a copy of DAVIS.
      predictions: the same of a model.
      output: folder for the results.
      sequences: a text file with the names of those to measure, one a line.
      max_bad: largest share of frames that may be missing or unreadable.

    Raises:
      AnnotationError: annotations or predictions cannot be used.
      UsageError: the list of names cannot be read, the output folder cannot be made.
      OSError: a file cannot be written.
    """
    names = None
    if sequences is not None:
        try:
            names = sequences.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {sequences}, the names of sequences: {error}") from error
    data, problems, notes = load_sequences(gt, predictions, names)
    _make(output)
    scores, frames = [], 0
    for sequence in data:
        scores += score_objects(sequence.name, read_frames(sequence, problems), sequence.objects)
        frames += len(sequence.frames)
    _warn(predictions, [*problems.lines(), *notes])
    problems.check(str(predictions), frames, max_bad)
    info = {"ground_truth": str(gt), "predictions": str(predictions)}
    print(write_davis_report(output, scores, problems, notes, info))


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {output}: {error}") from error


def _warn(source: Path, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"warning: {source}: {line}", file=sys.stderr)
