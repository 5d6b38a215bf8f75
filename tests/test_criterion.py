"""The detector's and the interactive head's loss against torch: values, gradients, edge cases."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

import loss_oracle as oracle
from sam3_jax import sharding
from sam3_jax.ops import matcher
from sam3_jax.training.criterion import detection_loss
from sam3_jax.training.interactive import InteractiveLossConfig, interactive_loss
from sam3_jax.training.targets import LossConfig, Targets
from sam3_jax.types import ClickOutput, GroundOutput

# Of the largest value: sums of a few thousand float32 terms, against float64.
CLOSE = 1e-5
SUPERVISED = ("layer_logits", "layer_boxes", "layer_presence", "pred_masks", "semantic_seg")


class Case(NamedTuple):
    out: GroundOutput
    targets: Targets


def make(
    rng: np.random.Generator,
    counts: tuple[int, ...],
    *,
    queries: int,
    padded: int,
    depth: int = 3,
    kinds: int = 2,
    pred: int = 6,
    size: int = 9,
) -> Case:
    """Random predictions near random targets; ``counts`` real targets an image, scattered."""
    p, q = len(counts), kinds * queries
    centre, side = rng.uniform(0.3, 0.7, (p, padded, 2)), rng.uniform(0.1, 0.5, (p, padded, 2))
    boxes = np.concatenate([centre, side], -1)
    valid = np.zeros((p, padded), bool)
    for row, count in zip(valid, counts, strict=True):
        row[rng.permutation(padded)[:count]] = True
    pick = rng.integers(0, padded, (depth, p, q))
    near = np.take_along_axis(boxes[None], pick[..., None], axis=2)
    near = (near * rng.normal(1, 0.1, near.shape)).clip(0.01, 0.99)
    boxes[~valid & (rng.random(valid.shape) < 0.5)] = 0.0  # padding may hold anything
    masks = rng.random((p, padded, size, size)) < 0.3
    semantic = (masks & valid[..., None, None]).any(1)
    normal = functools.partial(rng.normal, scale=2)
    logits = normal(size=(depth, p, q))
    out = GroundOutput(
        pred_logits=logits[-1, :, :queries],
        pred_boxes=near[-1, :, :queries],
        presence_logits=np.zeros(p),
        pred_masks=normal(size=(p, q, pred, pred)),
        semantic_seg=normal(size=(p, pred, pred)),
        memory=np.zeros((p, 1, 1)),
        layer_logits=logits,
        layer_boxes=near,
        layer_presence=normal(size=(depth, p)),
    )
    out = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), out)
    targets = Targets(
        boxes.astype(np.float32),
        valid,
        masks,
        rng.random((p, padded)) < 0.8,
        semantic,
        np.ones(p, bool),
        np.ones(p, bool),
    )
    return Case(out, Targets(*map(jnp.asarray, targets)))


# Half the time to compile.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnames=("constants", "matcher", "replicas"))
def step(parts, case: Case, constants: tuple, matcher: str, replicas: int):
    def loss(parts):
        out = case.out._replace(**parts)
        config = LossConfig(*constants)
        return detection_loss(out, case.targets, config, matcher=matcher, replicas=replicas)

    return jax.value_and_grad(loss, has_aux=True)(parts)


def ours(case: Case, config: LossConfig, matcher: str = "host", replicas: int = 1):
    """Total, terms, and gradients of the supervised outputs; one program a shape."""
    parts = {name: getattr(case.out, name) for name in SUPERVISED}
    (total, terms), grads = step(parts, case, dataclasses.astuple(config), matcher, replicas)
    return float(total), terms, grads


def trace(case: Case, config: LossConfig, key: jax.Array | None = None) -> None:
    jax.eval_shape(functools.partial(detection_loss, config=config, key=key), *case)


def theirs(case: Case, **options):
    """The oracle on what is real: its gradients of padded prompts are 0."""
    shown = np.flatnonzero(case.targets.prompt_valid)
    out, leaves = {}, {}
    for name, x in case.out._asdict().items():
        leaves[name] = oracle.tensor(x, grad=name in SUPERVISED)
        by_layer = name.startswith("layer")
        out[name] = leaves[name][:, shown] if by_layer else leaves[name][shown]
    t = Targets(*(np.asarray(x)[shown] for x in case.targets))
    real = [np.flatnonzero(row) for row in t.valid]
    total, terms = oracle.detection_loss(
        out,
        [oracle.tensor(box[i]) for box, i in zip(t.boxes, real, strict=True)],
        [oracle.tensor(mask[i]) for mask, i in zip(t.masks, real, strict=True)],
        [known[i] for known, i in zip(t.mask_valid, real, strict=True)],
        oracle.tensor(t.semantic),
        **options,
    )
    total.backward()
    grads = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    return total.item(), {name: x.item() for name, x in terms.items()}, grads


def assert_same(mine, other):
    total, terms, grads = mine
    assert total == pytest.approx(other[0], rel=CLOSE)
    for name, value in other[1].items():
        assert float(terms[name]) == pytest.approx(value, rel=CLOSE, abs=1e-6), name
    assert set(terms) - set(other[1]) == {"num_boxes", "matcher_failures"}
    for name, grad in grads.items():
        assert_gradient(grad, other[2][name].numpy(), name)


def assert_gradient(mine: jax.Array, other: np.ndarray, name: str) -> None:
    atol = CLOSE * np.abs(other).max()
    np.testing.assert_allclose(mine, other, rtol=0, atol=atol, err_msg=name)


MIXED = {"queries": 10, "padded": 16, "depth": 2}
BOXES = LossConfig(masks=False, semantic=False)


@pytest.mark.parametrize(
    ("counts", "real"),
    [
        ((3, 0, 14, 10, 16, 1, 0, 5), 8),  # no target; fewer, as many and more than queries
        ((0,) * 8, 8),
        ((2, 16, 0, 4, 9, 3, 16, 8), 5),  # three prompts fill up the batch
    ],
    ids=["mixed", "nothing there", "padded prompts"],
)
def test_values_and_gradients_are_torchs(rng, counts, real):
    case = make(rng, counts, **MIXED)
    targets = case.targets._replace(prompt_valid=jnp.arange(8) < real)
    case = case._replace(targets=targets)
    mine = ours(case, LossConfig(mask_chunk=3))
    assert_same(mine, theirs(case))
    assert mine[1]["num_boxes"] == max(1, sum(counts[:real]))
    assert mine[1]["matcher_failures"] == 0


def test_200_targets(rng):
    case = make(rng, (200,), queries=200, padded=200, depth=1, pred=3, size=4)
    assert_same(ours(case, BOXES), theirs(case, use_masks=False))


def test_other_recipes(rng):
    """Quality matching on all layers, no negatives on weak prompts, no masks, no scale."""
    case = make(rng, (3, 0, 14, 6), **MIXED)
    exhaustive = [True, False, False, True]
    case = case._replace(targets=case.targets._replace(exhaustive=jnp.array(exhaustive)))
    config = dataclasses.replace(BOXES, o2m_matcher_on_aux=True, o2m_topk=2, weak=True)
    config.scale_by_prompts = False
    options = {
        "topk": 2,
        "many_on_aux": True,
        "negatives": exhaustive,
        "use_masks": False,
        "scale": False,
    }
    assert_same(ours(case, config), theirs(case, **options))


def test_without_copies(rng):
    """One kind of query, the device's matcher, several replicas, and targets without masks."""
    case = make(rng, (1, 0, 0, 0), queries=5, padded=3, depth=2, kinds=1)
    nothing = case.targets._replace(
        masks=jnp.zeros((4, 3, 0, 0), bool), semantic=jnp.zeros((4, 0, 0), bool)
    )
    mine = ours(case._replace(targets=nothing), BOXES, matcher="device", replicas=2)
    assert_same(mine, theirs(case, replicas=2, use_masks=False))
    assert mine[1]["num_boxes"] == 2  # at least one on each replica
    with pytest.raises(ValueError, match="targets have no masks"):
        trace(case._replace(targets=nothing), LossConfig())


