"""Upstream's tracker on transformers' modules: the rules of ``sam3/model/sam3_tracker_base.py``.

:class:`Session` computes with ``Sam3TrackerVideoModel`` and replaces what it does differently, all
around the modules: no memory selection; masks resized to the encoder's size before the sigmoid; no
non-overlap on prompted frames; pointers of all past prompted frames; masks of all objects hard if
one was prompted; mask prompts at the frame's size; corrections that attend to memory; memory in
bfloat16. The rules about frames (``upstream_memory``) are plain Python over dictionaries that keep
every frame.

On the same weights it agreed with upstream's own ``Sam3TrackerPredictor`` to 1e-5 of the spread,
over 24 frames with two objects: with and without selection, both ways, with mask prompts, and with
corrections on more frames than are read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Sam3TrackerVideoModel

from upstream_memory import Rules, attended

ABSENT = -1024.0


class Found(NamedTuple):
    """An object on a frame, as ``sam3_jax.models.tracker.Tracked`` without the slot axis."""

    mask: np.ndarray
    iou: float
    object_logit: float
    pointer: np.ndarray
    memory: np.ndarray | None = None


def _resize(
    x: torch.Tensor, size: int | tuple[int, int], *, antialias: bool = False
) -> torch.Tensor:
    """(h, w) to ``size``."""
    out = F.interpolate(
        x[None, None].float(), size, mode="bilinear", align_corners=False,
        antialias=antialias,
    )  # fmt: skip
    return out[0, 0]


class Features(NamedTuple):
    """A frame: three levels (1, c, h, w), projected; the coarsest one's position (hw, 1, c)."""

    levels: list[torch.Tensor]
    position: torch.Tensor

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The pyramid in this project's layout."""
        return tuple(level.movedim(1, -1).numpy() for level in self.levels)


@torch.no_grad()
def encode_frame(model: Sam3TrackerVideoModel, pixels: np.ndarray) -> Features:
    """``pixels``: (h, w, 3) preprocessed."""
    image = torch.from_numpy(pixels).movedim(-1, 0)[None]
    out = model.get_image_features(image, return_dict=True)
    sizes = model.backbone_feature_sizes
    levels = [
        x.permute(1, 2, 0).unflatten(2, tuple(size))
        for x, size in zip(out.fpn_hidden_states, sizes, strict=True)
    ]
    return Features(levels, out.fpn_position_encoding[-1])


