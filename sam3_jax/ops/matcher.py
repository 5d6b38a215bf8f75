"""Which query answers for which target (upstream ``sam3/train/matcher.py``).

:func:`hungarian` is the one-to-one assignment. ``"host"`` runs scipy through one
``jax.pure_callback``, ``"device"`` runs optax's version of the same algorithm.

Choose "host", unless the host is what is scarce. On 2 CPU cores (``benchmarks/matcher.py``, 200
queries, 11 problems a prompt, medians) it took .8 ms for a prompt with 16 targets and 33 ms for one
with 200, where "device" took 1.5 and 378 ms; with 16 prompts 14 and 553 against 46 and 5870 ms. An
assignment is a chain of small dependent steps, which suits no accelerator, and ``vmap`` runs every
problem for as long as the hardest. "device" spares the trip to the host: it is for few targets (at
most about 16), hosts that feed many chips, and platforms without callbacks. Neither has been timed
on an accelerator: run the benchmark there.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from sam3_jax.ops.attention import BATCH_AXES
from sam3_jax.ops.overlap import pairwise_overlap

METHODS = ("host", "device")
# Costs are cut to +-BOUND, NaN to +BOUND. Costs of boxes in fractions stay below 50; a larger bound
# would leave the float32 potentials of the device's algorithm too few digits.
BOUND = 1e3


class Matching(NamedTuple):
    """An assignment: query of every target, -1 for padding and for targets beyond the queries.

    ``ok`` is False where the result is not an assignment or did not come from this call's costs
    (a callback that failed): then ``index`` must not be used.
    """

    index: Int[Array, "*b n"]
    ok: Bool[Array, "*b"]


def match_cost(
    logits: Float[Array, "*b q"],
    boxes: Float[Array, "*b q 4"],
    target_boxes: Float[Array, "*b n 4"],
    *,
    class_weight: float = 2.0,
    box_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Array, "*b q n"]:
    """Cost of giving a query to a target: focal class cost + L1 - GIoU, float32, no gradient.

    Boxes are (cx, cy, w, h) fractions. Columns of padded targets are meaningless:
    :func:`hungarian` ignores them. Upstream: ``BinaryHungarianMatcherV2`` with ``focal``.
    """
    inputs = lax.stop_gradient((logits, boxes, target_boxes))
    logits, boxes, target_boxes = (x.astype(jnp.float32) for x in inputs)
    positive = alpha * jax.nn.sigmoid(-logits) ** gamma * -jax.nn.log_sigmoid(logits)
    negative = (1 - alpha) * jax.nn.sigmoid(logits) ** gamma * -jax.nn.log_sigmoid(-logits)
    distance = jnp.abs(boxes[..., :, None, :] - target_boxes[..., None, :, :]).sum(-1)
    giou = pairwise_overlap(boxes, target_boxes).giou
    of_class = class_weight * (positive - negative)[..., None]
    return of_class + box_weight * distance - giou_weight * giou


def hungarian(
    cost: Float[Array, "*b q n"], valid: Bool[Array, "*b n"], *, method: str = "host"
) -> Matching:
    """Assignment of least total cost; all leading axes are solved in one call.

    Args:
      cost: may hold NaN and infinities, which count as :data:`BOUND` (-infinity as its negative).
      valid: targets that are not padding.
      method: "host" (scipy) or "device" (optax).

    Raises:
      ValueError: on another method.
    """
    if method not in METHODS:
        raise ValueError(f"matcher {method!r} is unknown: choose one of {', '.join(METHODS)}")
    batch, (queries, targets) = cost.shape[:-2], cost.shape[-2:]
    cost = lax.stop_gradient(cost).astype(jnp.float32)
    cost = cost.reshape(math.prod(batch), queries, targets)
    cost = jnp.nan_to_num(cost, nan=BOUND, posinf=BOUND, neginf=-BOUND).clip(-BOUND, BOUND)
    flat = valid.reshape(math.prod(batch), targets)
    if cost.size == 0:
        index, answered = jnp.full(flat.shape, -1, jnp.int32), jnp.ones(len(flat), bool)
    elif method == "host":
        index, answered = _ask_host(cost, flat)
    else:
        index, answered = _solve_on_device(cost, flat), jnp.ones(len(flat), bool)
    ok = answered & _is_assignment(index, flat, queries)
    return Matching(index.reshape(*batch, targets), ok.reshape(batch))


def sharded_hungarian(
    cost: Float[Array, "p *b q n"],
    valid: Bool[Array, "p *b n"],
    mesh: Mesh | None = None,
    *,
    method: str = "host",
) -> Matching:
    """:func:`hungarian` with the leading axis over the mesh's batch axes.

    Each device asks its own host about its own shard. (Under plain ``jit`` a callback collects the
    global batch on one device.) Without ``mesh`` it is the one in whose context this is traced; on
    one device this is plain :func:`hungarian`.

    Raises:
      ValueError: where the batch axes do not divide the leading axis.
    """
    known = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    automatic = all(kind == AxisType.Auto for kind in known.axis_types)
    if not automatic or known.size <= 1:  # inside another shard_map, or on one device
        return hungarian(cost, valid, method=method)
    rows = tuple(axis for axis in BATCH_AXES if axis in known.axis_names)
    shards = math.prod(known.shape[axis] for axis in rows)
    if len(cost) % shards:
        raise ValueError(
            f"a batch of {len(cost)} prompts cannot be matched on {shards} shards "
            f"({' x '.join(rows)}): pad it to a multiple of {shards}"
        )
    spec = PartitionSpec(rows or None)

    def solve(cost: Array, valid: Array) -> Matching:
        return hungarian(cost, valid, method=method)

    return jax.shard_map(
        solve,
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=Matching(spec, spec),
        check_vma=False,  # a callback does not say over which axes its results vary
    )(cost, valid)


def one_to_many(
    logits: Float[Array, "*b q"],
    boxes: Float[Array, "*b q 4"],
    target_boxes: Float[Array, "*b n 4"],
    valid: Bool[Array, "*b n"],
    *,
    alpha: float = 0.3,
    threshold: float = 0.4,
    topk: int = 4,
) -> Bool[Array, "*b q n"]:
    """Every query that is good enough for a target: at most ``topk`` a target, no gradient.

    Quality is alpha sigmoid(logit) + (1 - alpha) IoU; a match lies strictly above both
    ``threshold`` and the (1 - topk / q) quantile of its target's qualities (interpolated linearly).
    A query may match several targets. Upstream: ``BinaryOneToManyMatcher``.
    """
    inputs = lax.stop_gradient((logits, boxes, target_boxes))
    logits, boxes, target_boxes = (x.astype(jnp.float32) for x in inputs)
    iou = pairwise_overlap(boxes, target_boxes).iou
    quality = alpha * jax.nn.sigmoid(logits)[..., None] + (1 - alpha) * iou
    queries = logits.shape[-1]
    position = max(0.0, 1 - topk / queries) * (queries - 1)
    low = math.floor(position)
    # sort, because XLA gathers the batch for top_k.
    ranked = jnp.sort(quality, axis=-2)
    below, above = ranked[..., low, :], ranked[..., min(low + 1, queries - 1), :]
    quantile = below + (position - low) * (above - below)
    return (quality > quantile[..., None, :]) & (quality > threshold) & valid[..., None, :]


def _ask_host(
    cost: Float[Array, "b q n"], valid: Bool[Array, "b n"]
) -> tuple[Int[Array, "b n"], Bool[Array, " b"]]:
    """scipy's assignment, and whether it is the answer to this question.

    On a TPU an exception in a callback may leave zeros, noise or an older answer behind. The host
    therefore signs its answer with a key that depends on the costs.
    """
    key = lax.bitcast_convert_type(cost, jnp.uint32).sum(axis=(1, 2), dtype=jnp.uint32)
    # Without the barrier XLA could compute key or costs twice, and round them in two ways.
    cost, key = lax.optimization_barrier((cost, key))
    answer = lax.platform_dependent(cost, valid, key, cpu=_call_on_cpu, default=_call)
    index, signature = answer[:, :-1], lax.bitcast_convert_type(answer[:, -1], jnp.uint32)
    return index, signature == _sign(index, key, jnp)


def _call(cost: Array, valid: Array, key: Array) -> Int[Array, "b m"]:
    # One result: jax 0.10 cannot lower a callback with results of two ranks to a TPU.
    shape = _answer_shape(valid)
    return jax.pure_callback(_solve_on_host, shape, cost, valid, key, vmap_method="broadcast_all")


def _call_on_cpu(cost: Array, valid: Array, key: Array) -> Int[Array, "b m"]:
    """``pure_callback`` copies its arguments to CPU device 0 on XLA's threads. With several CPU
    devices in a process all of these may be waiting in callbacks, and now and then it hangs.
    """
    call = buffer_callback(_fill_on_host, _answer_shape(valid), vmap_method="broadcast_all")
    return call(cost, valid, key)


def _answer_shape(valid: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((valid.shape[0], valid.shape[1] + 1), jnp.int32)


def _solve_on_host(cost: Any, valid: Any, key: Any) -> np.ndarray:
    """Runs on the host: numpy only, a call into jax from here can wait for itself.

    Returns the query of every target and, in a last column, the signature's bits.
    """
    cost, valid, key = np.asarray(cost), np.asarray(valid), np.asarray(key)
    index = np.full(valid.shape, -1, np.int32)
    for problem in np.ndindex(*valid.shape[:-1]):
        columns = np.flatnonzero(valid[problem])
        queries, chosen = linear_sum_assignment(cost[problem][:, columns])
        index[problem][columns[chosen]] = queries
    return _signed(index, key)


def _fill_on_host(_: Any, out: Any, *args: Any) -> None:
    """:func:`_solve_on_host` on the program's own buffers."""
    np.asarray(out)[...] = _solve_on_host(*args)


