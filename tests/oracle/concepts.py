"""transformers' planning of concept tracking, one phrase, as the oracle of ``tracking.concepts``.

Its methods are run on an object without networks. They equal upstream's except in reconditioning
(it names the same masklets, but encodes other masks) and in backward tracking of occlusions, where
both differ from ours on purpose.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoModel

import oracle.torch_import  # noqa: F401
from sam3_jax.tracking.concepts.config import ConceptConfig

FIELDS = {  # transformers' name -> ours
    "score_threshold_detection": "detection_score",
    "assoc_iou_thresh": "match_overlap",
    "trk_assoc_iou_thresh": "track_overlap",
    "new_det_thresh": "new_score",
    "max_num_objects": "max_objects",
    "hotstart_delay": "hotstart",
    "hotstart_unmatch_thresh": "hotstart_unmatched",
    "hotstart_dup_thresh": "hotstart_duplicate",
    "init_trk_keep_alive": "keep_alive_start",
    "max_trk_keep_alive": "keep_alive_max",
    "min_trk_keep_alive": "keep_alive_min",
    "decrease_trk_keep_alive_for_empty_masklets": "keep_alive_counts_empty",
    "recondition_every_nth_frame": "recondition_every",
    "high_conf_thresh": "recondition_score",
    "high_iou_thresh": "recondition_overlap",
    "suppress_overlapping_based_on_recent_occlusion_threshold": "occlusion_iou",
}
METADATA = (
    "obj_first_frame_idx",
    "unmatched_frame_inds",
    "trk_keep_alive",
    "overlap_pair_to_frame_inds",
    "removed_obj_ids",
    "suppressed_obj_ids",
)


class Decisions(NamedTuple):
    """What was decided about a frame, by identity."""

    born: list[int]  # detections, in the order of their identities
    removed: set[int]
    hidden: set[int]
    pointers: dict[int, int]  # reconditioned identity -> detection
    masks: np.ndarray  # after suppression, in the order of `ids` before the frame
    tracker_scores: dict[int, float]
    dropped: int


class Planner:
    """One phrase's session."""

    def __init__(self, config: ConceptConfig):
        self.model = model = Sam3VideoModel.__new__(Sam3VideoModel)
        torch.nn.Module.__init__(model)
        for theirs, ours in FIELDS.items():
            setattr(model, theirs, getattr(config, ours))
        model.suppress_unmatched_only_within_hotstart = not config.hide_unmatched
        model.recondition_on_trk_masks = True
        model._tracker_update_memories = self._encode
        self.session = SimpleNamespace(
            obj_ids=[],
            obj_id_to_score={},
            obj_id_to_tracker_score_frame_wise=defaultdict(dict),
            obj_id_to_last_occluded={},
            obj_id_to_prompt_id={},
            max_obj_id=-1,
            obj_first_frame_idx={},
            unmatched_frame_inds=defaultdict(list),
            trk_keep_alive=defaultdict(int),
            overlap_pair_to_frame_inds=defaultdict(list),
            removed_obj_ids=set(),
            suppressed_obj_ids=defaultdict(set),
            obj_id_to_idx=lambda object_id: self.session.obj_ids.index(object_id),
        )

    def _encode(self, inference_session, frame_idx, low_res_masks, reconditioned_masks):
        self.encoded = low_res_masks.numpy().copy()

    @property
    def ids(self) -> list[int]:
        return list(self.session.obj_ids)

    def plan(
        self,
        detections: np.ndarray,
        scores: np.ndarray,
        tracks: np.ndarray,
        logits: np.ndarray,
        frame: int,
        *,
        backward: bool,
    ) -> Decisions:
        """Detections above the threshold, masks in the order of ``ids``."""
        session = self.session
        self.encoded = tracks
        plan, new = self.model.run_tracker_update_planning_phase(
            inference_session=session,
            frame_idx=frame,
            reverse=backward,
            det_out={"mask": torch.tensor(detections), "scores": torch.tensor(scores)},
            tracker_low_res_masks_global=torch.tensor(tracks),
            tracker_obj_scores_global=torch.tensor(logits),
            det_idx_to_prompt_id=dict.fromkeys(range(len(scores)), 0),
        )
        supported = plan["trk_id_to_max_iou_high_conf_det"]
        tracker_scores = dict(new["obj_id_to_tracker_score_frame_wise"][frame])
        tracker_scores |= dict(zip(self.ids, torch.tensor(logits).sigmoid().tolist(), strict=True))
        for name in METADATA:
            setattr(session, name, new["extra_metadata"][name])
        for name in ("obj_ids", "obj_id_to_score", "obj_id_to_last_occluded", "max_obj_id"):
            setattr(session, name, new[name])
        return Decisions(
            born=[int(i) for i in plan["new_det_out_inds"]],
            removed=set(plan["obj_ids_newly_removed"]),
            hidden={int(i) for i in session.suppressed_obj_ids[frame]},
            pointers={i: supported[i] for i in plan["reconditioned_obj_ids"]},
            masks=self.encoded,
            tracker_scores=tracker_scores,
            dropped=plan["num_obj_dropped_due_to_limit"],
        )


def capped_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Upscaled masks of one phrase, those that others take most of cut off at -10."""
    large = torch.nn.functional.interpolate(
        torch.tensor(masks)[:, None], size, mode="bilinear", align_corners=False
    )
    model = Sam3VideoModel.__new__(Sam3VideoModel)
    torch.nn.Module.__init__(model)
    return model._suppress_object_pw_area_shrinkage_impl(large)[:, 0].numpy()
