"""Matching: both Hungarian methods against scipy, guards, shards; one-to-many against torch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from aot import compile_for, struct, tpu_mesh
from sam3_jax import sharding
from sam3_jax.ops import matcher
from sam3_jax.ops.matcher import hungarian, match_cost, one_to_many, sharded_hungarian
from sam3_jax.ops.overlap import pairwise_overlap

solve = jax.jit(hungarian, static_argnames="method")
overlap = jax.jit(pairwise_overlap)
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


def reference(cost: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """scipy on the unpadded columns of every problem, in float64."""
    index = np.full(valid.shape, -1)
    for problem, (one, real) in enumerate(zip(cost, valid, strict=True)):
        columns = np.flatnonzero(real)
        rows, chosen = linear_sum_assignment(one[:, columns].astype(np.float64))
        index[problem, columns[chosen]] = rows
    return index


@pytest.mark.parametrize("method", matcher.METHODS)
@pytest.mark.parametrize(
    ("problems", "queries", "targets"),
    [(3000, 9, 6), (2000, 5, 8), (4, 200, 200), (3, 1, 1), (2, 4, 0)],
    ids=["many", "more targets than queries", "200 targets", "one", "none"],
)
def test_both_methods_give_what_scipy_gives(rng, method, problems, queries, targets):
    cost = rng.normal(scale=5, size=(problems, queries, targets)).astype(np.float32)
    valid = rng.random((problems, targets)) < rng.random((problems, 1))
    found = solve(cost, valid, method=method)
    np.testing.assert_array_equal(found.index, reference(cost, valid))
    assert found.ok.all()


@pytest.mark.parametrize("method", matcher.METHODS)
def test_ties_cost_the_same(rng, method):
    cost = rng.integers(0, 3, (3000, 9, 6)).astype(np.float32)
    valid = np.ones((3000, 6), bool)
    found = solve(cost, valid, method=method)
    total = np.take_along_axis(cost, np.asarray(found.index)[:, None], axis=1).sum((1, 2))
    expected = np.take_along_axis(cost, reference(cost, valid)[:, None], axis=1).sum((1, 2))
    np.testing.assert_array_equal(total, expected)
    assert found.ok.all()


@pytest.mark.parametrize("method", matcher.METHODS)
def test_costs_that_are_not_finite(rng, method):
    cost = rng.normal(size=(3000, 9, 6)).astype(np.float32)
    for value in (np.nan, np.inf, -np.inf, 1e30):
        cost[rng.random(cost.shape) < 0.05] = value
    cost[0], cost[1] = np.nan, np.inf
    valid = np.ones((3000, 6), bool)
    found = solve(cost, valid, method=method)
    bound = matcher.BOUND
    finite = np.clip(np.nan_to_num(cost, nan=bound, posinf=bound, neginf=-bound), -bound, bound)
    chosen = np.take_along_axis(finite, np.asarray(found.index)[:, None], axis=1)
    best = np.take_along_axis(finite, reference(finite, valid)[:, None], axis=1)
    # Several infinities tie; float32 potentials near 1e3 round at 6e-5.
    np.testing.assert_allclose(chosen.sum((1, 2)), best.sum((1, 2)), rtol=0, atol=1e-3)
    assert found.ok.all()


def test_every_leading_axis_and_no_gradient(rng):
    cost = jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)
    valid = jnp.asarray(rng.random((2, 3, 4)) < 0.8)
    flat = np.asarray(cost).reshape(-1, 5, 4), np.asarray(valid).reshape(-1, 4)
    expected = reference(*flat).reshape(2, 3, 4)
    np.testing.assert_array_equal(solve(cost, valid).index, expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(hungarian))(cost, valid).index, expected)

    def used(cost):
        chosen = jnp.take_along_axis(cost, hungarian(cost, valid).index[..., None, :], axis=-2)
        return chosen.sum()

    grad = jax.jit(jax.grad(used))(cost)
    assert set(np.unique(grad)) == {0, 1}  # one a target, through the use and not the choice


def test_the_call_of_other_platforms_gives_the_same(rng):
    cost, valid = rng.normal(size=(5, 7, 4)).astype(np.float32), rng.random((5, 4)) < 0.7
    key = rng.integers(0, 2**32, 5, dtype=np.uint32)
    here = jax.jit(matcher._call_on_cpu)(cost, valid, key)
    there = jax.jit(matcher._call)(cost, valid, key)
    np.testing.assert_array_equal(here, there)
    assert here.shape == (5, 5)  # with the signature


def _zeros(cost, valid, key):
    shape = np.asarray(valid).shape
    return np.zeros((shape[0], shape[1] + 1), np.int32)


def _stale(cost, valid, key, *, answers=[]):  # noqa: B006  (the first answer again is the point)
    answers.append(_right(cost, valid, key))
    return answers[0]


def _twice(cost, valid, key):
    return matcher._signed(np.zeros(np.asarray(valid).shape, np.int32), np.asarray(key))


def _too_large(cost, valid, key):
    index = np.zeros(np.asarray(valid).shape, np.int32)
    return matcher._signed(index + np.arange(3, 6, dtype=np.int32), np.asarray(key))


def _too_few(cost, valid, key):
    return matcher._signed(np.full(np.asarray(valid).shape, -1, np.int32), np.asarray(key))


_right = matcher._solve_on_host


@pytest.mark.parametrize("answer", [_zeros, _stale, _twice, _too_large, _too_few])
def test_a_callback_that_failed_is_noticed(rng, monkeypatch, answer):
    monkeypatch.setattr(matcher, "_solve_on_host", answer)
    solve = jax.jit(lambda cost, valid: hungarian(cost, valid))
    targets = 1 if answer is _zeros else 3  # for one target, query 0 could be right
    valid = np.ones((4, targets), bool)
    solve(rng.normal(size=(4, 5, targets)).astype(np.float32), valid)
    found = solve(rng.normal(size=(4, 5, targets)).astype(np.float32), valid)
    assert not found.ok.any()


def test_an_exception_in_the_callback_reaches_the_caller(rng, monkeypatch):
    def broken(*_):
        raise RuntimeError("no assignment today")

    monkeypatch.setattr(matcher, "_solve_on_host", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no assignment today"):
        jax.block_until_ready(hungarian(jnp.ones((1, 2, 2)), jnp.ones((1, 2), bool)))


def test_an_unknown_method():
    with pytest.raises(ValueError, match="'gpu' is unknown: choose one of host, device"):
        hungarian(jnp.ones((1, 2, 2)), jnp.ones((1, 2), bool), method="gpu")


@pytest.mark.parametrize(
    ("method", "data", "tensor"), [("host", 8, 1), ("host", 4, 2), ("device", 4, 2)]
)
def test_shards_are_matched_where_they_are(rng, method, data, tensor):
    mesh = sharding.make_mesh(data, tensor)
    # 131 KB a device: larger than what XLA's CPU client copies at once, see _call_on_cpu.
    cost = rng.normal(size=(8, 8, 64, 64)).astype(np.float32)
    valid = rng.random((8, 8, 64)) < 0.5
    placed = jax.device_put((cost, valid), NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(functools.partial(sharded_hungarian, mesh=mesh, method=method))
    compiled = program.lower(*placed).compile()
    text = compiled.as_text()
    assert [name for name in COLLECTIVES if name in text] == []
    found = compiled(*placed)
    expected = reference(cost.reshape(-1, 64, 64), valid.reshape(-1, 64)).reshape(valid.shape)
    np.testing.assert_array_equal(found.index, expected)
    assert found.ok.all()
    assert found.index.sharding.shard_shape(found.index.shape)[0] == 8 // data
    if method == "host":  # the mesh in context is found
        with jax.set_mesh(mesh):
            again = jax.jit(sharded_hungarian).lower(*placed).compile()
        assert [name for name in COLLECTIVES if name in again.as_text()] == []
        np.testing.assert_array_equal(again(*placed).index, expected)


def test_plain_jit_would_gather():
    """The reason for shard_map, and proof that the assertion above can fail."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    cost = jax.ShapeDtypeStruct((8, 4, 4), jnp.float32, sharding=rows)
    valid = jax.ShapeDtypeStruct((8, 4), bool, sharding=rows)
    text = jax.jit(hungarian).lower(cost, valid).compile().as_text()
    assert any(name in text for name in COLLECTIVES)


