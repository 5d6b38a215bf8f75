"""``infer.py``: find things in pictures and write masks and overlays.

Exit status: 0 all pictures done, 1 some failed (the others are in the results), 2 could not start,
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sam3_jax.inference.files import UsageError, expand_inputs

USAGE = """
  %(prog)s --checkpoint DIR --input FILE... --prompt TEXT... --output DIR
  %(prog)s --checkpoint DIR --input FILE... --box x0,y0,x1,y1[,+|-]... [--prompt ...] --output DIR
  optional: --threshold P, --dtype auto|bfloat16|float32"""

DESCRIPTION = """\
Find every instance of a concept in pictures: a phrase, example boxes, or both.

OUTPUT/results.json holds all masks in COCO format (run-length encoded, with boxes and scores);
OUTPUT/NAME_overlay.png shows them. A picture that cannot be read is reported and skipped."""

EXAMPLES = """\
examples:
  one picture, one phrase:
    %(prog)s --checkpoint sam3_jax_ckpt --input photo.jpg --prompt "cat" --output out
  a folder, two phrases, surer instances only:
    %(prog)s --checkpoint sam3_jax_ckpt --input photos/ --prompt "red car" "traffic light" \\
        --threshold 0.6 --output out
  everything that looks like the thing in this box (pixels x0,y0,x1,y1):
    %(prog)s --checkpoint sam3_jax_ckpt --input shelf.jpg --box 120,80,260,310 --output out
  a phrase, but not what is in this box:
    %(prog)s --checkpoint sam3_jax_ckpt --input shelf.jpg --prompt "bottle" \\
        --box 400,90,520,330,- --output out

The first picture takes longer: the model is compiled for this machine, and kept in
~/.cache/sam3_jax for the next time (SAM3_JAX_CACHE_DIR=DIR moves it, =off disables it)."""


def parse_box(text: str) -> tuple[tuple[float, ...], int]:
    """``"x0,y0,x1,y1"``, optionally ``",+"`` or ``",-"``, -> box and label (1 or 0)."""
    parts = [part.strip() for part in text.split(",")]
    sign = parts.pop() if len(parts) == 5 else "+"
    try:
        box = tuple(map(float, parts))
    except ValueError:
        box = ()
    if len(box) != 4 or sign not in ("+", "-"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not x0,y0,x1,y1 in pixels, optionally with ,+ or ,- (not like this)"
        )
    return box, int(sign == "+")


def parse_threshold(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments and help."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder of convert_torch_weights.py")
    add(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        type=Path,
        help="pictures, or folders of pictures",
    )
    add(
        "--prompt",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help='short noun phrases such as "yellow school bus", each one searched for by itself',
    )
    add(
        "--box",
        nargs="+",
        action="extend",
        default=[],
        metavar="BOX",
        type=parse_box,
        help="example boxes, x0,y0,x1,y1 in pixels of the picture; with ,- at the end: not like "
        "this; boxes go with every phrase",
    )
    add("--output", required=True, metavar="DIR", type=Path, help="folder for the results")
    add(
        "--threshold",
        default=0.5,
        metavar="P",
        type=parse_threshold,
        help="keep instances scored above this, 0 to 1 (default 0.5)",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="precision of computation; auto: bfloat16 on GPU and TPU, float32 on CPU",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the results hold what was done", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    phrases = list(dict.fromkeys(args.prompt))
    if not phrases and not args.box:
        raise UsageError('say what to look for: --prompt "cat", --box x0,y0,x1,y1, or both')
    if not all(phrase.strip() for phrase in phrases):
        raise UsageError("--prompt has an empty phrase")
    files = expand_inputs(args.input)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {args.output}: {error}") from error

    # Only now what takes seconds to import: --help and mistakes answer at once.
    from sam3_jax.checkpoint import CheckpointError
    from sam3_jax.inference.batch import segment_files
    from sam3_jax.inference.image import ImagePredictor

    try:
        predictor = ImagePredictor.from_pretrained(args.checkpoint, dtype=args.dtype)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    start = time.monotonic()
    try:
        summary = segment_files(
            predictor,
            files,
            args.output,
            phrases=phrases,
            boxes=[box for box, _ in args.box],
            box_labels=[label for _, label in args.box],
            threshold=args.threshold,
            info={"checkpoint": args.checkpoint},
        )
    except OSError as error:
        print(f"error: cannot write the results: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    done = len(files) - summary.failed
    print(
        f"{done} of {len(files)} pictures, {summary.instances} instances, {seconds:.1f} s: "
        f"{summary.results}"
    )
    if summary.failed:
        print(f"{summary.failed} failed; the results say why", file=sys.stderr)
    return int(summary.failed > 0)
