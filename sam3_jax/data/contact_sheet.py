"""A picture of what training sees: augmented examples with their phrases, targets and boxes.

``python -m sam3_jax.data.contact_sheet --annotations train.json --images photos --recipe paper
--output sheet.png``. One tile a prompt: targets tinted (outlined where there is no mask), exemplar
boxes thick green (red: negative), first clicks white. Nothing is written but the sheet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sam3_jax.data import augment
from sam3_jax.data.annotations import MAX_BAD, annotation_file, image_path, load_annotations
from sam3_jax.data.builder import encode_scene
from sam3_jax.data.examples import Example, ExampleConfig, Prompt, draw_example
from sam3_jax.data.images import ImageError
from sam3_jax.data.placement import resize_mask
from sam3_jax.data.records import AnnotationError
from sam3_jax.data.sampling import SamplingConfig
from sam3_jax.data.scenes import Scene, scenes_of, vocabulary_of
from sam3_jax.data.source import SceneSource
from sam3_jax.inference.postprocess import Detections
from sam3_jax.inference.visualize import overlay, palette
from sam3_jax.training.batch import Clicks

RECIPES = {"released": augment.released, "paper": augment.paper, "plain": augment.plain}
HEADER = 22  # pixels above each tile
GREEN, RED, WHITE = (40, 230, 60), (255, 50, 50), (255, 255, 255)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(argv)
    config = ExampleConfig(
        sampling=SamplingConfig(
            phrases=args.phrases, visual=args.visual, boxes=args.boxes, negative_exemplars=0.5
        ),
        augment=RECIPES[args.recipe](args.resolution),
        mask_size=args.resolution,
        clicks=args.clicks,
    )
    try:
        source = open_files(args.annotations, args.images, args.max_bad)
        rng = np.random.default_rng(args.seed)
        order = rng.permutation(len(source))[: args.count]
        examples = [draw_example(source, int(index), config, rng) for index in order]
        Image.fromarray(draw_sheet(examples, args.columns, args.side)).save(args.output)
    except (AnnotationError, ImageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sum(len(e.prompts) for e in examples)} prompts written to {args.output}")
    return 0


def open_files(annotations: Path, images: Path | None, max_bad: float = MAX_BAD) -> SceneSource:
    """An annotation file and its pictures as they lie there, without writing a data set.

    Raises:
      AnnotationError: unusable annotations, or too many missing pictures.
    """
    dataset = load_annotations([annotations], negatives=False, max_bad=max_bad, mixed=True)
    for line in dataset.problems.lines():
        print(f"warning: {annotations}: {line}", file=sys.stderr)
    folder = images or annotation_file(annotations).parent
    scenes = scenes_of(dataset)
    found = [s for s in scenes if image_path(folder, s.picture.file_name) is not None]
    if len(scenes) - len(found) > max_bad * len(scenes) or not found:
        raise AnnotationError(
            f"{folder}: {len(scenes) - len(found)} of {len(scenes)} pictures are missing; name "
            "their folder with --images"
        )
    return SceneSource(_Unwritten(found, folder), vocabulary_of(dataset))


class _Unwritten:
    """Scenes whose image files are read on demand, in the form of a written data set."""

    def __init__(self, scenes: Sequence[Scene], folder: Path):
        self._scenes = scenes
        self._folder = folder

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self._scenes[index]
        path = image_path(self._folder, scene.picture.file_name)
        return encode_scene(scene._replace(data=path.read_bytes()))


def draw_sheet(
    examples: Sequence[Example], columns: int, side: int
) -> UInt8[np.ndarray, "sheet_h sheet_w 3"]:
    """One tile a prompt, ``columns`` in a row, each ``side`` pixels wide."""
    tiles = [
        _tile(example, number, side)
        for example in examples
        for number in range(len(example.prompts))
    ]
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + HEADER)), (20, 20, 20))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (column * side, row * (side + HEADER)))
    return np.asarray(sheet)


def _tile(example: Example, number: int, side: int) -> Image.Image:
    prompt, size = example.prompts[number], len(example.image)
    masked = np.flatnonzero(prompt.mask_valid)
    masks = [resize_mask(prompt.masks[i], (size, size)) for i in masked]
    shown = Detections(
        np.stack(masks) if masks else np.zeros((0, size, size), bool),
        prompt.boxes[masked].astype(np.float32),
        np.ones(len(masked), np.float32),
    )
    picture = Image.fromarray(overlay(example.image, shown, show_scores=False))
    draw = ImageDraw.Draw(picture)
    line = max(2, size // 250)
    for box, color in zip(prompt.boxes, palette(len(prompt.boxes)), strict=True):
        draw.rectangle(box.tolist(), outline=color, width=line)
    for box, label in zip(prompt.exemplars, prompt.exemplar_labels, strict=True):
        draw.rectangle(box.tolist(), outline=GREEN if label else RED, width=2 * line)
    if number == 0:
        _draw_clicks(draw, example.clicks, 2 * line)
    tile = Image.new("RGB", (side, side + HEADER))
    tile.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (0, HEADER))
    ImageDraw.Draw(tile).text(
        (4, 3), _title(prompt), fill=WHITE, font=ImageFont.load_default(HEADER - 9)
    )
    return tile


def _draw_clicks(draw: ImageDraw.ImageDraw, clicks: Clicks, radius: int) -> None:
    for points, labels in zip(
        clicks.points[clicks.valid], clicks.labels[clicks.valid], strict=True
    ):
        if labels[0] == 2:
            draw.rectangle(points.ravel().tolist(), outline=WHITE, width=radius // 2)
        else:
            x, y = points[0].tolist()
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=WHITE)


def _title(prompt: Prompt) -> str:
    phrase = prompt.phrase
    if phrase != prompt.concept:
        phrase = f"{phrase} ({prompt.concept})"
    open_end = "" if prompt.exhaustive else ", not exhaustive"
    return f"{phrase}: {len(prompt.boxes) or 'none'}{open_end}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam3_jax.data.contact_sheet",
        description="Draws augmented training examples of an annotation file.",
    )
    add = parser.add_argument
    add("--annotations", type=Path, required=True, help="COCO or SA-Co file, or Roboflow folder")
    add("--images", type=Path, help="folder of the pictures; default: that of the annotations")
    add("--output", type=Path, required=True, help="the sheet, for example sheet.png")
    add("--recipe", choices=sorted(RECIPES), default="released", help="augmentation")
    add("--count", type=_positive, default=6, help="examples (default 6)")
    add("--phrases", type=_positive, default=4, help="prompts of each at most (default 4)")
    add("--visual", type=float, default=0.2, help="share of phrases replaced by boxes")
    add("--boxes", type=float, default=0.2, help="share of the others with boxes besides")
    add("--clicks", type=int, default=0, help="clicked objects of each example (default 0)")
    add("--resolution", type=_positive, default=1008, help="side of the model's input")
    add("--side", type=_positive, default=360, help="of a tile, in pixels")
    add("--columns", type=_positive, default=4, help="tiles in a row")
    add("--seed", type=int, default=0)
    add("--max-bad", type=float, default=MAX_BAD, help="largest share of unusable entries")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
