"""Upstream's rules of what a frame attends to, in plain Python over all frames that ever were.

``sam3/model/sam3_tracker_base.py`` and ``sam3_tracker_utils.py`` upstream.
"""

from __future__ import annotations

from typing import NamedTuple


class Rules(NamedTuple):
    """``selection``: "session", "object" or "none"; ``total``: frames of the video."""

    selection: str = "session"
    total: int = 1 << 30
    stride: int = 1
    threshold: float = 0.01
    maps: int = 7
    pointers: int = 16
    conditioning: int = 4


def choose_conditioning(frame: int, frames: list[int], limit: int) -> list[int]:
    """``select_closest_cond_frames``: ``frames`` in the order of their prompts."""
    if len(frames) <= limit:
        return list(frames)
    chosen = []
    if any(t < frame for t in frames):
        chosen.append(max(t for t in frames if t < frame))
    if any(t >= frame for t in frames):
        chosen.append(min(t for t in frames if t >= frame))
    rest = sorted((t for t in frames if t not in chosen), key=lambda t: abs(t - frame))
    return chosen + rest[: limit - len(chosen)]


def walk(frame: int, scores: dict[int, float], rules: Rules, *, backward: bool) -> list[int]:
    """``frame_filter``: frames that count, the newest last."""
    most = min(rules.total, rules.pointers)
    if frame == (rules.total - 1 if backward else 0):
        return []
    if backward:
        last, steps = frame + 1, range(frame + 1, min(rules.total, 10_000), rules.stride)
    else:
        last, steps = frame - 1, range(frame - 1, 0, -rules.stride)
    found: list[int] = []
    for t in steps:
        if t not in scores:
            continue
        if scores[t] > rules.threshold:
            found.insert(0, t)
        if len(found) >= most - 1:
            break
    return found if last in found else [*found, last]


def attended(
    frame: int,
    prompted: list[int],
    scores: dict[int, float],
    rules: Rules,
    *,
    backward: bool = False,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What a frame reads: (frame, offset) of maps (0: prompted) and (frame, position) of pointers.

    ``scores``: of the tracked frames that were remembered.
    """
    sign = -1 if backward else 1
    chosen = choose_conditioning(frame, prompted, rules.conditioning)
    others = {t for t in prompted if t not in chosen} | set(scores)
    valid = [] if rules.selection == "none" else walk(frame, scores, rules, backward=backward)
    maps = [(t, 0) for t in chosen]
    r = rules.stride
    for offset in range(1, rules.maps):
        if rules.selection != "none":
            if offset > len(valid):
                continue
            t = valid[-offset]
        elif offset == 1:
            t = frame - sign
        elif backward:
            t = -(-(frame + 2) // r) * r + (offset - 2) * r
        else:
            t = (frame - 2) // r * r - (offset - 2) * r
        if t in others:
            maps.append((t, offset))
    pointers = [(t, (frame - t) * sign) for t in chosen if (frame - t) * sign >= 0]
    for offset in range(1, min(rules.total, rules.pointers)):
        if rules.selection == "none":
            t = frame - sign * offset
        elif offset >= len(valid):
            break
        else:
            t = valid[-offset]
        if t in others:
            pointers.append((t, offset))
    return maps, pointers