def test_a_failed_matcher_poisons_loss_and_gradients(rng, monkeypatch):
    def zeros(cost, valid, key):
        shape = np.asarray(valid).shape
        return np.zeros((shape[0], shape[1] + 1), np.int32)

    monkeypatch.setattr(matcher, "_solve_on_host", zeros)
    total, terms, grads = ours(make(rng, (1, 2, 2), queries=3, padded=2, depth=2), BOXES)
    assert np.isnan(total)
    assert terms["matcher_failures"] == 3 * 3  # prompts x (one-to-one layers + one auxiliary)
    assert np.isnan(grads["layer_logits"]).all()


def test_shards_give_what_one_device_gives(rng):
    """Sums may cross devices; predictions and targets may not."""
    case = make(rng, (3, 0, 14, 10, 16, 1, 0, 5), **MIXED)
    config = LossConfig(mask_chunk=3)
    total, _, grads = ours(case, config)
    mesh = sharding.make_mesh(4, 2)
    by_layer = NamedSharding(mesh, PartitionSpec(None, "data"))
    by_row = sharding.batch_sharding(mesh)
    out = {
        name: jax.device_put(x, by_layer if name.startswith("layer") else by_row)
        for name, x in case.out._asdict().items()
    }
    placed = Case(GroundOutput(**out), jax.device_put(case.targets, by_row))
    parts = {name: out[name] for name in SUPERVISED}
    with jax.set_mesh(mesh):
        program = step.lower(parts, placed, dataclasses.astuple(config), "host", 1).compile()
        (again, _), shards = program(parts, placed)
    text = program.as_text()
    assert [x for x in ("all-gather", "all-to-all", "collective-permute") if x in text] == []
    assert float(again) == pytest.approx(total, rel=CLOSE)
    for name, grad in grads.items():
        assert_gradient(shards[name], np.asarray(grad), name)


