"""Writes the demo's data: ``python -m sam3_jax.demo.dataset OUTPUT``; see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from sam3_jax.data.records import AnnotationError
from sam3_jax.demo.builder import CLOSE_UPS, ShapesConfig, write_train
from sam3_jax.demo.held_out import COUNTS, write_split
from sam3_jax.demo.layout import SceneConfig
from sam3_jax.demo.scene import SPLITS, make_scene
from sam3_jax.demo.sheet import draw_sheet
from sam3_jax.inference.argument_values import parse_count, parse_positive

DESCRIPTION = """\
Draws coloured shapes and handwritten digits on photographs, with phrases ("small red ring",
"striped triangle", "seven"), exact masks, and phrases for what is not there.

OUTPUT/words        training set of close-ups of 64 pixels (TFDS, array_record), which shows what
                    words mean a few objects at a time
OUTPUT/train        training set of whole pictures
OUTPUT/valid, test  held-out pictures and annotations.json: evaluate.py reads them; other
                    photographs, digits by other people, other objects
OUTPUT/unseen       asks only for colours with shapes that training never shows together

Takes ten to fifteen minutes on two cores and 2 GB. What is already there is kept, so that an
interrupted run can be started again.
"""
EPILOG = """\
examples:
  python -m sam3_jax.demo.dataset data                    all of it
  python -m sam3_jax.demo.dataset data --train 500        a small training set to try things on
  python -m sam3_jax.demo.dataset --sheet sheet.png       only look: six test pictures
"""
ROWS = 6  # pictures of a contact sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.output is None and args.sheet is None:
        parser.error("name a folder to write to, or --sheet FILE to look at some pictures")
    try:
        if args.sheet is not None:
            _sheet(args)
        if args.output is not None:
            _write(args)
    except (AnnotationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'sam3_jax[demo]'", file=sys.stderr)
        return 2
    return 0


def _write(args: argparse.Namespace) -> None:
    tfds.disable_progress_bar()  # there is one already
    args.output.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        print(write_split(args.output / split, split))
    close = 5 * args.train // 2 if args.close is None else args.close
    sets = {name: (close, scene) for name, scene in CLOSE_UPS.items()}
    sets["train"] = args.train, SceneConfig()
    for name, (count, scene) in sets.items():
        if count:
            config = ShapesConfig(
                name=name, count=count, seed=args.seed, scene=scene, workers=args.workers
            )
            print(write_train(args.output / name, config))


def _sheet(args: argparse.Namespace) -> None:
    seed = args.seed if args.split == "train" else 0
    numbers = range(args.first, args.first + ROWS)
    scenes = [make_scene(SceneConfig(), args.split, number, seed) for number in numbers]
    Image.fromarray(draw_sheet(scenes)).save(args.sheet)
    print(args.sheet)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam3_jax.demo.dataset",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("output", type=Path, nargs="?", help="folder to write to")
    add(
        "--train",
        type=parse_count,
        default=16000,
        help="training pictures (default 16000; 0: no training sets)",
    )
    add("--close", type=parse_count, help="close-ups (default: 2.5 times as many)")
    add("--seed", type=parse_count, default=0, help="of the training sets (default 0)")
    add(
        "--workers",
        type=parse_positive,
        default=os.cpu_count() or 1,
        help="processes that draw training pictures (default: one a CPU)",
    )
    add("--sheet", type=Path, metavar="FILE", help="draw pictures with their answers into FILE")
    add("--split", choices=SPLITS, default="test", help="that --sheet shows (default test)")
    add("--first", type=parse_count, default=0, help="picture that --sheet shows first (default 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