def test_a_batch_that_does_not_divide():
    cost, valid = jnp.ones((6, 3, 2)), jnp.ones((6, 2), bool)
    with pytest.raises(ValueError, match="6 prompts cannot be matched on 8 shards .*multiple of 8"):
        sharded_hungarian(cost, valid, sharding.make_mesh(8))


def test_compiles_for_a_tpu():
    mesh = tpu_mesh("v5e", 4)
    cost = struct(mesh, (8, 11, 50, 16), jnp.float32, "data")
    valid = struct(mesh, (8, 11, 16), bool, "data")
    compiled = compile_for(mesh, sharded_hungarian, cost, valid)
    assert [name for name in COLLECTIVES if name in compiled.as_text()] == []


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    centre, size = rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.05, 0.4, (*shape, 2))
    return np.concatenate([centre, size], -1).astype(np.float32)


def near(rng: np.random.Generator, targets: np.ndarray, queries: int) -> np.ndarray:
    """Boxes beside targets drawn at random, so that overlaps of all sizes occur."""
    pick = rng.integers(0, targets.shape[1], (len(targets), queries))
    boxes = np.take_along_axis(targets, pick[..., None], axis=1)
    return (boxes * rng.normal(1, 0.08, boxes.shape)).astype(np.float32)


def test_cost_is_the_sum_of_its_terms(rng):
    targets = random_boxes(rng, 3, 6)
    boxes = near(rng, targets, 20)
    logits = rng.normal(scale=6, size=(3, 20)).astype(np.float32)
    got = np.asarray(jax.jit(match_cost)(logits, boxes, targets))
    iou_got = np.asarray(overlap(boxes, targets).iou)
    x, p = logits.astype(np.float64), 1 / (1 + np.exp(-logits.astype(np.float64)))
    of_class = 0.25 * (1 - p) ** 2 * np.logaddexp(0, -x) - 0.75 * p**2 * np.logaddexp(0, x)
    for i, q, n in np.ndindex(3, 20, 6):
        iou, giou = overlap_by_hand(boxes[i, q], targets[i, n])
        l1 = np.abs(boxes[i, q].astype(np.float64) - targets[i, n]).sum()
        want = 2 * of_class[i, q] + 5 * l1 - 2 * giou
        # Terms up to 18 in float32.
        assert got[i, q, n] == pytest.approx(want, abs=2e-5)
        assert iou_got[i, q, n] == pytest.approx(iou, abs=1e-6)


