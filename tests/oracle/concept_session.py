"""Concept tracking of one phrase, whole, on the networks of transformers' ``Sam3VideoModel``.

Its forward pass is not used: what it does otherwise than upstream (see ``concepts.Planner`` and
``tracking.Session``) is around the networks. Here are upstream's order of a frame
(``_det_track_one_frame`` in ``sam3/model/sam3_video_base.py``) and what transformers skips without
a compiled kernel: NMS, filling holes and removing specks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.ndimage
import torch
from transformers import Sam3VideoModel

from sam3_jax.tracking.concepts.config import ConceptConfig
from upstream_memory import Rules

from .concepts import Planner, capped_masks
from .detection import run_detector, to_torch
from .tracking import Features, Session, _resize


class Shown(NamedTuple):
    """A frame's objects, before anything waits."""

    masks: dict[int, np.ndarray]  # low-resolution logits by identity
    scores: dict[int, float]  # of this frame
    removed: set[int]
    hidden: set[int]
    events: dict[str, int]  # how often what happened


def clean(mask: np.ndarray, area: int) -> np.ndarray:
    """``fill_holes_in_mask_scores`` by a library's connected components."""
    eight = np.ones((3, 3), bool)

    def small(on: np.ndarray, limit: int) -> np.ndarray:
        labels, _ = scipy.ndimage.label(on, structure=eight)
        few = np.bincount(labels.ravel()) <= limit
        few[0] = False
        return few[labels]

    mask = np.where(small(mask <= 0, area), np.float32(0.1), mask)
    on = mask > 0
    return np.where(small(on, min(area, int(on.sum()) // 2)), np.float32(-0.1), mask)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boolean masks."""
    return float((a & b).sum()) / max(float((a | b).sum()), 1.0)


class ConceptSession:
    """Frame by frame; every network's output is torch's."""

    def __init__(
        self,
        model: Sam3VideoModel,
        config: ConceptConfig,
        video: tuple[int, int],
        rules: Rules,
        token_ids: np.ndarray,
    ) -> None:
        """``token_ids``: (1, n) of the phrase."""
        self.model, self.config, self.video, self.tokens = model, config, video, token_ids
        self.planner = Planner(config)
        self.features: dict[int, Features] = {}
        self.tracker = Session(model.tracker_model, self.features, 0, rules)

    @torch.no_grad()
    def frame(self, index: int, pixels: np.ndarray) -> Shown:
        """``pixels``: (h, w, 3) preprocessed."""
        image = self.model.detector_model.vision_encoder(to_torch(pixels[None]))
        flat, positions = self.model.get_vision_features_for_tracker(image)
        sizes = [4 * self.tracker.grid, 2 * self.tracker.grid, self.tracker.grid]
        levels = [x.permute(1, 2, 0).unflatten(2, (s, s)) for x, s in zip(flat, sizes, strict=True)]
        self.features.clear()
        self.features[index] = Features(levels, positions[-1])
        found, scores = self._detect(image)
        ids = self.planner.ids
        logits, masks = self._propagate(index, ids)
        plan = self.planner.plan(found, scores, masks, logits, index, backward=False)
        self._remember(index, ids, plan.masks, plan.pointers, found)
        born = [i for i in self.planner.ids + sorted(plan.removed) if i not in ids]
        self._bear(index, {i: found[d] for i, d in zip(sorted(born), plan.born, strict=True)})
        shown = dict(zip(ids, plan.masks, strict=True))
        shown |= {
            i: clean(found[d], self.config.clean_area)
            for i, d in zip(sorted(born), plan.born, strict=True)
        }
        events = {
            "born": len(born),
            "removed": len(plan.removed),
            "renewed": len(plan.pointers),
            "suppressed": int(sum((m == -10).all() for m in plan.masks)),
            "tracked": len(ids),
        }
        return Shown(shown, plan.tracker_scores, plan.removed, plan.hidden, events)

    def _detect(self, image) -> tuple[np.ndarray, np.ndarray]:
        out = run_detector(self.model.detector_model, image, self.tokens)
        logits = torch.from_numpy(out["pred_logits"][0])
        scores = logits.sigmoid() * torch.from_numpy(out["presence_logits"]).sigmoid()
        scores, masks = scores.numpy(), out["pred_masks"][0]
        kept: list[int] = []
        for i in np.argsort(-scores, kind="stable"):
            if scores[i] > self.config.detection_score and all(
                overlap(masks[i] > 0, masks[j] > 0) <= self.config.nms_overlap for j in kept
            ):
                kept.append(int(i))
        kept.sort()
        return masks[kept], scores[kept]

    def _propagate(self, index: int, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        side = 4 * self.tracker.grid
        if not ids:
            return np.zeros(0, np.float32), np.zeros((0, side, side), np.float32)
        if index in self.tracker.prompted[ids[0]]:
            # Looked at again: upstream tracks no frame that has a prompt. All were born on it.
            outs = [self.tracker.prompted[i][index] for i in ids]
        else:
            self.tracker.gone = set(range(len(self.tracker.tracked))) - set(ids)
            self.tracker.track(index)
            outs = [self.tracker.tracked[i][index] for i in ids]
        masks = [clean(out["mask"].numpy(), self.config.clean_area) for out in outs]
        return np.asarray([float(out["object_logit"]) for out in outs], np.float32), np.stack(masks)

    def _remember(
        self,
        index: int,
        ids: list[int],
        masks: np.ndarray,
        pointers: dict[int, int],
        found: np.ndarray,
    ) -> None:
        if not ids:
            return
        size = 16 * self.tracker.grid
        groups = self.tracker.groups
        renewed = set(pointers)
        if self.config.recondition_together:
            renewed = {i for i in ids if groups[i] in {groups[j] for j in pointers}}
        for i, large in zip(ids, capped_masks(masks, (size, size)), strict=True):
            tracked, prompted = self.tracker.tracked[i], self.tracker.prompted[i]
            if i in renewed and index not in prompted:
                prompted[index] = tracked.pop(index)
            out = (tracked | prompted)[index]
            if i in pointers:
                out["pointer"] = self._pointer(index, found[pointers[i]])
            large, kept = torch.from_numpy(large), out["object_logit"]
            out["object_logit"] = torch.tensor(10.0 if bool((large > 0).any()) else -10.0)
            self.tracker._remember(index, out, torch.sigmoid(large))
            out["object_logit"] = kept

    def _hard(self, logits: np.ndarray) -> torch.Tensor:
        return _resize(torch.from_numpy(logits), 16 * self.tracker.grid) > 0

    def _pointer(self, index: int, logits: np.ndarray) -> torch.Tensor:
        small = self.model.tracker_model.mask_downsample(self._hard(logits).float()[None, None])
        levels = self.features[index].levels
        return self.tracker._heads(levels, multimask=False, input_masks=small)["pointer"]

    def _bear(self, index: int, new: dict[int, np.ndarray]) -> None:
        if not new:
            return
        for i, logits in new.items():
            assert i == len(self.tracker.tracked)
            self.tracker.groups.append(min(new))
            self.tracker.tracked.append({})
            self.tracker.prompted.append({})
            hard = self._hard(logits).numpy()
            self.tracker.prompt_mask(index, i, hard, self.video)
        outs = [self.tracker.prompted[i][index] for i in new]
        stack = torch.stack([_resize(out["mask"], self.tracker.side) for out in outs])
        winner = stack.argmax(dim=0)
        for place, out in enumerate(outs):
            alone = torch.where(winner == place, stack[place], stack[place].clamp(max=-10.0))
            self.tracker._remember(index, out, (alone > 0).float())