class Session:
    """Objects on a video, remembered for ever.

    Each object has its own frames, as in transformers; upstream's, which share them, are the case
    that all objects are prompted on the same frames.
    """

    def __init__(
        self, model: Sam3TrackerVideoModel, features: list[Features], objects: int, rules: Rules
    ) -> None:
        """``features``: of every frame."""
        self.model, self.features, self.rules = model, features, rules
        self.prompted: list[dict[int, dict]] = [{} for _ in range(objects)]
        self.tracked: list[dict[int, dict]] = [{} for _ in range(objects)]
        self.groups = [0] * objects  # with selection "session": whose scores are averaged
        self.gone: set[int] = set()
        self.side = model.image_size
        self.grid = model.backbone_feature_sizes[-1][0]

    def _heads(self, levels: list[torch.Tensor], *, multimask: bool, **inputs) -> dict:
        out = self.model._single_frame_forward(
            image_embeddings=levels, multimask_output=multimask, **inputs
        )
        return {
            "mask": out.pred_masks.reshape(out.pred_masks.shape[-2:]),
            "iou": out.iou_scores.max(),
            "object_logit": out.object_score_logits.reshape(()),
            "pointer": out.object_pointer.reshape(1, -1),
        }

    @torch.no_grad()
    def prompt(
        self,
        frame: int,
        obj: int,
        points: np.ndarray,
        labels: np.ndarray,
        previous: np.ndarray | None = None,
    ) -> Found:
        """Points in pixels of the input frame; a box is two, labelled 2 and 3."""
        fine, middle, coarse = self.features[frame].levels
        coarse = coarse + self.model.no_memory_embedding.reshape(1, -1, 1, 1)
        inputs = {
            "input_points": torch.tensor(points, dtype=torch.float32)[None, None],
            "input_labels": torch.tensor(labels, dtype=torch.int32)[None, None],
        }
        if previous is not None:
            inputs["input_masks"] = torch.from_numpy(previous)[None, None].clamp(-32, 32)
        out = self._heads([fine, middle, coarse], multimask=len(labels) <= 1, **inputs)
        self.prompted[obj][frame] = out
        return self.found(frame, obj)

    @torch.no_grad()
    def prompt_mask(
        self, frame: int, obj: int, mask: np.ndarray, video: tuple[int, int] | None = None
    ) -> Found:
        """A boolean mask, at the video's size by default; it takes its pixels from earlier ones."""
        levels = self.features[frame].levels
        mask = torch.from_numpy(mask)
        fine = _resize(mask, 16 * self.grid, antialias=True)
        small = self.model.mask_downsample(fine[None, None])
        out = self._heads(levels, multimask=False, input_masks=small)
        present = bool((fine > 0).any())
        if not present:
            out["pointer"] = self.model.no_object_pointer.reshape(1, -1)
        out |= {"iou": torch.ones(()), "object_logit": torch.tensor(10.0 if present else -10.0)}
        if video is not None:
            mask = _resize(mask, video, antialias=True) > 0.5
        out["hard"] = mask
        for other in self.prompted:
            if "hard" in other.get(frame, {}):
                other[frame]["hard"] = other[frame]["hard"] & ~mask
        self.prompted[obj][frame] = out
        for other in self.prompted:
            if "hard" in other.get(frame, {}):
                logits = torch.where(other[frame]["hard"], -ABSENT, ABSENT)
                other[frame]["mask"] = _resize(logits, 4 * self.grid, antialias=True)
        return self.found(frame, obj)

    @torch.no_grad()
    def finish_prompts(self, frame: int) -> None:
        """Remembers a prompted frame: masks without overlap, hard.

        Objects that were only tracked there are treated as prompted with what was found.
        """
        for prompted, tracked in zip(self.prompted, self.tracked, strict=True):
            if frame not in prompted and frame in tracked:
                prompted[frame] = tracked[frame]
        masks = {
            obj: _resize(frames[frame]["mask"], self.side)
            for obj, frames in enumerate(self.prompted)
            if frame in frames
        }
        stack = torch.stack(list(masks.values()))
        winner = stack.argmax(dim=0)
        for i, obj in enumerate(masks):
            alone = torch.where(winner == i, stack[i], stack[i].clamp(max=-10.0))
            self._remember(frame, self.prompted[obj][frame], (alone > 0).float())
            self.tracked[obj].pop(frame, None)

    def _remember(self, frame: int, out: dict, probability: torch.Tensor) -> None:
        coarse = self.features[frame].levels[2]
        values = _resize(probability * 20.0 - 10.0, 16 * self.grid, antialias=True)
        memory, position = self.model.memory_encoder(coarse, values[None, None])
        if out["object_logit"] <= 0:
            memory = memory + self.model.occlusion_spatial_embedding_parameter[..., None, None]
        out["maskmem_features"] = memory.flatten(2).permute(2, 0, 1)
        out["maskmem_pos_enc"] = position.flatten(2).permute(2, 0, 1)

    def _read(self, frame: int, obj: int, *, backward: bool) -> torch.Tensor:
        """The coarsest level, conditioned on memory."""
        model, (levels, where) = self.model, self.features[frame]
        coarse = levels[2]
        prompted, tracked = self.prompted[obj], self.tracked[obj]
        scores = {t: self._score(t, obj) for t in tracked}
        maps, pointers = attended(frame, list(prompted), scores, self.rules, backward=backward)
        kept = tracked | prompted
        tokens, positions = model._build_memory_attention_inputs(
            [(offset, kept[t]) for t, offset in maps], coarse.device
        )
        count = 0
        if pointers:
            offsets = [position for _, position in pointers]
            values = [kept[t]["pointer"] for t, _ in pointers]
            most = min(self.rules.total, self.rules.pointers)
            values, times = model._process_object_pointers(
                offsets, values, most, 1, model.hidden_dim, coarse.device
            )
            tokens, positions, count = [*tokens, values], [*positions, times], len(values)
        out = model.memory_attention(
            current_vision_features=coarse.flatten(2).permute(2, 0, 1),
            current_vision_position_embeddings=where,
            memory=torch.cat(tokens),
            memory_posision_embeddings=torch.cat(positions),
            num_object_pointer_tokens=count,
        )
        return out.reshape(self.grid, self.grid, -1).permute(2, 0, 1)[None]

    @torch.no_grad()
    def overwrite(self, frame: int, obj: int, mask: np.ndarray) -> Found:
        """Remembers a mask (low-resolution logits) as concept tracking does."""
        out = (self.tracked[obj] | self.prompted[obj])[frame]
        logits = _resize(torch.from_numpy(mask), 16 * self.grid)
        kept = out["object_logit"]
        out["object_logit"] = torch.tensor(10.0 if bool((logits > 0).any()) else -10.0)
        self._remember(frame, out, torch.sigmoid(logits))
        out["object_logit"] = kept
        return self.found(frame, obj)

    @torch.no_grad()
    def track(self, frame: int, *, backward: bool = False) -> list[Found]:
        """All objects on a frame where none was prompted."""
        there = [obj for obj in range(len(self.tracked)) if obj not in self.gone]
        outs = {}
        for obj in there:
            fine, middle, _ = self.features[frame].levels
            coarse = self._read(frame, obj, backward=backward)
            outs[obj] = self._heads([fine, middle, coarse], multimask=True)
        for obj, out in outs.items():
            logit, iou = out["object_logit"], out["iou"]
            presence = torch.where(logit > 0, logit.sigmoid() * 2 - 1, torch.zeros_like(logit))
            out["presence"], out["score"] = presence, float(presence * iou)
            self._remember(frame, out, torch.sigmoid(_resize(out["mask"], self.side)))
            self.tracked[obj][frame] = out
        return [self.found(frame, obj) for obj in there]

    def _score(self, frame: int, obj: int) -> float:
        """Of a tracked frame for memory selection: ``eff_iou_score``."""
        if self.rules.selection != "session":
            return self.tracked[obj][frame]["score"]
        group = [
            i for i, g in enumerate(self.groups) if g == self.groups[obj] and i not in self.gone
        ]
        outs = [self.tracked[i][frame] for i in group]
        presence = torch.stack([out["presence"] for out in outs])[:, None]  # (b, 1) upstream
        return float((presence * torch.stack([out["iou"] for out in outs])).mean())

    def found(self, frame: int, obj: int) -> Found:
        """What is kept of an object on a frame, as numpy."""
        out = (self.tracked[obj] | self.prompted[obj])[frame]
        memory = out.get("maskmem_features")
        return Found(
            out["mask"].numpy(),
            float(out["iou"]),
            float(out["object_logit"]),
            out["pointer"][0].detach().numpy(),
            None if memory is None else memory[:, 0].unflatten(0, (self.grid,) * 2).numpy(),
        )
