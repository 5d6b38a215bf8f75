"""``evaluate.py``: measure predictions, or a checkpoint, against annotations.

Exit status: 0 all pictures or videos measured, 1 some failed (the figures are of the others), 2
could not start, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.inference.argument_values import parse_threshold
from sam3_jax.inference.arguments import PRESETS
from sam3_jax.inference.files import UsageError

MIN_SCORE = 0.05  # COCO AP wants low scores too; below this one they hardly count

USAGE = """
  %(prog)s --gt A.json [B.json C.json] --predictions P.json --output DIR
  %(prog)s --gt A.json [B.json C.json] --checkpoint DIR [--images DIR] --output DIR
  %(prog)s --gt VIDEOS.json|DAVIS_FOLDER --predictions FILE|FOLDER --output DIR
  %(prog)s --gt VIDEOS.json|DAVIS_FOLDER --checkpoint DIR [--images DIR] --output DIR
  optional: --images DIR, --negatives all|none, --threshold P, --min-score P, --max-bad SHARE,
  --gallery N, --dtype auto|bfloat16|float32, --sequences FILE, --preset P"""

DESCRIPTION = """\
Measure how well instances of phrases are found: cgF1 with all its parts, COCO AP, mIoU.

--gt takes SA-Co files (several: the answers of several annotators to the same pairs), COCO
instance files, and Roboflow folders. --predictions takes COCO results of any model, or a
results.json of infer.py. With --checkpoint the model is run first, and what it finds is kept in
OUTPUT/predictions.json, so that a second run can measure it again with --predictions.

OUTPUT then holds metrics.json (everything), metrics.md (the table), phrases.csv and pairs.csv (a
row for each phrase and each image-phrase pair), and worst.png (the worst pairs, annotated and
predicted side by side).

Videos, which --gt is recognised to be by its content:
  YouTube-VIS and SA-Co VEval files: cgF1 of mask volumes, HOTA (of phrases and of categories) and
    TETA; predictions in YouTube-VIS' result layout, or files with videos, categories and
    annotations of their own, one or a folder of them. Writes metrics.json, metrics.md, pairs.csv,
    videos.csv and phrases.csv.
  Folders of indexed PNGs, as DAVIS has them: J&F, region similarity and contour accuracy;
    predictions in the same layout. Writes metrics.json, metrics.md, objects.csv, sequences.csv.
With --checkpoint the videos are looked through for their phrases, or the objects followed from the
masks of their first frame; OUTPUT/predictions has what was found, and a run that was stopped goes
on with the next video."""

EXAMPLES = """\
examples:
  a checkpoint on a COCO file:
    %(prog)s --gt instances_val2017.json --checkpoint sam3_jax_ckpt --images val2017/ --output out
  the same figures once more, without running the model:
    %(prog)s --gt instances_val2017.json --predictions out/predictions.json --output out2
  a split that Roboflow exported, only the categories that are in each picture:
    %(prog)s --gt dataset/valid --checkpoint sam3_jax_ckpt --negatives none --output out
  SA-Co/Gold, three annotators, predictions of any model:
    %(prog)s --gt gold_a.json gold_b.json gold_c.json --predictions coco_predictions_segm.json \\
        --output out

  SA-Co VEval, or YouTube-VIS, tracks of any model:
    %(prog)s --gt saco_veval_sav_test.json --predictions saco_veval_sav_test_preds.json \
        --output out
  DAVIS 2017, the sequences of its validation split:
    %(prog)s --gt DAVIS --sequences DAVIS/ImageSets/2017/val.txt --predictions masks/ --output out
  a checkpoint on them:
    %(prog)s --gt saco_veval_sav_test.json --checkpoint sam3_jax_ckpt --images JPEGImages_24fps/ \\
        --output out
    %(prog)s --gt DAVIS --sequences DAVIS/ImageSets/2017/val.txt --checkpoint sam3_jax_ckpt \\
        --output out

