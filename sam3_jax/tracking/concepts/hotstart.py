"""Probation of young masklets, and the counters that hide old ones nobody detects.

Upstream: ``_process_hotstart`` in ``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from sam3_jax.tracking.concepts.association import Matches
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.masklets import Masklets, copy


def count_frame(
    config: ConceptConfig, table: Masklets, matches: Matches, *, backward: bool
) -> Masklets:
    """Counts matches of this frame: ``keep_alive``, ``unmatched`` and ``duplicates``.

    A masklet can be matched (loosely) and unmatched (strictly) on one frame; it then counts up and
    down.
    """
    table = copy(table)
    alive = table.keep_alive
    up, down = matches.pairs.any(0), matches.unmatched
    alive[up] = np.minimum(config.keep_alive_max, alive[up] + 1)
    alive[down] = np.maximum(config.keep_alive_min, alive[down] - 1)
    if config.keep_alive_counts_empty:
        empty = matches.empty
        alive[empty] = np.maximum(config.keep_alive_min, alive[empty] - 1)
    table.unmatched[down] += 1
    for shared in matches.pairs:
        rows = np.flatnonzero(shared)
        if len(rows) > 1:
            oldest = _oldest(table, rows, backward=backward)
            table.duplicates[oldest, rows[rows != oldest]] += 1
    return table


def _oldest(table: Masklets, rows: np.ndarray, *, backward: bool) -> int:
    """The row that appeared first in the direction of tracking; of equals the lowest identity."""
    born = -table.born[rows] if backward else table.born[rows]
    return int(rows[np.lexsort((table.ids[rows], born))[0]])


def on_probation(
    config: ConceptConfig, table: Masklets, frame: int, *, backward: bool
) -> Bool[np.ndarray, " n"]:
    """Masklets born less than ``config.hotstart`` frames ago, in the direction of tracking.

    One that is born further on, seen in that direction, is on probation as well.
    """
    age = table.born - frame if backward else frame - table.born
    return table.live & ~table.pinned & (age < config.hotstart) & (config.hotstart > 0)


def removals(
    config: ConceptConfig, table: Masklets, frame: int, *, backward: bool
) -> Bool[np.ndarray, " n"]:
    """Masklets on probation that were unmatched, or shared with one older masklet, too often."""
    lost = table.unmatched >= max(config.hotstart_unmatched, 1)
    shared = table.duplicates.max(0, initial=0) >= max(config.hotstart_duplicate, 1)
    return on_probation(config, table, frame, backward=backward) & (lost | shared)


def hidden(config: ConceptConfig, table: Masklets) -> Bool[np.ndarray, " n"]:
    """Masklets that are tracked but not shown, because they ran out of keep-alive."""
    exhausted = (table.keep_alive <= 0) & (table.unmatched > 0)
    return table.live & ~table.pinned & exhausted & config.hide_unmatched