def test_points_and_capped_pairs_need_a_key(rng):
    case = make(rng, (2, 1), queries=6, padded=6, depth=1)
    with pytest.raises(ValueError, match="points need a key"):
        trace(case, LossConfig(mask_points=16))
    with pytest.raises(ValueError, match="24 mask pairs .* max_pairs is 8: pass a key"):
        trace(case, LossConfig(max_pairs=8))
    trace(case, LossConfig(mask_points=16, max_pairs=8), key=jax.random.key(0))


def click_case(rng: np.random.Generator):
    p, m = 6, 4
    masks = rng.random((p, 10, 10)) < 0.4
    masks[1] = False  # the object is not there
    out = ClickOutput(
        masks=jnp.asarray(rng.normal(scale=2, size=(p, m, 7, 7)), jnp.float32),
        iou=jnp.asarray(rng.random((p, m)), jnp.float32),
        object_logits=jnp.asarray(rng.normal(size=p), jnp.float32),
        tokens=jnp.zeros((p, m, 1)),
    )
    valid, multimask = np.arange(p) != 4, np.arange(p) % 2 == 0
    return out, masks, valid, multimask


def test_interactive_values_and_gradients_are_torchs(rng):
    out, masks, valid, multimask = click_case(rng)

    def loss(parts):
        args = map(jnp.asarray, (masks, valid, multimask))
        click = out._replace(**parts)
        return interactive_loss(click, *args, InteractiveLossConfig(), replicas=7)

    parts = {name: getattr(out, name) for name in ("masks", "iou", "object_logits")}
    (total, terms), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(parts)

    torch_parts = {name: oracle.tensor(x, grad=True) for name, x in parts.items()}
    sums = dict.fromkeys(("mask", "dice", "iou", "object"), torch.zeros(()))
    for i in np.flatnonzero(valid):
        goal = oracle.tensor(masks[i])
        score = torch_parts["object_logits"][i]
        sums["object"] = sums["object"] + torch.nn.functional.binary_cross_entropy_with_logits(
            score, oracle.tensor(goal.any())
        )
        if not goal.any():
            continue
        choices = []
        for h in (1, 2, 3) if multimask[i] else (0,):
            x = oracle.resize(torch_parts["masks"][i, h], goal.shape)
            inner, union = ((x > 0) & (goal > 0)).sum(), ((x > 0) | (goal > 0)).sum()
            iou = (torch_parts["iou"][i, h] - inner / union).abs()
            choices.append((oracle.focal(x, goal, 0.25, 2).mean(), oracle.dice(x, goal), iou))
        best = min(choices, key=lambda c: (20 * c[0] + c[1]).item())
        for name, value in zip(("mask", "dice", "iou"), best, strict=True):
            sums[name] = sums[name] + value
    sums = {name: value / 7 for name, value in sums.items()}
    want = 20 * sums["mask"] + sums["dice"] + sums["iou"] + sums["object"]
    want.backward()
    assert float(total) == pytest.approx(want.item(), rel=CLOSE)
    for name, value in sums.items():
        assert float(terms[f"click_{name}"]) == pytest.approx(value.item(), rel=CLOSE), name
    for name, x in torch_parts.items():
        np.testing.assert_allclose(
            grads[name], x.grad, rtol=0, atol=CLOSE * x.grad.abs().max().item(), err_msg=name
        )
    assert not grads["masks"][1].any()  # not there: only the object score learns
    assert grads["object_logits"][1] != 0
    assert not grads["object_logits"][4].any()  # padding
