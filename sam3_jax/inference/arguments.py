"""The arguments of ``infer.py`` and its help."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

from sam3_jax.inference.options import BOXES, NMS

PRESETS = ("default", "sam3", "sam3.1")

USAGE = """
  %(prog)s --checkpoint DIR --input FILE... --prompt TEXT... --output DIR
  %(prog)s --checkpoint DIR --input FILE... --box x0,y0,x1,y1[,+|-]... [--prompt ...] --output DIR
  %(prog)s --checkpoint DIR --input FILE --point x,y[,+|-]... --output DIR
  %(prog)s --checkpoint DIR --input FILE... --everything --output DIR
  %(prog)s --checkpoint DIR --input VIDEO... --prompt TEXT... --output DIR
  %(prog)s --checkpoint DIR --video --input FOLDER_OF_FRAMES... --prompt TEXT... --output DIR
  %(prog)s --checkpoint DIR --jobs FILE.jsonl --output DIR
  %(prog)s --merge --output DIR
  %(prog)s --checkpoint DIR --export DIR
  %(prog)s --input FILE... --prompt "red ring" --output DIR   (the demonstration weights)"""

DESCRIPTION = """\
Find every instance of a concept in pictures: a phrase, example boxes, or both. Or segment one
object by points, a box or a mask; or everything there is. In videos the same is followed from frame
to frame, every object with a number of its own, in memory that does not grow with the length.

OUTPUT/results.json holds all masks in COCO format (run-length encoded, with boxes and scores);
OUTPUT/NAME_overlay.png shows them. Of a video OUTPUT/NAME_tracks.json has the masks of every object
in every frame (YouTube-VIS layout), NAME_overlay.mp4 and NAME_sheet.jpg show them. What cannot be
read is reported and skipped. A run that was stopped, or killed, goes on where it was when the same
command is given again: with the next picture or video."""

EXAMPLES = """\
examples:
  one picture, one phrase:
    %(prog)s --checkpoint sam3_jax_ckpt --input photo.jpg --prompt "cat" --output out
  a folder with all its folders, two phrases, surer instances only:
    %(prog)s --checkpoint sam3_jax_ckpt --input photos/ --recursive \\
        --prompt "red car" "traffic light" --threshold 0.6 --output out
  everything that looks like the thing in this box (pixels x0,y0,x1,y1):
    %(prog)s --checkpoint sam3_jax_ckpt --input shelf.jpg --box 120,80,260,310 --output out
  a phrase, but not what is in this box:
    %(prog)s --checkpoint sam3_jax_ckpt --input shelf.jpg --prompt "bottle" \\
        --box 400,90,520,330,- --output out
  one object, by a click on it and one beside it:
    %(prog)s --checkpoint sam3_jax_ckpt --input photo.jpg --point 320,240 --point 500,90,- \\
        --output out
  masks for annotation tools, no pictures, ten at a time:
    %(prog)s --checkpoint sam3_jax_ckpt --input 'data/**/*.jpg' --prompt "person" \\
        --labelme --yolo --no-overlay --batch-size 10 --output out
  small things in a huge picture:
    %(prog)s --checkpoint sam3_jax_ckpt --input aerial.tif --prompt "car" --tile 1500 --output out
  a video, two phrases in one pass:
    %(prog)s --checkpoint sam3_jax_ckpt --input clip.mp4 --prompt "red car" "person" --output out
  one object through a video, clicked on in frame 40:
    %(prog)s --checkpoint sam3_jax_ckpt --input clip.mp4 --point 320,240 --at 40 --output out
  a folder of frames, every second one of the first thousand:
    %(prog)s --checkpoint sam3_jax_ckpt --video --input frames/ --fps 30 --frames :1000:2 \\
        --prompt "dog" --output out
  four machines that share the disk (then once: %(prog)s --merge --output out):
    %(prog)s ... --shard 0/4 --output out      %(prog)s ... --shard 1/4 --output out      ...

Different prompts for every picture: --jobs FILE, one JSON object a line, for example
    {"image": "a.jpg", "phrases": ["cat"], "boxes": [[9, 8, 60, 90]], "threshold": 0.4}
    {"image": "b.jpg", "points": [[320, 200]]}
    {"image": "clip.mp4", "object_box": [30, 20, 400, 300], "frame": 12}
(all keys: docs/inference.md). Videos have a page of their own: docs/video.md.

The first picture takes longer: the model is compiled for this machine, and kept in
~/.cache/sam3_jax for the next time (SAM3_JAX_CACHE_DIR=DIR moves it, =off disables it).

