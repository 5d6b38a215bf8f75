"""Masks of everything in an image, without a prompt: clicks on a grid, filtered.

What users of SAM know as ``SAM2AutomaticMaskGenerator``, with its settings and its records
(Segment Anything, arXiv 2304.02643, section 5 and appendix B): each point of a grid is a click of
its own with three hypotheses; those stay that the model itself rates high, that hardly change with
the threshold, and that are not cut off by a crop; duplicates go by non-maximum suppression. Crops
of the image, gone through in the same way, find smaller things.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as coco_mask

from sam3_jax.data.images import ImageSource, load_image
from sam3_jax.inference.crops import Box, crop_boxes, near_crop_edge, point_grid
from sam3_jax.inference.nms import box_nms, boxes_of_masks
from sam3_jax.inference.postprocess import upscale_masks
from sam3_jax.inference.rle import rle_of_crop
from sam3_jax.inference.small_regions import remove_small_regions

MASKS_AT_A_TIME = 8  # at full size: 66 MB on a 4K image
OUTPUT_MODES = ("binary_mask", "coco_rle")


@runtime_checkable
class PointPredictor(Protocol):
    """What the generator needs of a predictor; ``ImagePredictor`` has it."""

    def set_image(self, image: ImageSource) -> None:
        """Encodes an image; the predictions that follow are about it."""

    def predict_point_batch(
        self, points: Float[np.ndarray, "n 2"], *, multimask: bool = True
    ) -> tuple[Float[np.ndarray, "n m h w"], Float[np.ndarray, "n m"]]:
        """Mask logits and estimated IoU of n clicks (x, y), each of them a prompt of its own."""


class MaskRecord(TypedDict):
    """One mask, with the keys that SAM's generator gives."""

    segmentation: Bool[np.ndarray, "h w"] | dict[str, Any]  # or COCO's run lengths
    area: int  # pixels
    bbox: list[int]  # (x, y, width, height)
    predicted_iou: float
    point_coords: list[list[float]]  # the click (x, y) that gave it
    stability_score: float
    crop_box: list[int]  # (x, y, width, height) of the crop that gave it


class _Candidate(NamedTuple):
    """A mask that passed the filters, in pixels of the whole image."""

    rle: dict[str, Any]
    area: int
    box: Box
    iou: float
    stability: float
    point: tuple[float, float]
    crop: Box