def _signed(index: np.ndarray, key: np.ndarray) -> np.ndarray:
    signature = _sign(index, key, np).view(np.int32)
    return np.concatenate([index, signature[..., None]], axis=-1)


def _sign(index: Any, key: Any, xp: ModuleType) -> Any:
    """Hash of an answer and the key of its question, 32 bits wrapping around."""
    odd = xp.arange(1, 2 * index.shape[-1], 2, dtype=xp.uint32) * xp.uint32(2654435761)
    words = (index + 2).astype(xp.uint32) * odd
    return key + xp.uint32(1) + words.sum(axis=-1, dtype=xp.uint32)


def _solve_on_device(cost: Float[Array, "b q n"], valid: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    # Padding costs more than any target. Then a query on padding beside a target without one is
    # never optimal: exchanging the two is cheaper. The scale stays that of the costs.
    known = valid[:, None, :]
    most = jnp.max(cost, axis=(1, 2), keepdims=True, where=known, initial=-BOUND)
    cost = jnp.where(known, cost, most + 1.0)

    def solve(cost: Float[Array, "q n"]) -> Int[Array, " n"]:
        queries, targets = optax.assignment.hungarian_algorithm(cost)
        nothing = jnp.full(cost.shape[1], -1, jnp.int32)
        return nothing.at[targets].set(queries.astype(jnp.int32), unique_indices=True)

    return jnp.where(valid, jax.vmap(solve)(cost), -1)


def _is_assignment(
    index: Int[Array, "b n"], valid: Bool[Array, "b n"], queries: int
) -> Bool[Array, " b"]:
    """In range, no query twice, nothing for padding, and as many pairs as there can be."""
    matched = index >= 0
    inside = jnp.all((index >= -1) & (index < queries) & (valid | ~matched), axis=-1)
    ordered = jnp.sort(index, axis=-1)
    twice = jnp.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), axis=-1)
    enough = matched.sum(-1) == jnp.minimum(valid.sum(-1), queries)
    return inside & ~twice & enough
