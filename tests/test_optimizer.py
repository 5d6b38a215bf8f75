"""The optimizer's constants against upstream's rules, worked out by hand or with torch."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import tiny_predictor
from sam3_jax import config as model_config
from sam3_jax.convert.table import build_table
from sam3_jax.models.detector import init_shapes
from sam3_jax.training import optimizer as lib
from sam3_jax.training.init_from import copy_within, fill_within, init_from, scale_within
from sam3_jax.training.lora import add_lora, input_axes, merge
from sam3_jax.training.state import export_params, init_state


@pytest.fixture(scope="module")
def paths() -> dict[str, tuple[int, ...]]:
    """Every parameter of the released size and its shape."""
    leaves = jax.tree_util.tree_flatten_with_path(init_shapes(model_config.sam3()))[0]
    return {lib.path_of(path): leaf.shape for path, leaf in leaves}


def upstream_schedule(step: int, total: int, warmup: int, cooldown: int, timescale: int) -> float:
    """Factor of ``InverseSquareRootParamScheduler`` by its three rules."""
    value = 1.0
    if step > warmup:
        value = 1 / math.sqrt((step + timescale - warmup) / timescale)
    if warmup:
        value *= min(1, step / warmup)
    if cooldown:
        value *= min(1, (total - step) / cooldown)
    return value


@pytest.mark.parametrize(
    ("warmup", "cooldown", "timescale"), [(20, 20, 20), (5, 0, 40), (0, 30, 7)]
)
def test_inverse_square_root(warmup, cooldown, timescale):
    config = lib.ScheduleConfig(warmup=warmup, cooldown=cooldown, timescale=timescale)
    schedule = lib.make_schedule(config, 100)
    ours = [float(schedule(jnp.int32(step))) for step in range(100)]
    theirs = [upstream_schedule(s, 100, warmup, cooldown, timescale) for s in range(100)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # float32


def test_schedules_by_hand():
    released = lib.make_schedule(lib.finetuning().schedule, 1000)
    by_hand = {0: 0, 10: 0.5, 20: 1, 80: 0.5, 320: 0.25, 980: 1 / 7, 990: 0.5 / 49.5**0.5}
    for step, value in by_hand.items():
        assert float(released(jnp.int32(step))) == pytest.approx(value, rel=1e-6), step
    cosine = lib.make_schedule(lib.ScheduleConfig("cosine", warmup=10, final=0.1), 110)
    for step, value in {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1}.items():
        assert float(cosine(jnp.int32(step))) == pytest.approx(value, rel=1e-6, abs=1e-7), step


def test_schedules_that_cannot_be():
    with pytest.raises(ValueError, match="take 40 steps, there are 39"):
        lib.make_schedule(lib.ScheduleConfig(), 39)
    with pytest.raises(ValueError, match="'linear'"):
        lib.make_schedule(lib.ScheduleConfig("linear"), 100)


def test_every_parameter_has_its_rate(paths):
    """Rates of the released recipe: group x layer decay, as ``ViT.get_layer_id`` numbers layers."""
    config = lib.finetuning()
    rate = {path: lib.rate_of(config, path, 32) for path in paths}
    expected = {
        "vision/trunk/pos_embed": 2.5e-5,
        "vision/trunk/patch_embed/kernel": 2.5e-5 * 0.9**33,
        "vision/trunk/norm_pre/scale": 2.5e-5 * 0.9**33,
        "vision/trunk/block_0/attn/q/kernel": 2.5e-5 * 0.9**32,
        "vision/trunk/block_31/mlp/fc2/bias": 2.5e-5 * 0.9,
        "vision/detector_neck/level_0_up_0/kernel": 2.5e-5,
        "text/pos_embed/embedding": 5e-6,
        "text/block_3/attn/q/kernel": 5e-6,
        "decoder/query_embed/embedding": 8e-5,
        "segmentation/conv_0/kernel": 8e-5,
    }
    for path, value in expected.items():
        assert rate[path] == pytest.approx(value, rel=1e-9), path
    assert all(value > 0 for value in rate.values())
    paper = lib.pretraining()
    assert lib.rate_of(paper, "decoder/norm/bias", 32) == 1e-3
    assert lib.rate_of(paper, "vision/trunk/pos_embed", 32) == 5e-4
    assert lib.rate_of(paper, "text/norm_final/bias", 32) == 1e-4


def test_a_parameter_is_in_exactly_one_group():
    config = lib.finetuning()
    config.rest.pattern = r"^(decoder|text)/"
    with pytest.raises(ValueError, match="text/norm is in 2 groups"):
        lib.rate_of(config, "text/norm", 2)
    params = {"decoder": {"norm": jnp.ones(2)}, "scoring": {"norm": jnp.ones(2)}}
    with pytest.raises(ValueError, match="scoring/norm is in 0 groups"):
        lib.make_optimizer(config, depth=2, total=100).transform.init(params)


def test_what_decays(paths):
    """By upstream's names: nothing with "bias" in it, no ``torch.nn.LayerNorm``.

    A one-dimensional weight of upstream is a norm's; GroupNorm and LayerNorm2d are not exempt.
    """
    config = lib.finetuning()
    other_norms = re.compile(
        r"pixel_decoder\.norms|output_upscaling\.1\.|mask_downscaling\.[14]\.|"
        r"mask_downsampler\.encoder\.(1|4|7|10)\.|fuser\.layers\.\d\.norm\."
    )
    seen = set()
    for row in build_table(model_config.sam3()):
        for target in row.targets:
            path = target.split("[")[0]
            seen.add(path)
            layer_norm = path.endswith("/scale") and not other_norms.search(row.source)
            expected = "bias" not in row.source and not layer_norm
            assert lib.decays(config, path) == expected, (row.source, path)
    assert seen == set(paths)
    assert lib.decays(config, "segmentation/norm_1/scale")
    for pattern in lib.DECAYED_NORMS + lib.CONSTANTS + lib.TRACKER:
        assert any(re.search(pattern, path) for path in paths), pattern


def test_the_chain_is_torchs_adamw():
    """Three steps of clipped AdamW with the released groups, against torch."""
    config = lib.finetuning()
    config.schedule = lib.ScheduleConfig(warmup=2, cooldown=0, timescale=2)
    optimizer = lib.make_optimizer(config, depth=2, total=10)
    rng = np.random.default_rng(0)
    names = ("vision/trunk/block_0/attn/q/kernel", "text/norm/scale", "decoder/fc/bias")
    start = {name: rng.normal(size=3).astype(np.float32) for name in names}
    rates = (2.5e-5 * 0.81, 5e-6, 8e-5)
    decay = (0.1, 0.0, 0.0)
    theirs = {name: torch.nn.Parameter(torch.tensor(start[name])) for name in names}
    adam = torch.optim.AdamW(
        [
            {"params": [theirs[name]], "lr": rate, "weight_decay": wd}
            for name, rate, wd in zip(names, rates, decay, strict=True)
        ]
    )
    ours = jax.tree.map(jnp.asarray, start)
    state = optimizer.transform.init(ours)
    for step in range(3):
        grads = {name: rng.normal(size=3).astype(np.float32) for name in names}
        for name in names:
            theirs[name].grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip)
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * upstream_schedule(step, 10, 2, 0, 2)
        adam.step()
        updates, state = optimizer.transform.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name in names:
        moved = ours[name] - start[name]
        expected = theirs[name].detach().numpy() - start[name]
        # The change is read off float32 values near 1, whose steps are 6e-8.
        np.testing.assert_allclose(moved, expected, atol=2.5e-7)
        assert np.abs(expected).max() > 2e-6


def test_split_and_join():
    params = tiny_predictor.params()
    train, frozen = lib.split(params, lib.TRACKER + (r"/bias$",))
    assert "tracker" not in train
    assert set(train["vision"]) == {"trunk", "detector_neck"}
    assert set(frozen["decoder"]["norm"]) == {"bias"}
    assert jax.tree.structure(lib.join(train, frozen)) == jax.tree.structure(params)
    assert all(
        a is b
        for a, b in zip(
            jax.tree.leaves(lib.join(train, frozen)), jax.tree.leaves(params), strict=True
        )
    )


def test_state_covers_what_trains():
    params = {"decoder": {"fc": {"kernel": jnp.ones((2, 2))}}, "text": {"w": jnp.ones(3)}}
    config = dataclasses.replace(lib.finetuning(), freeze=("^text/",), ema=0.9)
    optimizer = lib.make_optimizer(config, depth=2, total=100)
    state = init_state(params, optimizer)
    assert set(state.ema) == {"decoder"} == set(state.opt_state[1].mu)
    averaged = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    exported = export_params(averaged, optimizer, ema=True)
    assert float(exported["decoder"]["fc"]["kernel"][0, 0]) == 2
    assert float(exported["text"]["w"][0]) == 1
    with pytest.raises(ValueError, match="no average"):
        export_params(state._replace(ema=None), optimizer, ema=True)
    nothing = lib.make_optimizer(dataclasses.replace(config, freeze=("",)), depth=2, total=100)
    with pytest.raises(ValueError, match="all parameters are frozen"):
        init_state(params, nothing)


# --- LoRA


def test_lora_merges_as_its_formula():
    params = tiny_predictor.params()
    patterns = (r"block_1/attn/(q|out)$", r"^geometry/box_pool$", r"^decoder/.*/fc1$")
    lora = add_lora(params, patterns, 3, jax.random.key(0))
    assert set(lora) == {"vision", "geometry", "decoder"}
    unchanged = merge(params, lora, 6.0)
    jax.tree.map(np.testing.assert_array_equal, unchanged, params)  # B is zero

    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), lora)
    merged = merge(params, lora, 6.0)
    changed = 0
    for (path, old), new in zip(
        jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(merged), strict=True
    ):
        node = lora
        for part in path:
            node = node.get(part.key, {})
        if node:
            product = (node["a"].astype(np.float64) @ node["b"]).reshape(old.shape)
            np.testing.assert_allclose(new, old + 2.0 * product, atol=1e-4)
            changed += 1
        else:
            assert new is old
    assert changed == 4
    # One row of heads and head sizes in, one vector out.
    assert lora["vision"]["trunk"]["block_1"]["attn"]["out"]["kernel"]["a"].shape == (48, 3)
    assert lora["vision"]["trunk"]["block_1"]["attn"]["q"]["kernel"]["b"].shape == (3, 48)


def test_lora_knows_linear_layers_from_convolutions(paths):
    """The converter's table knows: linear kinds, or convolutions that are none."""
    kinds = {t: row for row in build_table(model_config.sam3()) for t in row.targets}
    for path, shape in paths.items():
        if not path.endswith("/kernel"):
            continue
        axes = input_axes(path.removesuffix("/kernel"), shape)
        kind = kinds[path].kind
        if path == "geometry/box_pool/kernel":
            assert axes == 3
        elif kind == "conv":
            assert axes == 0, path
        else:
            assert axes == (1 if kind == "linear" else len(shape) - 1), path