@dataclasses.dataclass(frozen=True)
class AutomaticMaskGenerator:
    """Segments everything in an image; settings and defaults are those of SAM 2.

    >>> generator = AutomaticMaskGenerator(ImagePredictor.from_pretrained("sam3_jax_ckpt"))
    >>> records = generator.generate("photo.jpg")
    >>> records[0]["segmentation"], records[0]["area"], records[0]["bbox"]

    Two things differ from SAM 2: the stability score is measured on the masks as they leave the
    model, not scaled up to the image; boxes end after the last pixel, not on it.

    Args:
      predictor: its image is replaced; afterwards it holds the one given to :meth:`generate`.
      points_per_side: of the grid: n makes n x n clicks.
      points_per_batch: clicks that go through the model together.
      pred_iou_thresh: keep masks whose estimated IoU is above; 0 keeps all.
      stability_score_thresh: keep masks at least as stable, see :func:`stability_scores`; 0: all.
      stability_score_offset: by which the threshold of the logits is moved up and down.
      box_nms_thresh: IoU of boxes above which the worse one is a duplicate.
      crop_n_layers: layer i adds crops of the image, 2^i a side; each costs a pass of the backbone.
      crop_nms_thresh: like ``box_nms_thresh``, between crops; the smaller crop wins.
      crop_overlap_ratio: of neighbouring crops in layer 1, as a share of the image's shorter side.
      crop_n_points_downscale_factor: layer i has ``points_per_side`` / factor^i points a side.
      min_mask_region_area: pixels; smaller holes are filled, smaller islands removed; 0: none.
      output_mode: "binary_mask" gives arrays, a byte for every pixel of the image each; "coco_rle"
        run lengths, which take kilobytes.
      multimask_output: three hypotheses a click, or one.

    Raises:
      ValueError: on a setting out of range.
    """

    predictor: PointPredictor
    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.8
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    output_mode: str = "binary_mask"
    multimask_output: bool = True

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "crop_n_points_downscale_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("crop_n_layers", "min_mask_region_area", "stability_score_offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.crop_overlap_ratio < 1:
            raise ValueError(
                f"crop_overlap_ratio must be at least 0 and below 1, got {self.crop_overlap_ratio}"
            )
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(
                f"output_mode must be one of {', '.join(OUTPUT_MODES)}, got {self.output_mode!r}"
            )

    def generate(self, image: ImageSource) -> list[MaskRecord]:
        """Masks of everything in an image, best estimated IoU first.

        Full-size masks exist a few at a time only, unless ``output_mode`` asks for all of them.

        Args:
          image: a file's path, a PIL image, or H x W x 3 uint8 RGB.

        Raises:
          ImageError: when it cannot be read.
        """
        pixels = load_image(image)
        size = pixels.shape[:2]
        crops = crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        found = []
        # The whole image comes last, so that the predictor holds it afterwards.
        for crop, layer in reversed(crops):
            side = int(self.points_per_side / self.crop_n_points_downscale_factor**layer)
            found += self._in_crop(pixels, crop, point_grid(max(side, 1)))
        found.sort(key=lambda c: -c.iou)
        if len(crops) > 1:
            areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (c.crop for c in found)]
            found = _distinct(found, -np.asarray(areas, float), self.crop_nms_thresh)
        if self.min_mask_region_area:
            found = self._cleaned(found)
        return [self._record(c) for c in sorted(found, key=lambda c: -c.iou)]

    def _in_crop(
        self, pixels: np.ndarray, crop: Box, grid: Float[np.ndarray, "n 2"]
    ) -> list[_Candidate]:
        """Distinct masks of one crop of the image."""
        x0, y0, x1, y1 = crop
        self.predictor.set_image(pixels[y0:y1, x0:x1])
        points = grid * (x1 - x0, y1 - y0)
        found = []
        for start in range(0, len(points), self.points_per_batch):
            batch = points[start : start + self.points_per_batch]
            click = self.predictor.predict_point_batch
            logits, iou = click(batch) if self.multimask_output else click(batch, multimask=False)
            found += self._filtered(batch, logits, iou, crop, pixels.shape[:2])
        return _distinct(found, np.asarray([c.iou for c in found]), self.box_nms_thresh)

    def _filtered(
        self,
        points: Float[np.ndarray, "n 2"],
        logits: Float[np.ndarray, "n m h w"],
        iou: Float[np.ndarray, "n m"],
        crop: Box,
        size: tuple[int, int],
    ) -> Iterator[_Candidate]:
        """Hypotheses of some clicks in a crop that are good enough, scaled up."""
        x0, y0, x1, y1 = crop
        point_of, _ = np.indices(iou.shape).reshape(2, -1)
        logits, iou = logits.reshape(-1, *logits.shape[2:]), iou.ravel()
        kept = np.flatnonzero((iou > self.pred_iou_thresh) | (self.pred_iou_thresh <= 0))
        stability = np.zeros(len(iou))
        stability[kept] = stability_scores(logits[kept], self.stability_score_offset)
        kept = kept[stability[kept] >= self.stability_score_thresh]
        for start in range(0, len(kept), MASKS_AT_A_TIME):
            some = kept[start : start + MASKS_AT_A_TIME]
            masks = upscale_masks(logits[some], (y1 - y0, x1 - x0))
            boxes = boxes_of_masks(masks)
            cut = near_crop_edge(boxes + np.asarray([x0, y0, x0, y0], np.float32), crop, size)
            for i, mask, box, gone in zip(
                some, masks, boxes.astype(int).tolist(), cut, strict=True
            ):
                left, top, right, bottom = box
                if gone or right == left:
                    continue
                part = mask[top:bottom, left:right]
                px, py = points[point_of[i]].tolist()
                yield _Candidate(
                    rle=rle_of_crop(part, (y0 + top, x0 + left), size),
                    area=int(np.count_nonzero(part)),
                    box=(x0 + left, y0 + top, x0 + right, y0 + bottom),
                    iou=float(iou[i]),
                    stability=float(stability[i]),
                    point=(x0 + px, y0 + py),
                    crop=crop,
                )

    def _cleaned(self, found: Sequence[_Candidate]) -> list[_Candidate]:
        """Without small regions and what became a duplicate thereby; untouched masks win."""
        results, untouched = [], []
        for candidate in found:
            mask = coco_mask.decode(candidate.rle).astype(bool)
            mask, filled = remove_small_regions(mask, self.min_mask_region_area, "holes")
            mask, removed = remove_small_regions(mask, self.min_mask_region_area, "islands")
            untouched.append(not (filled or removed))
            if not untouched[-1]:
                x0, y0, x1, y1 = box = tuple(boxes_of_masks(mask[None])[0].astype(int).tolist())
                part = mask[y0:y1, x0:x1]
                rle, area = rle_of_crop(part, (y0, x0), mask.shape), int(np.count_nonzero(part))
                candidate = candidate._replace(rle=rle, area=area, box=box)
            results.append(candidate)
        threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
        return _distinct(results, np.asarray(untouched, float), threshold)

    def _record(self, candidate: _Candidate) -> MaskRecord:
        binary = self.output_mode == "binary_mask"
        return MaskRecord(
            segmentation=coco_mask.decode(candidate.rle).astype(bool) if binary else candidate.rle,
            area=candidate.area,
            bbox=_xywh(candidate.box),
            predicted_iou=candidate.iou,
            point_coords=[list(candidate.point)],
            stability_score=candidate.stability,
            crop_box=_xywh(candidate.crop),
        )


def stability_scores(logits: Float[np.ndarray, "n h w"], offset: float) -> Float[np.ndarray, " n"]:
    """IoU of each mask at the threshold +``offset`` with itself at -``offset``; 0 if empty."""
    high = np.count_nonzero(logits > offset, axis=(1, 2))
    low = np.count_nonzero(logits > -offset, axis=(1, 2))
    return high / np.maximum(low, 1)


def _distinct(
    found: Sequence[_Candidate], scores: Float[np.ndarray, " n"], threshold: float
) -> list[_Candidate]:
    """Candidates whose boxes do not overlap those of better ones, best first."""
    boxes = np.asarray([c.box for c in found], float).reshape(-1, 4)
    return [found[i] for i in box_nms(boxes, scores, threshold)]


def _xywh(box: Box) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
