"""Configuration of tracking: what a frame reads of the past and when a frame is worth reading.

Upstream: the arguments of ``Sam3TrackerBase`` and ``Sam3TrackerPredictor`` and the values that
``build_tracker`` (``sam3/model_builder.py``) gives them. Nothing here changes a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

SELECTIONS = ("object", "session", "none")


@dataclass
class TrackerConfig:
    """One session of tracking.

    ``selection``: past frames are read only where their score, presence times predicted IoU, is
    above ``score_threshold``. "object": each object by its own scores, so that a result does not
    depend on company, but for rounding; "session": by the mean presence times the mean IoU of
    the objects of one group, as the released video model does (its objects of one session, or those
    born on one frame); "none": by distance alone.

    ``stored_conditioning``: prompted frames that an object keeps; a further one replaces the one
    furthest from it. ``max_conditioning`` of them are read; sessions have programs that read one,
    for objects that have no more.

    ``temporal_stride``: distance of the frames that are read, the last one excepted.
    ``multimask_points``: least and greatest number of points (the corners of a box count) where
    three masks compete; a tracked frame has 0.
    """

    num_maps: int = 7
    temporal_stride: int = 1
    max_conditioning: int = 4
    stored_conditioning: int = 4
    max_pointers: int = 16
    selection: str = "object"
    score_threshold: float = 0.01
    multimask_points: tuple[int, int] = (0, 1)
    non_overlapping_prompts: bool = True
    mask_scale: float = 20.0
    mask_bias: float = -10.0
    previous_logits_clamp: float = 32.0
    bucket_size: int = 16

    @property
    def recent_maps(self) -> int:
        """Maps of tracked frames that are kept; see ``tracking.memories`` for why so few do."""
        phases = self.temporal_stride if self.selection != "none" else 1
        return (self.num_maps - 2) * phases + 1

    @property
    def recent_pointers(self) -> int:
        """Pointers of tracked frames that are kept."""
        if self.selection == "none":
            return self.max_pointers - 1
        return (self.max_pointers - 1) * self.temporal_stride + 1


def sam3() -> TrackerConfig:
    """What the released video model does: selection by the score of a session's objects."""
    return TrackerConfig(selection="session")


def sam3_plain() -> TrackerConfig:
    """The released model with ``apply_temporal_disambiguation=False``: no selection."""
    return TrackerConfig(selection="none")


NAMED = {"default": TrackerConfig, "sam3": sam3, "sam3_plain": sam3_plain}


def check(config: TrackerConfig, trained_maps: int) -> None:
    """Refuses values that cannot work.

    Args:
      trained_maps: rows of the model's temporal embedding, ``ModelConfig.memory.num_maps``.

    Raises:
      ValueError: naming the field, its value and what it may be.
    """
    least = {
        "num_maps": 2,
        "temporal_stride": 1,
        "max_conditioning": 1,
        "stored_conditioning": 1,
        "max_pointers": 2,
        "bucket_size": 1,
    }
    for name, limit in least.items():
        if getattr(config, name) < limit:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least {limit}")
    if config.num_maps > trained_maps:
        raise ValueError(f"num_maps={config.num_maps}: the model was trained with {trained_maps}")
    if config.selection not in SELECTIONS:
        raise ValueError(f"selection={config.selection!r}: choose one of {SELECTIONS}")
