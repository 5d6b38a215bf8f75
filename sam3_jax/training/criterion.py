"""Loss of the detector (upstream ``sam3/train/loss/sam3_loss.py``, ``loss_fns.py``).

Every decoder layer is supervised; masks and the semantic map belong to the last one. One-to-one
queries are matched by the Hungarian algorithm. Their one-to-many copies (DAC) are matched by
quality on the last layer, and on the others by the Hungarian algorithm too: the released recipe
sets ``use_o2m_matcher_on_o2m_aux: false``, which ``Sam3LossWrapper.compute_loss`` reads.

A query that is matched to several targets has a box (and mask) loss with each of them; its class
target is that of the one with the highest index (upstream: whichever write comes last).

All sums are over the global batch: under ``jit`` and a mesh nothing here depends on the sharding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sam3_jax.ops.image import resize_bilinear
from sam3_jax.ops.losses import box_l1, class_loss, mask_dice, mask_focal, presence_loss
from sam3_jax.ops.mask_losses import Pairs, PointSampling, pair_mask_losses, select_pairs
from sam3_jax.ops.matcher import match_cost, one_to_many, sharded_hungarian
from sam3_jax.ops.overlap import pairwise_overlap
from sam3_jax.training.targets import LossConfig, Targets
from sam3_jax.types import GroundOutput

Terms = dict[str, Float[Array, ""]]


class _Layers(NamedTuple):
    """Predictions of L layers and K kinds of queries (one-to-one, one-to-many), float32."""

    logits: Float[Array, "p l k q"]
    boxes: Float[Array, "p l k q 4"]


def detection_loss(
    out: GroundOutput,
    targets: Targets,
    config: LossConfig,
    *,
    matcher: str = "host",
    replicas: int = 1,
    key: PRNGKeyArray | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """Training loss of P prompts, and its terms before weighting.

    Args:
      out: of ``ground``, with or without ``dac``.
      matcher: "host" or "device", see :mod:`sam3_jax.ops.matcher`.
      replicas: parts of the batch that the released recipe would put on a GPU each. Its number of
        boxes is at least 1 on each, and it scales the loss by the root of each one's prompts.
      key: for points and for drawing pairs; may be None where neither is asked for.
      mesh: whose batch axes split the prompts; default: the one in context.

    Returns the total and named terms: those of the layers before the last end in ``_aux_<i>``,
    those of the one-to-many queries in ``_o2m``; ``num_boxes`` and ``matcher_failures`` besides.
    Where the matcher failed, the total and all gradients are NaN.

    Raises:
      ValueError: on a matcher that does not exist, a batch that the mesh does not divide, a missing
        key, or mask losses without masks.
    """
    if (config.masks and not targets.masks.shape[2]) or (
        config.semantic and not targets.semantic.shape[1]
    ):
        raise ValueError(
            "the targets have no masks (their size is 0): load masks, or set masks=False and "
            "semantic=False"
        )
    layers = _split(out)
    valid = targets.valid & targets.prompt_valid[:, None]
    targets = targets._replace(valid=valid, mask_valid=targets.mask_valid & valid)
    prompts = jnp.maximum(targets.prompt_valid.sum(), 1).astype(jnp.float32)
    num_boxes = jnp.maximum(valid.sum(), replicas).astype(jnp.float32)

    matched, failures = _match(layers, targets, config, matcher, mesh)
    terms = _layer_terms(layers, matched, targets, config, num_boxes, prompts)
    seen = _visible(targets).any(-1)
    shown = presence_loss(
        out.layer_presence,
        jnp.broadcast_to(seen, out.layer_presence.shape),
        alpha=config.presence_alpha,
        gamma=config.presence_gamma,
    )
    terms["presence"] = (shown * targets.prompt_valid).sum(-1)[:, None] / prompts
    if config.masks:
        mask_terms = _mask_terms(out, matched[:, -1], targets, config, key)
        terms |= {name: value / num_boxes for name, value in mask_terms.items()}
    if config.semantic:
        terms |= _semantic_terms(out, targets, config)

    kinds = jnp.array([1.0, config.o2m_weight])
    weights = _weights(config)
    total = sum(weights[name] * (x * kinds[: x.shape[1]]).sum() for name, x in terms.items())
    if config.scale_by_prompts:
        total = total * jnp.sqrt(prompts / replicas)
    total = total * jnp.where(failures > 0, jnp.nan, 1.0)
    return total, _named(terms) | {
        "num_boxes": num_boxes,
        "matcher_failures": failures.astype(jnp.float32),
    }


def _weights(config: LossConfig) -> dict[str, float]:
    return {
        "class": config.class_weight,
        "box": config.box_weight,
        "giou": config.giou_weight,
        "presence": config.presence_weight,
        "mask": config.mask_weight,
        "dice": config.dice_weight,
        "semantic": config.semantic_weight,
        "semantic_dice": config.semantic_dice_weight,
    }


def _split(out: GroundOutput) -> _Layers:
    kinds = out.layer_logits.shape[2] // out.pred_logits.shape[1]
    return _Layers(
        rearrange(out.layer_logits, "l p (k q) -> p l k q", k=kinds).astype(jnp.float32),
        rearrange(out.layer_boxes, "l p (k q) c -> p l k q c", k=kinds).astype(jnp.float32),
    )


def _visible(targets: Targets) -> Bool[Array, "p n"]:
    """Targets with an area; a prompt that has none is a negative one."""
    return targets.valid & (targets.boxes[..., 2:] > 0).all(-1)


def _match(
    layers: _Layers, targets: Targets, config: LossConfig, method: str, mesh: Mesh | None
) -> tuple[Bool[Array, "p l k q n"], Array]:
    """Which query is matched to which target, and how many problems the matcher failed at."""
    prompts, depth, kinds, queries = layers.logits.shape
    by_quality = depth if config.o2m_matcher_on_aux else 1  # so many last layers

    def solve(logits: Array, boxes: Array) -> tuple[Array, Array]:
        cost = match_cost(
            logits,
            boxes,
            repeat(targets.boxes, "p n c -> p m n c", m=logits.shape[1]),
            class_weight=config.match_class,
            box_weight=config.match_box,
            giou_weight=config.match_giou,
            alpha=config.match_alpha,
            gamma=config.match_gamma,
        )
        valid = repeat(targets.valid, "p n -> p m n", m=logits.shape[1])
        found = sharded_hungarian(cost, valid, mesh, method=method)
        of_query = jnp.arange(queries)[:, None]
        return found.index[..., None, :] == of_query, (~found.ok).sum()

    if kinds == 1:
        matched, failures = solve(layers.logits[:, :, 0], layers.boxes[:, :, 0])
        return matched[:, :, None], failures
    # All problems of the step, one-to-one first, in one call.
    assigned = depth - by_quality
    problems = [jnp.concatenate([x[:, :, 0], x[:, :assigned, 1]], axis=1) for x in layers]
    matched, failures = solve(*problems)
    many = one_to_many(
        layers.logits[:, assigned:, 1],
        layers.boxes[:, assigned:, 1],
        repeat(targets.boxes, "p n c -> p m n c", m=by_quality),
        repeat(targets.valid, "p n -> p m n", m=by_quality),
        alpha=config.o2m_alpha,
        threshold=config.o2m_threshold,
        topk=config.o2m_topk,
    )
    copies = jnp.concatenate([matched[:, depth:], many], axis=1)
    return jnp.stack([matched[:, :depth], copies], axis=2), failures


def _layer_terms(
    layers: _Layers,
    matched: Bool[Array, "p l k q n"],
    targets: Targets,
    config: LossConfig,
    num_boxes: Float[Array, ""],
    prompts: Float[Array, ""],
) -> dict[str, Float[Array, "l k"]]:
    """Class, box and GIoU terms of every layer and kind of query.

    Dense over queries x targets: 200 x 200 a layer is little, and nothing has to be gathered.
    """
    shape = dict(zip("lk", layers.logits.shape[1:3], strict=True))
    boxes = repeat(targets.boxes.astype(jnp.float32), "p n c -> p l k n c", **shape)
    overlap = pairwise_overlap(layers.boxes, boxes)
    index = jnp.arange(boxes.shape[-2])
    last = jnp.max(jnp.where(matched, index, -1), axis=-1, initial=-1)
    iou = jnp.where(index == last[..., None], overlap.iou, 0.0).sum(-1)
    of_class = class_loss(
        layers.logits,
        iou,
        last >= 0,
        alpha=config.class_alpha,
        gamma=config.class_gamma,
        floor=config.class_floor,
        pos_weight=config.class_pos_weight,
    )
    seen = (_visible(targets).any(-1) & targets.prompt_valid)[:, None, None, None]
    counted = targets.prompt_valid[:, None, None, None]
    if config.weak:
        counted = counted & ((last >= 0) | targets.exhaustive[:, None, None, None])
        size = jnp.broadcast_to(counted, last.shape).sum((0, 3)) + 1e-6
    else:
        size = prompts * max(last.shape[-1], config.pad_queries)
    return {
        "class": jnp.where(seen & counted, of_class, 0.0).sum((0, 3)) / size,
        "box": jnp.where(matched, box_l1(layers.boxes, boxes), 0.0).sum((0, 3, 4)) / num_boxes,
        "giou": jnp.where(matched, 1 - overlap.giou, 0.0).sum((0, 3, 4)) / num_boxes,
    }


def _mask_terms(
    out: GroundOutput,
    matched: Bool[Array, "p k q n"],
    targets: Targets,
    config: LossConfig,
    key: PRNGKeyArray | None,
) -> dict[str, Float[Array, "1 k"]]:
    """Sums over pairs of the last layer's mask losses, for each kind of query."""
    matched = matched & targets.mask_valid[:, None, None, :]
    sampling = None
    if config.mask_points:
        sampling = PointSampling(config.mask_points, config.mask_oversample, config.mask_importance)
    sums = []
    for kind, per_target in enumerate((1, config.o2m_topk)[: matched.shape[1]]):
        draw = point_key = None
        if key is not None:
            draw, point_key = jax.random.split(jax.random.fold_in(key, kind))
        pairs: Pairs = select_pairs(matched[:, kind], per_target, config.max_pairs, draw)
        pairs = pairs._replace(query=pairs.query + kind * matched.shape[2])
        focal, dice = pair_mask_losses(
            out.pred_masks,
            targets.masks,
            pairs,
            alpha=config.mask_alpha,
            gamma=config.mask_gamma,
            chunk=config.mask_chunk,
            points=sampling,
            key=point_key,
        )
        sums.append(jnp.stack([focal, dice]))
    focal, dice = jnp.stack(sums, axis=1)
    return {"mask": focal[None], "dice": dice[None]}


def _semantic_terms(
    out: GroundOutput, targets: Targets, config: LossConfig
) -> dict[str, Float[Array, "1 1"]]:
    """Losses of the semantic map, averaged over the prompts that have any foreground."""
    size = targets.semantic.shape[1:]
    logits = resize_bilinear(out.semantic_seg[..., None].astype(jnp.float32), size)
    logits, goal = (rearrange(x, "p h w -> p (h w)") for x in (logits[..., 0], targets.semantic))
    positive = (goal > 0).any(-1) & targets.prompt_valid
    focal = mask_focal(logits, goal, alpha=config.semantic_alpha, gamma=config.semantic_gamma)
    count = positive.sum() + 1e-6
    losses = {"semantic": focal, "semantic_dice": mask_dice(logits, goal)}
    return {k: (jnp.where(positive, x, 0.0).sum() / count)[None, None] for k, x in losses.items()}


def _named(terms: dict[str, Float[Array, "l k"]]) -> Terms:
    names = {}
    for name, values in terms.items():
        for layer in range(len(values)):
            aux = "" if layer == len(values) - 1 else f"_aux_{layer}"
            for kind in range(values.shape[1]):
                names[name + aux + ("_o2m" if kind else "")] = values[layer, kind]
    return names
