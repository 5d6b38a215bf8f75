"""Loss terms against torch in float64, values and gradients; points; bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import loss_oracle as oracle
from sam3_jax.ops import losses
from sam3_jax.ops.mask_losses import (
    Pairs,
    PointSampling,
    pair_mask_losses,
    sample_map,
    select_pairs,
    uncertain_points,
)

CLOSE = 1e-5  # of the largest value: float32 against float64, a few operations deep


def assert_agrees(
    ours: Callable, theirs: Callable, *inputs: np.ndarray, differentiable: int = 1
) -> None:
    """Values, and gradients of a weighted sum by the first ``differentiable`` inputs."""
    inputs = [x.astype(np.float32) if x.dtype == np.float64 else x for x in inputs]
    first = tuple(range(differentiable))
    leaves = [oracle.tensor(x, grad=i in first) for i, x in enumerate(inputs)]
    want = theirs(*leaves)
    weights = np.random.default_rng(7).uniform(0.5, 1.5, tuple(want.shape)).astype(np.float32)
    (want * oracle.tensor(weights)).sum().backward()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(args):
        def total(*parts):
            value = ours(*parts, *args[differentiable:])
            return (value * weights).sum(), value

        return jax.grad(total, argnums=first, has_aux=True)(*args[:differentiable])

    grads, value = both(list(map(jnp.asarray, inputs)))
    assert value.dtype == jnp.float32
    assert_near(value, want.detach().numpy())
    for grad, leaf in zip(grads, leaves, strict=False):
        assert_near(grad, leaf.grad.numpy())


def assert_near(mine: jax.Array, other: np.ndarray) -> None:
    assert np.abs(other).max() > 0
    np.testing.assert_allclose(mine, other, rtol=0, atol=CLOSE * np.abs(other).max())


def logits_of(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(scale=4, size=shape)
    x.flat[:5] = [0, 12, -12, 60, -60]
    return x


@pytest.mark.parametrize(
    ("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.6, 2.0), (-1.0, 0.0), (0.25, 1.6)]
)
def test_focal_loss(rng, alpha, gamma):
    # A power that is not whole has no gradient at 0, where torch's is NaN too: hence no +-60.
    x = logits_of(rng, 60) if gamma.is_integer() else rng.normal(scale=3, size=60)
    assert_agrees(
        functools.partial(losses.focal_loss, alpha=alpha, gamma=gamma),
        functools.partial(oracle.focal, alpha=alpha, gamma=gamma),
        x,
        rng.random(60).round(1),
    )


def test_small_losses_keep_their_digits():
    x = jnp.array([12.0, 30.0, -30.0])
    want = np.log1p(np.exp(-np.abs(np.asarray(x, np.float64))))  # torch's form loses them
    got = losses.bce_with_logits(x, jnp.array([1.0, 1, 0]))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_class_loss(rng):
    iou, matched = rng.random(80), rng.random(80) < 0.5
    iou[5:9] = 0.0  # the floor

    def theirs(x, iou, matched):
        p = x.sigmoid()
        soft = (p**0.25 * iou**0.75).clamp(min=0.01).detach()
        bce = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")
        negative = bce(x, torch.zeros_like(x)) * p**2
        return torch.where(matched > 0, 10 * bce(x, soft), negative)

    assert_agrees(losses.class_loss, theirs, logits_of(rng, 80), iou, matched)


def test_presence_and_object_loss(rng):
    x, shown = logits_of(rng, 30), rng.random(30) < 0.5

    def bce(x, shown):
        return F.binary_cross_entropy_with_logits(x, shown, reduction="none")

    assert_agrees(losses.presence_loss, lambda x, t: bce(x, t) / 2, x, shown)
    assert_agrees(losses.object_loss, bce, x, shown)


def test_box_l1(rng):
    boxes, targets = rng.random((2, 7, 4)), rng.random((2, 5, 4))
    assert_agrees(losses.box_l1, lambda a, b: torch.cdist(a, b, p=1), boxes, targets)


def test_mask_focal_dice_and_iou(rng):
    x, masks = logits_of(rng, 6, 50), rng.random((6, 50)) < 0.4
    masks[0] = False
    assert_agrees(losses.mask_focal, lambda x, t: oracle.focal(x, t, 0.25, 2).mean(-1), x, masks)

    def dice(x, t):
        return torch.stack([oracle.dice(*pair) for pair in zip(x, t, strict=True)])

    assert_agrees(losses.mask_dice, dice, x, masks)

    def iou(predicted, x, t):
        inner, union = ((x > 0) & (t > 0)).sum(-1), ((x > 0) | (t > 0)).sum(-1)
        return (predicted - inner / union).abs()

    assert_agrees(losses.iou_l1, iou, rng.random(6), x, masks)
    empty = losses.iou_l1(jnp.array([0.3]), -jnp.ones((1, 4)), jnp.zeros((1, 4), bool))
    assert empty[0] == pytest.approx(0.3)


def grid_sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    grid = 2 * points[:, None] - 1
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, 0]


def test_sampling_is_torchs_grid_sample(rng):
    maps, points = rng.normal(size=(3, 7, 5)), rng.uniform(-0.2, 1.2, (3, 40, 2))
    assert_agrees(sample_map, grid_sample, maps, points)
    mask = maps > 0
    mine = sample_map(jnp.asarray(mask), jnp.asarray(points, jnp.float32))
    assert_near(mine, grid_sample(oracle.tensor(mask), oracle.tensor(points)).numpy())


def test_the_most_uncertain_points_are_taken(rng):
    maps = rng.normal(size=(4, 6, 6)).astype(np.float32)
    candidates, others = (rng.random((4, n, 2)).astype(np.float32) for n in (60, 5))
    got = uncertain_points(*map(jnp.asarray, (maps, candidates, others)), 20)
    doubt = -grid_sample(oracle.tensor(maps), oracle.tensor(candidates)).abs()
    best = doubt.topk(20, dim=1).indices
    want = np.take_along_axis(candidates, best.numpy()[..., None], axis=1)
    np.testing.assert_array_equal(got, np.concatenate([want, others], axis=1))


def some_pairs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Pairs]:
    pred, masks = rng.normal(scale=2, size=(2, 9, 8, 8)), rng.random((2, 5, 13, 11)) < 0.4
    query, target = rng.integers(0, 9, (2, 7)), rng.integers(0, 5, (2, 7))
    weight = np.array([[1, 1, 1, 1, 1, 0, 0], [2, 2, 0, 0, 0, 0, 0]], np.float32)
    arrays = (query.astype(np.int32), target.astype(np.int32), weight)
    return pred, masks, Pairs(*map(jnp.asarray, arrays))


@pytest.mark.parametrize("chunk", [3, 100])
def test_masks_at_full_size(rng, chunk):
    pred, masks, pairs = some_pairs(rng)

    def theirs(pred, masks):
        sums = torch.zeros(2, dtype=torch.float64)
        for i, k in np.argwhere(np.asarray(pairs.weight)):
            x = oracle.resize(pred[i, int(pairs.query[i, k])], (13, 11))
            t = masks[i, int(pairs.target[i, k])]
            both = torch.stack([oracle.focal(x, t, 0.25, 2).mean(), oracle.dice(x, t)])
            sums = sums + both * float(pairs.weight[i, k])
        return sums

    def ours(pred, masks):
        return jnp.stack(pair_mask_losses(pred, masks, pairs, chunk=chunk))

    assert_agrees(ours, theirs, pred, masks)


def test_masks_at_points(rng):
    pred, masks, pairs = some_pairs(rng)
    sampling, key = PointSampling(count=24, oversample=3.0, importance=0.75), jax.random.key(3)

    def ours(pred, masks):
        return jnp.stack(pair_mask_losses(pred, masks, pairs, chunk=7, points=sampling, key=key))

    first, second = jax.random.split(jax.random.split(key, 1)[0])  # of the only chunk
    drawn = np.asarray(jax.random.uniform(first, (2, 7, 72, 2)))
    others = np.asarray(jax.random.uniform(second, (2, 7, 6, 2)))

    def theirs(pred, masks):
        sums = torch.zeros(2, dtype=torch.float64)
        for i, k in np.argwhere(np.asarray(pairs.weight)):
            logits = pred[i, int(pairs.query[i, k])][None]
            mask = masks[i, int(pairs.target[i, k])][None]
            candidates = oracle.tensor(drawn[i, k])[None]
            best = grid_sample(logits.detach(), candidates)[0].abs().topk(18, largest=False)
            points = [candidates[:, best.indices], oracle.tensor(others[i, k])[None]]
            points = torch.cat(points, dim=1)
            x, t = grid_sample(logits, points), grid_sample(mask, points)
            both = torch.stack([oracle.focal(x, t, 0.25, 2).mean(), oracle.dice(x, t)])
            sums = sums + both * float(pairs.weight[i, k])
        return sums

    assert_agrees(ours, theirs, pred, masks)


def test_pairs_are_listed_once_and_capped_without_bias(rng):
    matched = np.zeros((2, 20, 12), bool)
    for image, count in enumerate((12, 2)):
        for target in range(count):
            matched[image, rng.permutation(20)[:3], target] = True
    every = select_pairs(jnp.asarray(matched), 3, 100, None)
    for image in range(2):
        real = np.asarray(every.weight[image]) > 0
        listed = np.stack([every.query[image], every.target[image]], 1)[real]
        assert sorted(map(tuple, listed)) == sorted(map(tuple, np.argwhere(matched[image])))
        assert set(np.unique(every.weight[image])) <= {0, 1}
    draw = jax.jit(jax.vmap(lambda key: select_pairs(jnp.asarray(matched), 3, 8, key)))
    some = draw(jax.random.split(jax.random.key(0), 400))
    assert some.query.shape == (400, 2, 8)
    np.testing.assert_allclose(some.weight[:, 0], 36 / 8)  # 36 pairs by 8
    np.testing.assert_array_equal(np.sort(some.weight[:, 1]), np.tile([0, 0, *[1] * 6], (400, 1)))
    ids = np.asarray(some.query[:, 0] * 12 + some.target[:, 0])
    assert (np.sort(ids)[:, 1:] != np.sort(ids)[:, :-1]).all()  # none twice
    share = np.bincount(ids.ravel(), minlength=240)[matched[0].ravel()] / 400
    # Drawn with probability 8 / 36, 400 times: five standard deviations of .0208.
    np.testing.assert_allclose(share, 8 / 36, rtol=0, atol=0.105)


def test_chunks_bound_memory():
    """Temporaries of a training step shrink with the chunk, not grow with the pairs."""
    shape = jax.ShapeDtypeStruct
    pred, masks = shape((1, 200, 16, 16), jnp.float32), shape((1, 200, 128, 128), bool)
    pairs = Pairs(*(shape((1, 200), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)))

    def temporaries(chunk: int, points: PointSampling | None) -> int:
        def loss(pred, masks, pairs, key):
            return sum(pair_mask_losses(pred, masks, pairs, chunk=chunk, points=points, key=key))

        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.jit(jax.value_and_grad(loss)).lower(pred, masks, pairs, key)
        options = {"xla_backend_optimization_level": 0}
        return step.compile(options).memory_analysis().temp_size_in_bytes

    full, one_map = temporaries(4, None), 128 * 128 * 4
    assert full < 4 * 16 * one_map + 4 * 200 * 16 * 16 * 4  # the loop, and gathered predictions
    assert full < 0.2 * temporaries(200, None)