def test_lora_that_finds_nothing():
    params = tiny_predictor.params()
    with pytest.raises(ValueError, match="'neck' finds no linear layer"):
        add_lora(params, ("neck",), 2, jax.random.key(0))  # only convolutions
    with pytest.raises(ValueError, match="rank 0"):
        add_lora(params, ("attn",), 0, jax.random.key(0))


# --- init_from


def test_init_from_a_backbone_and_from_everything():
    fresh = tiny_predictor.params()
    source = jax.tree.map(lambda x: x + 1, fresh)
    backbone = init_from(fresh, {"vision": source["vision"]}, ("vision/trunk/",))
    assert backbone["vision"]["trunk"]["pos_embed"] is not fresh["vision"]["trunk"]["pos_embed"]
    np.testing.assert_array_equal(
        backbone["vision"]["trunk"]["norm_pre"]["bias"],
        source["vision"]["trunk"]["norm_pre"]["bias"],
    )
    assert backbone["decoder"]["norm"]["bias"] is fresh["decoder"]["norm"]["bias"]
    neck = backbone["vision"]["detector_neck"]["level_0_up_0"]["bias"]
    assert neck is fresh["vision"]["detector_neck"]["level_0_up_0"]["bias"]
    jax.tree.map(np.testing.assert_array_equal, init_from(fresh, source), source)