exit status: 0 all done, 1 some pictures or videos failed (the results say why), 2 could not start,
130 interrupted."""

Box = tuple[float, float, float, float]


def _signed(text: str, form: str) -> tuple[tuple[float, ...], int]:
    """Numbers as many as ``form`` names, then maybe + or -, all separated by commas."""
    count = len(form.split(","))
    parts = [part.strip() for part in text.split(",")]
    sign = parts.pop() if len(parts) == count + 1 else "+"
    try:
        values = tuple(map(float, parts))
    except ValueError:
        values = ()
    if len(values) != count or sign not in ("+", "-"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {form} in pixels, optionally with ,+ or ,- (not like this)"
        )
    return values, int(sign == "+")


def parse_box(text: str) -> tuple[tuple[float, ...], int]:
    """``"x0,y0,x1,y1"``, optionally ``",+"`` or ``",-"``, -> box and label (1 or 0)."""
    return _signed(text, "x0,y0,x1,y1")


def parse_point(text: str) -> tuple[tuple[float, ...], int]:
    """``"x,y"``, optionally ``",+"`` or ``",-"``, -> point and label (1 or 0)."""
    return _signed(text, "x,y")


def parse_threshold(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def parse_count(text: str) -> int:
    """A number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def parse_shard(text: str) -> tuple[int, int]:
    """``"I/N"``: the part with number I (from 0) of N."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1, such as 0/4")
    return int(first), int(second)


def parse_span(text: str) -> tuple[int, int | None, int]:
    """``"START:STOP:STEP"``, each of which may be left out, as in a slice of Python."""
    parts = [part.strip() for part in text.split(":")]
    if not 2 <= len(parts) <= 3 or not all(part.isdecimal() or not part for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP:STEP, such as 100:400 or ::5")
    start, stop, step = (int(part) if part else None for part in [*parts, ""][:3])
    start, step = start or 0, 1 if step is None else step
    if step < 1 or (stop is not None and stop <= start):
        raise argparse.ArgumentTypeError(f"{text!r} is no frame: START < STOP, STEP from 1 on")
    return start, stop, step


def parse_rate(text: str) -> Fraction:
    """A number of frames a second, also as a quotient such as 30000/1001."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of frames a second up to 1000")
    return rate


