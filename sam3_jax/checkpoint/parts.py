"""Parts of the model that a checkpoint may hold, and the parameters of each."""

from __future__ import annotations

from collections.abc import Iterable

# Prefixes of the parameters' paths.
# "image" finds concepts, "tracker" follows objects, "clicks" is the tracker without its memory.
_BACKBONE = ("vision/trunk/", "vision/tracker_neck/")
_DETECTOR = "text geometry fusion decoder scoring segmentation".split()
PARTS: dict[str, tuple[str, ...]] = {
    "image": ("vision/trunk/", "vision/detector_neck/", *(f"{name}/" for name in _DETECTOR)),
    "tracker": (*_BACKBONE, "tracker/"),
    "clicks": (
        *_BACKBONE,
        "tracker/prompt_encoder/",
        "tracker/mask_decoder/",
        "tracker/no_memory_embed/",
    ),
}
WHOLE = ("image", "tracker")


def in_parts(path: str, parts: Iterable[str]) -> bool:
    """Whether a parameter (its path joined by "/") belongs to one of the parts."""
    return any(path.startswith(PARTS[part]) for part in parts)