def test_init_from_resizes_the_position_table():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 6, 5)).astype(np.float32)
    fresh = {"vision": {"trunk": {"pos_embed": np.zeros((4, 4, 5), np.float32)}}}
    out = init_from(fresh, {"vision": {"trunk": {"pos_embed": table}}})["vision"]["trunk"]
    expected = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None], size=(4, 4), mode="bicubic"
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(out["pos_embed"], expected, atol=1e-5)  # float32 weights


def test_init_from_names_what_does_not_fit():
    fresh = {"text": {"a": np.zeros(2), "b": np.zeros(3)}, "decoder": {"c": np.zeros(1)}}
    with pytest.raises(
        ValueError, match="the source lacks decoder/c, text/b; the model lacks text/d"
    ):
        init_from(fresh, {"text": {"a": np.zeros(2), "d": np.zeros(1)}})
    with pytest.raises(ValueError, match=r"text/a is \(5,\) in the source, \(2,\) in the model"):
        init_from(fresh, {"text": {"a": np.zeros(5), "b": np.zeros(3)}}, ("text/",))
    with pytest.raises(ValueError, match="no parameter starts with 'visoin/'"):
        init_from(fresh, fresh, ("visoin/",))


def test_one_part_begins_as_another():
    neck = {"a": np.ones(2), "b": {"c": np.full(3, 2.0)}}
    other = {"a": np.zeros(2), "b": {"c": np.zeros(3)}}
    params = {"vision": {"neck": neck, "other": other}, "text": {"a": np.zeros(2)}}
    out = copy_within(params, [("vision/other/", "vision/neck/")])
    jax.tree.map(np.testing.assert_array_equal, out["vision"]["other"], neck)
    assert out["vision"]["other"]["a"] is not out["vision"]["neck"]["a"]
    assert out["vision"]["neck"]["a"] is neck["a"]
    assert out["text"]["a"] is params["text"]["a"]
    assert copy_within(params, ())["vision"]["other"]["a"] is other["a"]
    for pair in (("vision/other/", "vision/nekc/"), ("nothing/", "no/"), ("text/", "vision/neck/")):
        with pytest.raises(ValueError, match=f"'{pair[0]}' and '{pair[1]}' must be prefixes"):
            copy_within(params, [pair])


