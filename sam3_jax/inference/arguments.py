"""The arguments of ``infer.py`` and its help."""

from __future__ import annotations

import argparse
from pathlib import Path

from sam3_jax.inference.argument_values import (
    parse_box,
    parse_count,
    parse_point,
    parse_rate,
    parse_shard,
    parse_span,
    parse_threshold,
)
from sam3_jax.inference.manual import DESCRIPTION, EXAMPLES, USAGE
from sam3_jax.inference.options import BOXES, NMS

PRESETS = ("default", "sam3", "sam3.1")


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
        "anew in a frame (default: the preset's: 0.5, and 0.7 for an object to begin; sam3.1's are "
        "0.4 and 0.65)",
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
