"""The programs of concept tracking on a video of one size, jitted: what happens to masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.inference.programs import RawOutput
from sam3_jax.models.tracker import ABSENT, Tracked
from sam3_jax.ops.boxes import cxcywh_to_xyxy
from sam3_jax.ops.image import resize_bilinear
from sam3_jax.sharding import batch_sharding
from sam3_jax.tracking.concepts.cleaning import clean_masks
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.concepts.detections import keep_detections
from sam3_jax.tracking.concepts.outputs import output_logits
from sam3_jax.tracking.concepts.plan import Measures, measure
from sam3_jax.tracking.concepts.reconditioning import OBJECT_LOGIT
from sam3_jax.tracking.concepts.shrinkage import MemoryMasks, encoder_masks, memory_masks
from sam3_jax.tracking.masks import MaskPrompt, mask_prompt


class ConceptPrograms:
    """One program each for a number of phrases and of buckets, whatever is found.

    ``detections``, ``look``, ``for_memory``, ``bucket``, ``born``, ``pick``, ``output``: the
    functions below.
    """

    def __init__(
        self,
        config: ConceptConfig,
        grid: tuple[int, int],
        video: tuple[int, int],
        mesh: Mesh | None = None,
    ):
        """Nothing is traced yet.

        Args:
          grid: (height, width) of the coarsest map.
          video: that of the video's frames.
          mesh: devices that share the objects of a bucket. What compares objects is small and whole
            on every device.
        """
        size = (16 * grid[0], 16 * grid[1])
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        rows = None if mesh is None else batch_sharding(mesh)

        def program(function: Callable, *given: Any, out: Any = whole, **bound: Any) -> Callable:
            return jax.jit(functools.partial(function, *given, **bound), out_shardings=out)

        self.detections = program(detections, config)
        self.look = program(look, config)
        self.for_memory = program(memory_masks, shrink_ratio=config.shrink_ratio, size=size)
        self.bucket = program(bucket, size=size, out=rows)
        self.born = program(born, grid=grid, size=size, video=video)
        self.pick = program(pick, out=rows)
        self.output = program(output_logits, config)


def detections(
    config: ConceptConfig, groups: Sequence[RawOutput], searched: Bool[Array, " p"]
) -> tuple[Float[Array, " d"], Bool[Array, " d"], Float[Array, "d h w"]]:
    """Scores of all phrases' queries, which of them are detections, and their masks.

    Args:
      groups: of phrases that were grounded together.
      searched: whether the outputs of each phrase mean anything.
    """
    out = RawOutput(*(jnp.concatenate(parts) for parts in zip(*groups, strict=True)))
    scores = jax.nn.sigmoid(out.pred_logits) * jax.nn.sigmoid(out.presence_logits)[:, None]
    boxes = cxcywh_to_xyxy(out.pred_boxes)
    kept = [
        keep_detections(config, *one) & searched[i]
        for i, one in enumerate(zip(scores, out.pred_masks, boxes, strict=True))
    ]
    masks = out.pred_masks.reshape(-1, *out.pred_masks.shape[2:])
    return scores.reshape(-1), jnp.concatenate(kept), masks


def look(
    config: ConceptConfig,
    found: Sequence[Tracked],
    masks: Float[Array, "d h w"],
    kept: Bool[Array, " d"],
    live: Bool[Array, " n"],
) -> tuple[Float[Array, "n h w"], Measures, Float[Array, " n"]]:
    """Propagated masks of all buckets, cleaned; what is to be known of them; object logits."""
    tracks = jnp.concatenate([one.masks.astype(jnp.float32) for one in found])
    tracks = clean_masks(tracks, config.clean_area)
    logits = jnp.concatenate([one.object_logits for one in found]).astype(jnp.float32)
    return tracks, measure(config, masks, kept, tracks, live), logits


def bucket(
    memory: MemoryMasks,
    found: Tracked,
    pointers: Float[Array, "s c"],
    renewed: Bool[Array, " s"],
    first: Int[Array, ""],
    *,
    size: tuple[int, int],
) -> Tracked:
    """What one bucket is to remember.

    Args:
      pointers, renewed: of the slots that are conditioned anew on a detection.
      first: the bucket's first row.
    """
    rows = MemoryMasks(*(lax.dynamic_slice_in_dim(x, first, len(renewed)) for x in memory))
    return Tracked(
        encoder_masks(rows, size),
        found.iou,
        jnp.where(renewed, OBJECT_LOGIT, found.object_logits),
        jnp.where(renewed[:, None], pointers, found.pointers),
    )


def born(
    masks: Float[Array, "d h w"],
    chosen: Int[Array, " s"],
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    video: tuple[int, int],
) -> MaskPrompt:
    """Detections as mask prompts, one for each slot; -1 gives an empty one.

    They are hard at the memory encoder's size, and of those of one frame the later takes pixels
    from the earlier.
    """
    given = masks[chosen].astype(jnp.float32)
    hard = resize_bilinear(given[..., None], size)[..., 0] > 0
    hard &= (chosen >= 0)[:, None, None]
    return mask_prompt(hard, jnp.arange(len(chosen)), grid, video)


def pick(given: MaskPrompt, places: Int[Array, " s"]) -> MaskPrompt:
    """Some mask prompts, one for each slot of a bucket; -1 gives an empty one."""
    there = (places >= 0)[:, None, None]
    masks, logits = (x[places] for x in given)
    return MaskPrompt(jnp.where(there, masks, 0.0), jnp.where(there, logits, ABSENT))


def padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """``values`` with ``fill`` appended up to ``length``."""
    return np.concatenate([values, np.full(length - len(values), fill, values.dtype)])