def build_parser() -> argparse.ArgumentParser:
    """All arguments."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="folder of convert_torch_weights.py or train.py (default: the package's demonstration "
        "weights, which know coloured shapes and digits)",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="folder for the results and all other outputs"
    )
    _add_inputs(parser)
    _add_prompts(parser)
    _add_settings(parser)
    _add_videos(parser)
    _add_outputs(parser)
    _add_running(parser)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures and videos")
    group.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        type=Path,
        help="pictures, videos (mp4, mov, webm, avi, mkv and more, by their suffix), folders of "
        "them, or patterns such as 'photos/**/*.jpg'",
    )
    group.add_argument("--recursive", action="store_true", help="folders with all folders in them")
    group.add_argument(
        "--video",
        action="store_true",
        help="all inputs are videos: a folder of pictures is the frames of one, in the order of "
        "the numbers in their names; of a folder without any, each folder in it",
    )
    group.add_argument(
        "--jobs", metavar="FILE", type=Path, help="a picture or video and its prompts a line"
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to find: a concept, every instance of it")
    several = {"nargs": "+", "action": "extend", "default": []}
    group.add_argument(
        "--prompt",
        **several,
        metavar="TEXT",
        help='short noun phrases such as "yellow school bus", each one searched for by itself; '
        "the picture goes through the backbone once",
    )
    group.add_argument(
        "--box",
        **several,
        metavar="BOX",
        type=parse_box,
        help="example boxes, x0,y0,x1,y1 in pixels of the picture; with ,- at the end: not like "
        "this; boxes go with every phrase, or stand alone",
    )
    group = parser.add_argument_group("or one object")
    group.add_argument(
        "--point",
        **several,
        metavar="POINT",
        type=parse_point,
        help="x,y on the object; with ,- at the end: not on it",
    )
    group.add_argument(
        "--object-box", metavar="BOX", type=parse_box, help="x0,y0,x1,y1 around the object"
    )
    group.add_argument(
        "--mask-prompt",
        metavar="FILE",
        type=Path,
        help="a rough mask of the object to refine: a picture of the same size, the object not "
        "black",
    )
    group = parser.add_argument_group("or everything")
    group.add_argument(
        "--everything", action="store_true", help="masks of all there is, from a grid of points"
    )
    group.add_argument(
        "--points-per-side",
        default=32,
        metavar="N",
        type=parse_count,
        help="of the grid (default 32: 1024 points)",
    )
    group.add_argument(
        "--crop-layers",
        default=0,
        metavar="N",
        type=parse_count,
        help="search crops of the picture too, 4^n in layer n (default 0)",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings")
    add = group.add_argument
    add(
        "--threshold",
        metavar="P",
        type=parse_threshold,
        help="keep instances scored above this, 0 to 1 (default 0.5); in videos, what is found "
        "anew in a frame (default: the preset's, 0.5, and 0.7 for an object to begin)",
    )
    add(
        "--no-presence",
        action="store_true",
        help="score instances alone, without the probability that the concept is there at all: "
        "finds more, which helps counting",
    )
    add(
        "--nms",
        default="none",
        choices=NMS,
        help="drop the worse of two overlapping instances of a phrase; by intersection over union, "
        "or over the smaller (default none)",
    )
    add("--nms-threshold", default=0.5, metavar="P", type=parse_threshold, help="(default 0.5)")
    add(
        "--max-instances",
        default=0,
        metavar="N",
        type=parse_count,
        help="keep the best N of a phrase (default 0: all)",
    )
    add(
        "--boxes",
        default="auto",
        choices=BOXES,
        help="the model's, or tight ones around the masks; auto: the model's at the resolution "
        "that it was trained at (default)",
    )
    add(
        "--resolution",
        metavar="PIXELS",
        type=parse_count,
        help="side that pictures are resized to, a multiple of 14, best of 336 (default 1008)",
    )
    add(
        "--tile",
        default=0,
        metavar="PIXELS",
        type=parse_count,
        help="cut pictures that are larger into overlapping tiles of this side, beside searching "
        "the whole (default 0: never)",
    )
    add(
        "--max-megapixels",
        default=179,
        metavar="N",
        type=parse_count,
        help="refuse larger pictures, which may be made to fill the memory (default 179; 0: none)",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="precision of computation; auto: bfloat16 on GPU and TPU, float32 on CPU",
    )


def _add_videos(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings of videos")
    add = group.add_argument
    add(
        "--at",
        metavar="FRAME",
        type=parse_count,
        help="the frame, from 0, that boxes, points and the mask are on (default: the first); an "
        "object is followed from there",
    )
    add(
        "--frames",
        default=(0, None, 1),
        metavar="START:STOP:STEP",
        type=parse_span,
        help="a part of the frames: 100:400 from 100 up to 399, ::5 every fifth (default: all)",
    )
    add("--fps", metavar="N", type=parse_rate, help="frames a second of folders (default 25)")
    add(
        "--preset",
        default="default",
        choices=PRESETS,
        help="rules of tracking: as released in SAM 3 or in SAM 3.1, or SAM 3's but with no object "
        "depending on the company of others (default)",
    )
    add(
        "--delay",
        metavar="FRAMES",
        type=parse_count,
        help="frames after which a result is final, at most (default: the preset's 14); with less, "
        "objects are in the results that soon turn out to be none",
    )
    add(
        "--verbose",
        action="store_true",
        help="say what memory tracking takes, and the speed of every video",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("outputs beside results.json")
    add = group.add_argument
    add("--no-overlay", action="store_true", help="draw no pictures, videos or contact sheets")
    add("--masks", action="store_true", help="every mask as a black and white PNG")
    add("--semantic", action="store_true", help="a probability map for each phrase as PNG")
    add("--labelme", action="store_true", help="polygons for LabelMe (JSON)")
    add("--yolo", action="store_true", help="polygons for YOLO segmentation (text)")
    add(
        "--export",
        metavar="DIR",
        type=Path,
        help="write the model as StableHLO programs for use without this package, and stop",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    add = group.add_argument
    add(
        "--batch-size",
        metavar="N",
        type=parse_count,
        help="pictures on the devices together (default: 8 for each GPU or TPU, 1 for each CPU "
        "device); several devices share a batch",
    )
    add(
        "--workers",
        default=4,
        metavar="N",
        type=parse_count,
        help="threads each for reading and writing, of videos for drawing (default 4)",
    )
    add("--overwrite", action="store_true", help="start again, instead of going on")
    add("--shard", metavar="I/N", type=parse_shard, help="work on part I (from 0) of N")
    add(
        "--distributed",
        action="store_true",
        help="share the work among the hosts of a TPU pod or cluster (jax.distributed)",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="of --distributed where it is not found by itself",
    )
    add("--num-processes", metavar="N", type=parse_count)
    add("--process-id", metavar="I", type=parse_count)
    add("--merge", action="store_true", help="make results.json of the parts of --shard, and stop")