What each figure is, and every choice behind it: docs/evaluation.md."""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments and help."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--gt",
        required=True,
        nargs="+",
        metavar="FILE",
        type=Path,
        help="annotations: JSON files, one Roboflow folder, or one folder in DAVIS' layout",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--predictions",
        metavar="FILE",
        type=Path,
        help="JSON to measure; of videos also a folder of such files, or of indexed PNGs",
    )
    source.add_argument("--checkpoint", metavar="DIR", help="folder of convert_torch_weights.py")
    add(
        "--images",
        metavar="DIR",
        type=Path,
        help="folder of the pictures, videos or folders of frames (default: that of the first "
        "annotation file; DAVIS: its JPEGImages)",
    )
    add("--output", required=True, metavar="DIR", type=Path, help="folder for the results")
    _add_settings(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--negatives",
        default="all",
        choices=("all", "none"),
        help="COCO, Roboflow, YouTube-VIS: ask for every category in every picture or video "
        "(default), or only for those that are annotated in it; without negatives IL_MCC, and so "
        "cgF1, is 0",
    )
    add(
        "--threshold",
        default=0.5,
        metavar="P",
        type=parse_threshold,
        help="lowest score that counts in cgF1, mIoU, HOTA and TETA (default 0.5, the protocols')",
    )
    add(
        "--min-score",
        default=MIN_SCORE,
        metavar="P",
        type=parse_threshold,
        help="with --checkpoint: keep instances scored above this (default %(default)s; 0 keeps "
        "all, for AP to the last digit)",
    )
    add(
        "--max-bad",
        default=0.1,
        metavar="SHARE",
        type=parse_threshold,
        help="stop when more than this share of a file's entries is unusable (default 0.1)",
    )
    add("--gallery", default=12, metavar="N", type=int, help="worst pairs to draw (default 12)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="precision of computation; auto: bfloat16 on GPU and TPU, float32 on CPU",
    )
    add(
        "--preset",
        default="default",
        choices=PRESETS,
        help="videos with --checkpoint: rules of tracking, see infer.py (default %(default)s)",
    )
    add(
        "--sequences",
        metavar="FILE",
        type=Path,
        help="DAVIS: text file with the names of the sequences to measure (default: all)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = build_parser().parse_args(argv)
    # Only now what takes time to import: --help and mistakes answer at once.
    from sam3_jax.data.records import AnnotationError

    try:
        return _run(args)
    except (UsageError, AnnotationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write the results: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the predictions hold what was done", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from sam3_jax.data.annotations import (
        annotation_file,
        check_pictures,
        load_annotations,
    )
    from sam3_jax.evaluation.measure import measure
    from sam3_jax.evaluation.predictions import load_predictions
    from sam3_jax.evaluation.report import write_report
    from sam3_jax.evaluation.video.annotations import video_layout
    from sam3_jax.evaluation.video.command import run_videos

    layouts = [video_layout(path) for path in args.gt]
    if any(layouts):
        failed = run_videos(args, layouts)
        print(f"written to {args.output}")
        if failed:
            print(f"{failed} videos failed and are in no figure", file=sys.stderr)
        return int(failed > 0)
    images = args.images or annotation_file(args.gt[0]).parent
    if args.images and not args.images.is_dir():
        raise UsageError(f"{args.images}: no such folder; --images names that of the pictures")
    dataset = load_annotations(
        args.gt,
        negatives=args.negatives == "all",
        max_bad=args.max_bad,
    )
    _warn(str(args.gt[0]), dataset.problems.lines())
    if args.checkpoint:
        check_pictures(dataset, images, args.max_bad)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {args.output}: {error}") from error
    file = args.predictions or _predict(args, dataset, images)
    predictions = load_predictions(file, dataset, args.max_bad)
    _warn(str(file), [*predictions.problems.lines(), *predictions.notes])
    evaluation = measure(dataset, predictions, args.threshold)
    info = {"predictions": str(file), "checkpoint": args.checkpoint, "negatives": args.negatives}
    print(write_report(args.output, dataset, predictions, evaluation, info))
    if args.gallery > 0:
        _draw(args, dataset, predictions, evaluation, images)
    print(f"written to {args.output}")
    if predictions.failed:
        print(
            f"{len(predictions.failed)} pictures failed and are in no figure; metrics.json names "
            "them",
            file=sys.stderr,
        )
    return int(bool(predictions.failed))


def _predict(args: argparse.Namespace, dataset: Any, images: Path) -> Path:
    """Runs the checkpoint and returns the file of its predictions."""
    from sam3_jax.checkpoint import CheckpointError
    from sam3_jax.evaluation.predict import predict_dataset
    from sam3_jax.inference.image import ImagePredictor

    try:
        predictor = ImagePredictor.from_pretrained(args.checkpoint, dtype=args.dtype)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    path = args.output / "predictions.json"
    info = {"checkpoint": args.checkpoint, "ground_truth": dataset.sources}
    predict_dataset(predictor, dataset, images, path, min_score=args.min_score, info=info)
    return path


def _draw(
    args: argparse.Namespace, dataset: Any, predictions: Any, evaluation: Any, images: Path
) -> None:
    from sam3_jax.evaluation.gallery import draw_gallery
    from sam3_jax.evaluation.measure import worst_pairs

    keys = worst_pairs(dataset, evaluation, args.gallery)
    path = args.output / "worst.png"
    failures = draw_gallery(keys, dataset, predictions, evaluation, images, path)
    if failures:
        hint = "" if args.images else "; --images names the folder of the pictures"
        _warn("worst.png", [f"{len(failures)} pictures could not be drawn: {failures[0]}{hint}"])


def _warn(source: str, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"warning: {source}: {line}", file=sys.stderr)