def overlap_by_hand(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """IoU and GIoU of two boxes (cx, cy, w, h), in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    low = [np.array([x[:2] - x[2:] / 2]) for x in (a, b)]
    high = [np.array([x[:2] + x[2:] / 2]) for x in (a, b)]
    inner = np.prod(np.clip(np.minimum(*high) - np.maximum(*low), 0, None))
    hull = np.prod(np.maximum(*high) - np.minimum(*low))
    union = a[2] * a[3] + b[2] * b[3] - inner
    return inner / union, inner / union - (hull - union) / hull


def test_empty_boxes_overlap_nothing_and_have_finite_gradients():
    zero = jnp.zeros((1, 4))
    total = jax.jit(jax.value_and_grad(lambda a: sum(x.sum() for x in pairwise_overlap(a, zero))))
    value, grad = total(zero)
    assert value == 0
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize(("queries", "topk"), [(40, 4), (7, 3), (3, 4), (200, 4)])
def test_one_to_many_is_torchs_quantile(rng, queries, topk):
    targets = random_boxes(rng, 5, 6)
    boxes = near(rng, targets, queries)
    logits = rng.normal(scale=3, size=(5, queries)).astype(np.float32)
    valid = rng.random((5, 6)) < 0.8
    args = [jnp.asarray(x) for x in (logits, boxes, targets, valid)]
    got = np.asarray(jax.jit(functools.partial(one_to_many, topk=topk))(*args))
    iou = np.asarray(overlap(args[1], args[2]).iou)
    quality = torch.from_numpy(0.3 / (1 + np.exp(-logits))[..., None] + 0.7 * iou)
    level = max(0.0, 1 - topk / queries)
    want = (quality > torch.quantile(quality, level, dim=1, keepdim=True)) & (quality > 0.4)
    np.testing.assert_array_equal(got, want.numpy() & valid[:, None])
    assert got.any()
    assert got.sum(1).max() <= topk
