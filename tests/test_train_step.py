"""The training step on a toy model: it learns, and what it must leave alone stays as it was."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_predictor
from parity import assert_close
from sam3_jax import sharding
from sam3_jax.config import ModelConfig
from sam3_jax.models.detector import Sam3, empty_geometry
from sam3_jax.training import optimizer as optimizers
from sam3_jax.training.batch import Clicks, TrainBatch, micro_batches, normalize
from sam3_jax.training.clicks import ClickConfig, click_loss
from sam3_jax.training.contrast import ContrastConfig, contrast_losses
from sam3_jax.training.criterion import detection_loss
from sam3_jax.training.lora import add_lora, merge
from sam3_jax.training.optimizer import Optimizer
from sam3_jax.training.state import TrainState, export_params, init_state
from sam3_jax.training.step import StepConfig, forward, make_train_step, unused_parameters
from sam3_jax.training.targets import LossConfig, Targets

IMAGES, SLOTS, SIDE, MASK = 4, 2, 112, 28
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile


def model_config(dropout: float = 0.0) -> ModelConfig:
    config = tiny_predictor.config()
    config.vision.drop_path = dropout
    for part in (config.geometry, config.fusion, config.decoder, config.scoring):
        part.dropout = dropout
    return config


def make_optimizer(*, freeze: tuple[str, ...] = (), ema: float = 0.0) -> Optimizer:
    """Fast enough to overfit in few steps; the trunk is slower, or it ends up in chaos."""
    config = optimizers.OptimizerConfig(
        rate_scale=1.0,
        schedule=optimizers.ScheduleConfig("cosine", warmup=0),
        freeze=(*optimizers.TRACKER, *freeze),
        ema=ema,
    )
    config.vision.rate, config.rest.rate = 1e-4, 2e-3
    return optimizers.make_optimizer(config, depth=2, total=1000)


def make_batch(images: int = IMAGES, prompts: int = 1) -> TrainBatch:
    """Two bright rectangles in every image, each with its mask; the first is an exemplar."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (images, SIDE, SIDE, 3)).astype(np.uint8)
    rows = images * prompts
    low = rng.uniform(0.1, 0.5, (rows, SLOTS, 2))
    high = low + rng.uniform(0.2, 0.4, low.shape)
    boxes = np.concatenate([(low + high) / 2, high - low], -1).astype(np.float32)
    masks = np.zeros((rows, SLOTS, MASK, MASK), bool)
    for row, slot in np.ndindex(rows, SLOTS):
        for canvas, value in ((masks[row, slot], True), (pixels[row // prompts], 200)):
            (x0, y0), (x1, y1) = (np.int32(p[row, slot] * len(canvas)) for p in (low, high))
            canvas[y0:y1, x0:x1] = value
    yes = np.ones((rows, SLOTS), bool)
    targets = Targets(boxes, yes, masks, yes, masks.any(1), yes[:, 0], yes[:, 0])
    tokens = rng.integers(300, 40000, (rows, 32)).astype(np.int32)
    geometry = empty_geometry(rows, boxes=1)._replace(
        boxes=boxes[:, :1], box_labels=np.ones((rows, 1), np.int32), box_mask=yes[:, :1]
    )
    # The first object of each image, by a point in its middle.
    first = slice(None, None, prompts)
    points = np.zeros((images, 1, 2, 2), np.float32)
    points[:, 0, 0] = boxes[first, 0, :2] * SIDE
    labels = np.tile(np.int32([1, -2]), (images, 1, 1))
    clicks = Clicks(points, labels, masks[first, :1], yes[first, :1])
    return jax.tree.map(jnp.asarray, TrainBatch(pixels, tokens, geometry, targets, clicks))


def host(tree):
    """A copy that donation cannot take away."""
    return jax.tree.map(np.array, tree)


def by_path(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {optimizers.path_of(path): np.asarray(leaf) for path, leaf in leaves}


def compiled(state: TrainState, batch: TrainBatch, **options):
    """The step in float32, compiled quickly."""
    optimizer, config = options.pop("optimizer"), options.pop("config", StepConfig("float32"))
    model = options.pop("model", model_config())
    loss = options.pop("loss", LossConfig())
    step = make_train_step(model, loss, optimizer, config, **options)
    return step.lower(state, batch).compile(QUICK)


class Single:
    """One device, nothing but text and tracker frozen."""

    def __init__(self) -> None:
        self.batch = make_batch()
        self.optimizer = make_optimizer(freeze=(r"^text/",), ema=0.9)
        self.step = compiled(self.fresh(), self.batch, optimizer=self.optimizer)

    def fresh(self) -> TrainState:
        return init_state(tiny_predictor.params(), self.optimizer)

    def run(self, state: TrainState, count: int):
        """The state, and the metrics of every step."""
        history = []
        for _ in range(count):
            state, metrics = self.step(state, self.batch)
            history.append({name: float(value) for name, value in metrics.items()})
        return state, history


@pytest.fixture(scope="module")
def single() -> Single:
    return Single()


@pytest.fixture(scope="module")
def trained(single):
    return single.run(single.fresh(), 100)


def one_to_one(metrics: dict[str, float]) -> float:
    """The weighted loss of what answers at inference."""
    weights = {"class": 20, "presence": 20, "box": 5, "giou": 2, "mask": 200, "dice": 10}
    weights |= {"semantic": 20, "semantic_dice": 30}
    return sum(weight * metrics[name] for name, weight in weights.items())


def assert_same_gradients(state: TrainState, expected: TrainState) -> None:
    """Of what trained, read off Adam's first moments: its updates would magnify rounding."""
    ours, theirs = by_path(state.opt_state[1].mu), by_path(expected.opt_state[1].mu)
    spread = max(np.abs(value).max() for value in theirs.values())
    for path, value in theirs.items():
        assert_close(ours[path], value, 1e-4, path, spread=spread)


def test_overfits_one_batch(trained):
    state, history = trained
    first, last = history[0], history[-1]
    # Not so the one-to-many queries' loss: the better the boxes, the more of them are matched.
    assert one_to_one(last) < 0.2 * one_to_one(first)
    for name in ("box", "presence", "mask", "dice", "semantic"):
        assert last[name] < 0.2 * first[name], name
    assert int(state.step) == 100
    assert int(state.skipped) == 0


def test_frozen_paths_do_not_move(trained):
    before, after = by_path(tiny_predictor.params()), by_path(trained[0].params)
    frozen = re.compile(r"^(text|tracker|vision/tracker_neck)/")
    # Nothing was pointed at: only weight decay reaches these (biases: nothing does).
    untouched = re.compile(r"^geometry/point_\w+/bias")
    for path, value in before.items():
        same = np.array_equal(value, after[path])
        assert same == bool(frozen.search(path) or untouched.search(path)), path
    averages = by_path(trained[0].ema)
    assert set(averages) == {path for path in before if not frozen.search(path)}
    name = "decoder/query_embed/embedding"
    assert 0 < np.abs(averages[name] - after[name]).max() < np.abs(before[name] - after[name]).max()


def test_steps_that_are_not_finite_are_skipped(single):
    state, _ = single.run(single.fresh(), 1)
    before = host(state)
    boxes = single.batch.targets.boxes.at[0, 0, 0].set(jnp.nan)
    bad = single.batch._replace(targets=single.batch.targets._replace(boxes=boxes))
    for count in (1, 2):
        state, metrics = single.step(state, bad)
        assert not np.isfinite(metrics["loss"])
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == count
    after = host(state)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert int(after.step) == 3
    state, metrics = single.step(state, single.batch)
    assert np.isfinite(metrics["loss"])
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 0)
    moved = host(state.params["decoder"]["norm"]["scale"])
    assert not np.array_equal(moved, before.params["decoder"]["norm"]["scale"])


@pytest.mark.slow
def test_four_devices_equal_one(single, monkeypatch):
    """With equal blocks as loops, as on TPUs: the one device has them written out."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1024)
    model = model_config()
    model.vision.scan = model.text.scan = model.fusion.scan = True
    mesh = sharding.make_mesh(2, fsdp=2, devices=jax.devices()[:4])
    state = init_state(tiny_predictor.params(), single.optimizer, mesh=mesh)
    batch = jax.device_put(single.batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = compiled(state, batch, optimizer=single.optimizer, model=model)
        for _ in range(2):
            state, metrics = step(state, batch)
    expected, history = single.run(single.fresh(), 2)
    # Sums over the batch and over halves of matrices in another order.
    assert float(metrics["loss"]) == pytest.approx(history[-1]["loss"], rel=1e-5)
    moments = state.opt_state[1].mu["decoder"]["layer_0"]["ffn"]["fc1"]["kernel"]
    assert moments.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert state.params["vision"]["trunk"]["block_0"]["mlp"]["fc1"]["kernel"].sharding.spec[1]
    assert_same_gradients(state, expected)


@pytest.mark.slow
def test_micro_batches_equal_one_batch(single, monkeypatch):
    """On two devices. Every half has as many targets, so its own normalisation is the whole's."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1024)
    mesh = sharding.make_mesh(1, fsdp=2, devices=jax.devices()[:2])
    config = StepConfig("float32", accumulate=2)
    batch = jax.device_put(single.batch, sharding.batch_sharding(mesh))
    state = init_state(tiny_predictor.params(), single.optimizer, mesh=mesh)
    with jax.set_mesh(mesh):
        step = compiled(state, batch, optimizer=single.optimizer, config=config)
        state, metrics = step(state, batch)
    expected, history = single.run(single.fresh(), 1)
    assert float(metrics["loss"]) == pytest.approx(history[0]["loss"], rel=1e-5)
    assert_same_gradients(state, expected)


def test_micro_batches_take_every_other_image():
    batch = make_batch(images=4, prompts=2)
    cut = micro_batches(batch, 2)
    np.testing.assert_array_equal(cut.images[1], batch.images[1::2])
    np.testing.assert_array_equal(cut.tokens[1], batch.tokens[jnp.array([2, 3, 6, 7])])
    assert cut.targets.masks.shape == (2, 4, SLOTS, MASK, MASK)
    with pytest.raises(ValueError, match="4 images cannot be cut into 3"):
        micro_batches(batch, 3)
    with pytest.raises(ValueError, match="4 images has 7 prompts"):
        micro_batches(batch._replace(tokens=batch.tokens[:7]), 2)


@pytest.mark.slow
def test_lora_alone_trains():
    """In bfloat16, with dropout and two prompts an image."""
    optimizer, batch, params = make_optimizer(), make_batch(2, 2), tiny_predictor.params()
    lora = add_lora(params, (r"^(vision/trunk|decoder)/.*attn/[qv]$",), 4, jax.random.key(0))
    start = host(lora)
    state = init_state(params, optimizer, lora=lora)
    step = compiled(
        state,
        batch,
        optimizer=optimizer,
        config=StepConfig(),
        model=model_config(dropout=0.1),
        loss=LossConfig(masks=False, semantic=False),
        alpha=8.0,
    )
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, host(state.params), params)
    for path, value in by_path(start).items():
        assert not np.array_equal(by_path(state.lora)[path], value), path
    exported = export_params(state, optimizer, alpha=8.0)
    merged = merge(params, host(state.lora), 8.0)
    jax.tree.map(np.testing.assert_array_equal, host(exported), host(merged))
    kernel = ("vision", "trunk", "block_0", "attn", "q", "kernel")
    a, b = exported, params
    for name in kernel:
        a, b = a[name], b[name]
    assert not np.array_equal(a, b)


def test_what_a_loss_does_not_reach_must_be_frozen():
    optimizer, batch = make_optimizer(), make_batch(1)
    unused = unused_parameters(LossConfig(masks=False, semantic=False), ClickConfig())
    assert unused[-2:] == ("^segmentation/", "^vision/detector_neck/level_[01]_")
    for loss, path in (
        (LossConfig(masks=False, semantic=False), "segmentation/conv_0/bias"),
        (LossConfig(masks=False), "segmentation/instance/bias"),
        (LossConfig(semantic=False), "segmentation/semantic/bias"),
    ):
        step = make_train_step(model_config(), loss, optimizer, StepConfig())
        state = jax.eval_shape(lambda: init_state(tiny_predictor.params(), optimizer))
        with pytest.raises(ValueError, match=f"{path} would train, but the loss"):
            step.lower(state, batch)


def test_the_interactive_head_alone():
    """Its loss is that of sessions on the image model as it is, which neither runs nor moves."""
    model, clicks = model_config(), ClickConfig(weight=2.0, alone=True, corrections=0)
    frozen = unused_parameters(LossConfig(), clicks)
    settings = optimizers.OptimizerConfig(freeze=frozen, rate_scale=1.0)
    settings.schedule = optimizers.ScheduleConfig("cosine", warmup=0)
    optimizer = optimizers.make_optimizer(settings, depth=2, total=1000)
    batch, before = make_batch(2), tiny_predictor.params()
    state = init_state(tiny_predictor.params(), optimizer)
    step = compiled(state, batch, optimizer=optimizer, clicks=clicks)
    state, metrics = step(state, batch)

    module = Sam3(model)

    def session(params: dict, batch: TrainBatch) -> tuple[jax.Array, dict]:
        levels = module.apply({"params": params}, normalize(batch.images), method="encode_image")

        def click(prompt):
            return module.apply({"params": params}, levels.tracker, prompt, None, method="click")

        key = jax.random.key(0)  # there is nothing to draw
        return click_loss(click, batch.clicks, clicks, key, frame=SIDE, mask_side=4 * SIDE // 14)

    expected, terms = jax.jit(session).lower(before, batch).compile(QUICK)(before, batch)
    # float32, compiled as other programs.
    np.testing.assert_allclose(metrics["loss"], 2.0 * expected, rtol=1e-4)
    for name, value in terms.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert not {"class", "presence", "mask"} & set(metrics)
    after = by_path(state.params)
    moved = {path for path, value in by_path(before).items() if (value != after[path]).any()}
    assert any(path.startswith("tracker/mask_decoder/") for path in moved)
    assert any(path.startswith("vision/tracker_neck/") for path in moved)
    assert not any(re.search(pattern, path) for path in moved for pattern in frozen)


@pytest.mark.slow
def test_contrast_beside_the_detector():
    """Its losses are added, of the prompts without boxes."""
    optimizer, batch = make_optimizer(), make_batch(2, prompts=2)
    drawn = jnp.array([[True], [False], [False], [True]])
    batch = batch._replace(geometry=batch.geometry._replace(box_mask=drawn))
    contrast = ContrastConfig(along=3.0, regions=2.0)
    state = init_state(tiny_predictor.params(), optimizer)
    step = compiled(state, batch, optimizer=optimizer, contrast=contrast)
    _, metrics = step(state, batch)
    module, key = Sam3(model_config()), jax.random.key(0)  # there is nothing to draw

    def losses(params: dict, batch: TrainBatch) -> tuple[jax.Array, jax.Array, dict]:
        got = forward(module, params, batch, key)
        alone, _ = detection_loss(got.detector, batch.targets, LossConfig(), replicas=2)
        targets = batch.targets._replace(prompt_valid=~drawn[:, 0])
        more, terms = contrast_losses(got.levels, got.text, batch.tokens, targets, contrast)
        return alone, more, terms

    params = tiny_predictor.params()
    alone, more, terms = jax.jit(losses).lower(params, batch).compile(QUICK)(params, batch)
    # float32, compiled as other programs.
    assert float(metrics["loss"]) == pytest.approx(float(alone + 3.0 * more), rel=1e-5)
    assert float(3.0 * more) > 1e-3 * float(alone)
    for name, value in terms.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4), name
