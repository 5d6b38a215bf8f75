"""The demo: ``python -m sam3_jax.demo``, or ``make demo``; see ``--help``.

Exit status: 0 it ran, whatever was found, 2 it could not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sam3_jax.demo.weights import DISTINCT, weights_path

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool

    from sam3_jax.demo.questions import Picture, Question
    from sam3_jax.inference.image import ImagePredictor

DESCRIPTION = """\
Shows what SAM 3 does, on weights that the package brings: a small SAM 3 (6 million parameters, of
which half are the vocabulary) that was trained from random values on drawn shapes and handwritten
digits. It finds them by phrases, by one exemplar box and by a click, in scenes that were in no
training, validation or test set, and in a real photograph.

OUTPUT/*.png          every answer: what was found in its colours, the rest dimmed
OUTPUT/overview.png   all of them
OUTPUT/pictures/      the pictures alone, to try infer.py on
OUTPUT/clip.mp4       things that move, to try it on a video
"""
SURE = 0.5  # IoU from which an object counts as found


class Result(NamedTuple):
    """One question's outcome."""

    picture: str
    prompt: str
    found: int
    expected: int
    hits: int | None  # expected objects that were found; None: nothing to compare with
    iou: float  # mean over the expected objects, nan where there is nothing to compare
    right: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        checkpoint = args.checkpoint or weights_path()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Only now what takes seconds to import: --help and mistakes answer at once.
    from sam3_jax.checkpoint import CheckpointError
    from sam3_jax.demo.questions import draw_pictures
    from sam3_jax.inference.image import ImagePredictor

    try:
        pictures = draw_pictures()
        predictor = ImagePredictor.from_pretrained(checkpoint)
        results = run(predictor, pictures, args.output)
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'sam3_jax[demo]'", file=sys.stderr)
        return 2
    except (CheckpointError, OSError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(report(results, args.output, args.checkpoint))
    return 0


def run(predictor: ImagePredictor, pictures: Sequence[Picture], output: Path) -> list[Result]:
    """Asks, draws and writes everything.

    Raises:
      OSError: when a file cannot be written.
      RuntimeError: when the checkpoint lacks the weights for a question.
    """
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from sam3_jax.demo.clips import write_video
    from sam3_jax.demo.questions import CLIP, SEED
    from sam3_jax.demo.tiles import draw_overview, draw_tile

    (output / "pictures").mkdir(parents=True, exist_ok=True)
    results, tiles = [], []
    for picture in tqdm(pictures, unit=" pictures", desc="compiling, then finding", disable=None):
        Image.fromarray(picture.pixels).save(output / "pictures" / f"{picture.name}.png")
        predictor.set_image(picture.pixels)
        for question in picture.questions:
            masks = answer(predictor, question)
            result = judge(question, masks)
            tile = draw_tile(picture.pixels, masks, question, _caption(question, result))
            Image.fromarray(tile).save(output / result.picture)
            results.append(result)
            tiles.append(np.asarray(tile))
    Image.fromarray(draw_overview(tiles)).save(output / "overview.png")
    write_video(output / "clip.mp4", "test", CLIP, seed=SEED)
    return results


def answer(predictor: ImagePredictor, question: Question) -> Bool[np.ndarray, "n h w"]:
    """Masks that the prompt finds in the predictor's image; of a click the best guess."""
    if question.point is not None:
        found = predictor.predict_points([question.point])
        best = int(found.iou.argmax())
        return found.masks[best : best + 1]
    boxes = () if question.box is None else [question.box]
    return predictor.predict(question.text, boxes, options=DISTINCT).masks


def judge(question: Question, masks: Bool[np.ndarray, "n h w"]) -> Result:
    """Compares the masks with those that are right, by the assignment of largest total IoU."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    found, right = len(masks), len(masks) == question.count
    hits, iou = None if question.masks is None else 0, math.nan
    if question.masks is not None and question.count:
        a, b = (m.reshape(len(m), math.prod(m.shape[1:])) for m in (masks, question.masks))
        both = a.astype(np.float32) @ b.T.astype(np.float32)
        ious = both / (a.sum(1)[:, None] + b.sum(1) - both)
        matched = ious[linear_sum_assignment(ious, maximize=True)]
        iou = float(matched.sum() / question.count)
        hits = int((matched >= SURE).sum())
        right = right and hits == question.count
    name = f"{question.name}.png"
    return Result(name, question.prompt, found, question.count, hits, iou, right)


def report(results: Sequence[Result], output: Path, checkpoint: str | None = None) -> str:
    """The table, where the pictures are, and what to try next with ``checkpoint``."""
    from sam3_jax.demo.questions import CLIP_PHRASES
    from sam3_jax.evaluation.tables import markdown, number

    rows = [["picture", "prompt", "found", "expected", "mean IoU", "right"]]
    for r in results:
        numbers = str(r.found), str(r.expected), number(r.iou)
        rows.append([r.picture, r.prompt, *numbers, "yes" if r.right else "no"])
    as_expected = sum(r.right for r in results)
    weights = f" --checkpoint {checkpoint}" if checkpoint else ""
    return "\n".join(
        [
            markdown(rows),
            "",
            f"{as_expected} of {len(results)} answers are right (as many as there are, each with "
            f"an IoU of {SURE} or more; of the coins only the number is known).",
            f"The pictures are in {output}; {output / 'overview.png'} shows them all.",
            "",
            "Next, with the same weights:",
            f"  {_program()}{weights} --input {output / 'pictures'} --prompt 'red circle' 'ring' "
            f"--nms {DISTINCT.nms} --nms-threshold {DISTINCT.nms_threshold:g} "
            f"--output {output / 'found'}",
            f"  {_program()}{weights} --input {output / 'clip.mp4'} --prompt "
            f"{' '.join(map(repr, CLIP_PHRASES))} --output {output / 'followed'}",
            "They know nothing but shapes and digits; SAM 3's own find anything: README.md.",
        ]
    )


def _caption(question: Question, result: Result) -> str:
    if result.hits is None:
        outcome = f"{result.found} found of {result.expected}"
    else:
        wrong = result.found - result.hits
        outcome = f"{result.hits} of {result.expected}" if result.expected else "none found"
        if wrong:
            outcome = f"{outcome}, {wrong} wrong" if result.expected else f"{wrong} found"
    return ", ".join(part for part in (outcome, question.note) if part)


def _program() -> str:
    """How this environment runs ``infer.py`` from the current folder."""
    here = Path.cwd()
    if not (here / "infer.py").is_file():
        return "sam3-infer"
    python = Path(sys.executable)
    shown = python.relative_to(here) if python.is_relative_to(here) else "python"
    return f"{shown} infer.py"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam3_jax.demo",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, default=Path("demo"), help="(default: demo)")
    add("--checkpoint", metavar="DIR", help="other weights (default: those of the package)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
