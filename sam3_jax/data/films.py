"""Videos with masklets, in memory: what clips for the tracker's training are cut from.

A film is a video, or a piece of a long one, with the masks of its objects through time. Nothing
says what the objects are called: tracking needs no names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Mask = dict[str, Any]  # COCO's compressed run lengths at the video's size


class Masklet(NamedTuple):
    """One object through a film: a mask a frame; None: not there. ``unknown``: nobody can say."""

    id: str
    masks: tuple[Mask | None, ...]
    unknown: frozenset[int] = frozenset()  # frames


class Film(NamedTuple):
    """Frames in order with their masklets.

    ``names`` are those of the frames' files, or of the video's with the frame's number; ``data``
    the frames as bytes of image files, once they were read.
    """

    film_id: str
    size: tuple[int, int]  # (height, width)
    names: tuple[str, ...]
    masklets: tuple[Masklet, ...]
    data: tuple[bytes, ...] = ()

    def keep(self, frames: list[int]) -> Film:
        """These frames alone."""
        masklets = tuple(
            Masklet(
                m.id,
                tuple(m.masks[i] for i in frames),
                frozenset(new for new, old in enumerate(frames) if old in m.unknown),
            )
            for m in self.masklets
        )
        data = tuple(self.data[i] for i in frames) if self.data else ()
        names = tuple(self.names[i] for i in frames)
        return self._replace(names=names, masklets=masklets, data=data)


def pieces(film: Film, length: int) -> list[Film]:
    """The film in parts of at most ``length`` frames, as even as possible, without masklets that
    are nowhere in them, and without parts that have none.
    """
    count = -(-len(film.names) // length)
    bounds = [len(film.names) * i // count for i in range(count + 1)]
    parts = []
    for number in range(count):
        part = film.keep(list(range(bounds[number], bounds[number + 1])))
        part = part._replace(masklets=tuple(m for m in part.masklets if any(m.masks)))
        if count > 1:
            part = part._replace(film_id=f"{film.film_id}/{number}")
        if part.masklets:
            parts.append(part)
    return parts
