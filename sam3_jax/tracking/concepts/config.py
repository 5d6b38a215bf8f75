"""Every threshold of concept tracking, and the released presets.

Upstream: ``build_sam3_video_model`` in ``sam3/model_builder.py`` and the constants inside
``sam3/model/sam3_video_base.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURES = ("iou", "iom")  # common over union; common over the smaller area
UNLIMITED = 10_000  # objects; upstream's number for "no limit"


@dataclass
class ConceptConfig:
    """Defaults are SAM 3's. Overlaps are of masks at low resolution, frames are counted in frames.

    ``nms_overlap`` 0, ``clean_area`` 0, ``boundary_margin`` 0, ``recondition_every`` 0,
    ``occlusion_iou`` 0, ``hotstart`` 0, ``collision_overlap`` 0 each switch their heuristic off.
    """

    # Which detections count.
    detection_score: float = 0.5  # strictly above
    nms_measure: str = "iou"
    nms_overlap: float = 0.1  # strictly above: the same object, the better one stays
    boundary_margin: float = 0.0  # fraction of the image; boxes centred closer to its edge go
    # Small holes and specks of propagated and of new masks: pixels of a low-resolution mask.
    clean_area: int = 16
    # Detections and masklets: many to many.
    match_measure: str = "iou"
    match_overlap: float = 0.1  # at least: the detection is not a new object
    track_overlap: float = 0.5  # at least: the masklet is not unmatched
    one_to_one: bool = False  # masklets are matched by the Hungarian algorithm instead
    unambiguous: bool = False  # what reconditioning cannot tell apart is not counted as matched
    # Births.
    new_score: float = 0.7  # at least
    new_score_always: bool = False  # False: on a frame without masklets every detection is new
    max_objects: int = UNLIMITED
    collision_overlap: float = 0.0  # at least: another phrase has the object already
    # Hotstart: what was born less than so many frames ago is on probation.
    hotstart: int = 15
    hotstart_unmatched: int = 8
    hotstart_duplicate: int = 8
    # Keep-alive counters. They hide masklets only if `hide_unmatched` is on.
    keep_alive_start: int = 30
    keep_alive_max: int = 30
    keep_alive_min: int = -1
    keep_alive_counts_empty: bool = False  # an empty mask counts down too
    hide_unmatched: bool = False
    # Reconditioning on detections.
    recondition_every: int = 16
    recondition_score: float = 0.8
    recondition_overlap: float = 0.8
    recondition_logit: float = 0.8  # the tracker's object logit must be above (not its sigmoid)
    recondition_together: bool = True  # all that were born with the object; False: it alone
    # What may not enter the memory.
    occlusion_iou: float = 0.7
    shrink_ratio: float = 0.3  # of the area must remain where the strongest logit takes the pixel
    # Masklets are shown once they were detected in so many frames running.
    confirmation: bool = False
    confirmation_frames: int = 3
    bucket_size: int = 16  # rows by which the table of masklets grows: the tracker's


def sam3() -> ConceptConfig:
    """The released SAM 3."""
    return ConceptConfig()


def sam3_1() -> ConceptConfig:
    """SAM 3.1 ("object multiplex"): fewer missed objects, at most 16, shown when confirmed.

    Upstream: ``build_sam3_multiplex_video_predictor``. Of the numbers it leaves to defaults the
    keep-alive counters differ from SAM 3's.
    """
    return ConceptConfig(
        detection_score=0.4,
        nms_measure="iom",
        boundary_margin=0.025,
        clean_area=0,
        match_measure="iom",
        unambiguous=True,
        new_score=0.65,
        new_score_always=True,
        max_objects=16,
        keep_alive_start=0,
        keep_alive_max=8,
        keep_alive_min=-4,
        hide_unmatched=True,
        recondition_overlap=0.5,
        confirmation=True,
    )


NAMED = {"sam3": sam3, "sam3.1": sam3_1}


def check(config: ConceptConfig) -> None:
    """Refuses what cannot work.

    Raises:
      ValueError: naming the field, its value and what it may be.
    """
    for name in ("nms_measure", "match_measure"):
        if getattr(config, name) not in MEASURES:
            value = getattr(config, name)
            raise ValueError(f"{name} must be one of {', '.join(MEASURES)}, got {value!r}")
    if config.max_objects < 1:
        raise ValueError(f"max_objects must be at least 1, got {config.max_objects}")
    if config.bucket_size < 1:
        raise ValueError(f"bucket_size must be at least 1, got {config.bucket_size}")
    for name in ("hotstart_unmatched", "hotstart_duplicate"):
        if 0 < config.hotstart < getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)}, which no masklet reaches within a hotstart of "
                f"{config.hotstart} frames: lower it, or set hotstart to 0 to switch it off"
            )