def test_parts_begin_larger():
    """Every pattern counts; what none matches is the same array."""
    params = {"head": {"q": np.ones(2), "k": np.full(2, 3.0)}, "trunk": np.ones(3)}
    out = scale_within(params, [("^head/", 2.0), ("q$", 5.0)])
    np.testing.assert_array_equal(out["head"]["q"], [10, 10])
    np.testing.assert_array_equal(out["head"]["k"], [6, 6])
    assert out["trunk"] is params["trunk"]
    with pytest.raises(ValueError, match=r"no parameter's path matches '\^tail/'"):
        scale_within(params, [("^tail/", 2.0)])


def test_parts_begin_with_a_constant():
    """The last pattern wins; shapes and dtypes stay."""
    params = {"head": {"q": np.ones(2, np.float16), "k": np.full(2, np.nan)}, "trunk": np.ones(3)}
    out = fill_within(params, [("^head/", 2.0), ("q$", 5.0)])
    np.testing.assert_array_equal(out["head"]["q"], np.full(2, 5, np.float16))
    assert out["head"]["q"].dtype == np.float16
    np.testing.assert_array_equal(out["head"]["k"], [2, 2])
    assert out["trunk"] is params["trunk"]
    with pytest.raises(ValueError, match=r"fill_within: no parameter's path matches '\^tail/'"):
        fill_within(params, [("^tail/", 2.0)])
