"""Huge images: cut into overlapping tiles, and what was found in the tiles put together again.

An instance of the whole picture is a crop of its mask with a place (``placed.py``), because a
mask of a 20000 x 15000 picture takes 300 MB.

Upstream has nothing like it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool
from scipy.sparse import coo_array, csgraph

from sam3_jax.inference.nms import boxes_of_masks, overlap_ratio
from sam3_jax.inference.placed import Placed
from sam3_jax.inference.postprocess import Detections

Window = tuple[int, int, int, int]  # (y0, x0, y1, x1), pixels of the picture, ends not included


def tile_grid(size: tuple[int, int], tile: int, overlap: float = 0.25) -> list[Window]:
    """Windows (y0, x0, y1, x1) that cover a picture, row by row, evenly spread.

    All have the same size: ``tile``, or the picture's own side where that is smaller.

    Args:
      size: (height, width) of the picture.
      tile: side of a window in pixels.
      overlap: least share of a tile that neighbours have in common, 0 to below 1.

    Raises:
      ValueError: on a size, tile or overlap out of range.
    """
    if min(size) < 1 or tile < 1:
        raise ValueError(f"size and tile must be at least 1 pixel, got {size} and {tile}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    (height, width), stride = size, max(1, math.floor(tile * (1 - overlap)))

    def starts(length: int) -> list[int]:
        room = max(length - tile, 0)
        gaps = math.ceil(room / stride)
        return [room * i // max(gaps, 1) for i in range(gaps + 1)]

    return [
        (y, x, min(y + tile, height), min(x + tile, width))
        for y in starts(height)
        for x in starts(width)
    ]


def merge_tiles(
    found: Iterable[Detections],
    windows: Sequence[Window],
    size: tuple[int, int],
    *,
    threshold: float = 0.5,
    measure: str = "iou",
) -> list[Placed]:
    """Instances of all tiles in the whole picture; those of one object become one.

    Two tiles saw the same object if their masks agree within the region that both tiles show. So
    an object larger than the overlap is joined from tile to tile, however many it runs through:
    the union of the masks, the envelope of the boxes, the best score. With "iou" and a threshold
    of .5 or more an instance joins at most one of several disjoint ones of another tile. "iom"
    also joins the stump that one tile cuts off an object which the other shows in full, but may
    chain neighbours whose masks touch.

    Args:
      found: detections of each window, masks at the window's size. A generator will do: only the
        surroundings of each object are kept.
      windows: as :func:`tile_grid` gives them.
      size: (height, width) of the picture.
      threshold: overlap strictly above it joins.
      measure: "iou" or "iom", of the parts of the two masks in the common region.

    Returns:
      instances, best score first; ties keep the order of tiles.

    Raises:
      ValueError: on detections that do not belong to the windows, or another measure.
    """
    tiles = list(_placed_by_tile(found, windows, size))
    first = np.cumsum([0, *map(len, tiles)])
    parts = [part for tile in tiles for part in tile]
    pairs = []
    for a, window_a in enumerate(windows):
        for b in range(a + 1, len(windows)):
            shared = _meet(window_a, windows[b]) if tiles[a] and tiles[b] else None
            if shared:
                same = _same(tiles[a], tiles[b], shared, measure, threshold)
                pairs += [(first[a] + i, first[b] + j) for i, j in same]
    rows, cols = np.asarray(pairs, np.intp).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, cols)), (len(parts),) * 2)
    _, labels = csgraph.connected_components(graph, directed=False)
    groups: dict[int, list[Placed]] = {}
    for part, label in zip(parts, labels, strict=True):
        groups.setdefault(int(label), []).append(part)
    return sorted(map(_union, groups.values()), key=lambda placed: -placed.score)


def to_detections(
    placed: Sequence[Placed], size: tuple[int, int], *, max_pixels: int = 1 << 32
) -> Detections:
    """The same instances with masks of the whole picture, for what needs them (overlays).

    Args:
      placed: as :func:`merge_tiles` gives them.
      size: (height, width) of the picture.
      max_pixels: of all masks together; a pixel takes a byte.

    Raises:
      ValueError: on more pixels than that.
    """
    height, width = size
    if len(placed) * height * width > max_pixels:
        raise ValueError(
            f"{len(placed)} masks of {height} x {width} pixels would take "
            f"{len(placed) * height * width / 1e9:.1f} GB; write them with rle_of_crop, or make "
            "the picture or the number of instances smaller"
        )
    masks = np.zeros((len(placed), height, width), bool)
    for mask, one in zip(masks, placed, strict=True):
        mask[one.y : one.y + one.mask.shape[0], one.x : one.x + one.mask.shape[1]] = one.mask
    return Detections(
        masks,
        np.asarray([one.box for one in placed], np.float32).reshape(-1, 4),
        np.asarray([one.score for one in placed], np.float32),
    )


def _placed_by_tile(
    found: Iterable[Detections], windows: Sequence[Window], size: tuple[int, int]
) -> Iterator[list[Placed]]:
    """Of every window its instances, cut down to their extents."""
    number = 0
    for number, detections in enumerate(found, start=1):
        if number > len(windows):
            break
        y0, x0, y1, x1 = window = windows[number - 1]
        if detections.masks.shape[1:] != (y1 - y0, x1 - x0) or _meet(window, (0, 0, *size)) != (
            window
        ):
            raise ValueError(
                f"masks of shape {detections.masks.shape} do not fit window {number}, {window}, "
                f"of a picture of {size[0]} x {size[1]} pixels"
            )
        extents = boxes_of_masks(detections.masks).astype(int).tolist()
        placed = []
        for mask, box, score, (left, top, right, bottom) in zip(*detections, extents, strict=True):
            crop = mask[top:bottom, left:right].copy()  # so that the tile's masks can go
            moved = np.asarray(box, np.float32) + np.asarray([x0, y0, x0, y0], np.float32)
            placed.append(Placed(crop, y0 + top, x0 + left, moved, float(score)))
        yield placed
    if number != len(windows):
        raise ValueError(
            f"there are {len(windows)} windows, but detections of {number} or more; give one "
            "Detections for each window"
        )


def _extent(placed: Placed) -> Window:
    height, width = placed.mask.shape
    return placed.y, placed.x, placed.y + height, placed.x + width


def _meet(a: Window, b: Window) -> Window | None:
    """The region that two windows have in common, None without any."""
    y0, x0, y1, x1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (y0, x0, y1, x1) if y0 < y1 and x0 < x1 else None


def _within(placed: Placed, region: Window) -> Bool[np.ndarray, "h w"]:
    """The mask in a region of the picture that lies inside its extent."""
    y0, x0, y1, x1 = region
    return placed.mask[y0 - placed.y : y1 - placed.y, x0 - placed.x : x1 - placed.x]


def _same(
    tile_a: Sequence[Placed],
    tile_b: Sequence[Placed],
    shared: Window,
    measure: str,
    threshold: float,
) -> list[tuple[int, int]]:
    """Pairs of instances of two tiles that agree within ``shared``."""

    def reaching(tile: Sequence[Placed]) -> list[tuple[int, Placed, Window, int]]:
        regions = ((i, placed, _meet(_extent(placed), shared)) for i, placed in enumerate(tile))
        return [(i, p, r, int(_within(p, r).sum())) for i, p, r in regions if r]

    pairs, areas = [], []
    others = reaching(tile_b)
    for i, one, region_a, area_a in reaching(tile_a):
        for j, other, region_b, area_b in others:
            region = _meet(region_a, region_b)
            if region:
                common = np.count_nonzero(_within(one, region) & _within(other, region))
                pairs.append((i, j))
                areas.append((common, area_a, area_b))
    ratios = overlap_ratio(*np.asarray(areas, int).reshape(-1, 3).T, measure)
    return [pair for pair, ratio in zip(pairs, ratios, strict=True) if ratio > threshold]


def _union(parts: Sequence[Placed]) -> Placed:
    """One object from its parts."""
    if len(parts) == 1:
        return parts[0]
    extents = np.asarray([_extent(part) for part in parts])
    (y0, x0), (y1, x1) = extents[:, :2].min(0).tolist(), extents[:, 2:].max(0).tolist()
    mask = np.zeros((y1 - y0, x1 - x0), bool)
    for part in parts:
        top, left, bottom, right = _extent(part)
        mask[top - y0 : bottom - y0, left - x0 : right - x0] |= part.mask
    boxes = np.stack([part.box for part in parts])
    box = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])
    return Placed(mask, y0, x0, box, max(part.score for part in parts))
