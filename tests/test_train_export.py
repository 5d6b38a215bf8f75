"""What was trained is what is found: training's forward, the predictor's and torch's agree."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import data_sets
import oracle
import tiny_predictor
from parity import TINY, assert_close
from sam3_jax import checkpoint
from sam3_jax.config import ModelConfig
from sam3_jax.convert.export import write_hf
from sam3_jax.data.augment import plain
from sam3_jax.data.batch import collate
from sam3_jax.data.builder import Source, prepare
from sam3_jax.data.examples import Example, ExampleConfig, draw_example
from sam3_jax.data.images import to_model_input
from sam3_jax.data.sampling import SamplingConfig
from sam3_jax.data.source import open_split
from sam3_jax.inference.programs import RawOutput
from sam3_jax.models.detector import Sam3
from sam3_jax.training import lora as lora_lib
from sam3_jax.training import optimizer as optimizers
from sam3_jax.training.batch import TrainBatch
from sam3_jax.training.optimizer import Optimizer
from sam3_jax.training.state import TrainState, export_params, init_state
from sam3_jax.training.step import StepConfig, forward, make_train_step
from sam3_jax.training.targets import LossConfig

SIDE, PROMPTS, EXEMPLARS = 112, 4, 2
CAT, CATS = "cat.png", ((20, 10, 80, 80), (100, 40, 130, 80))  # (x0, y0, x1, y1) in its pixels
ALPHA = 8.0
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile


class Data(NamedTuple):
    """Pictures in a folder, two examples of them, and these as a batch."""

    folder: Path
    examples: tuple[Example, Example]  # of phrases; of a phrase with boxes
    batch: TrainBatch


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("photos")
    data_sets.write_pictures(folder)
    file = data_sets.write_json(folder / "coco.json", data_sets.coco())
    source = open_split(prepare({"train": Source(file)}, folder / "out", "small"), "train")
    rng = np.random.default_rng(0)
    config = ExampleConfig(SamplingConfig(PROMPTS), plain(SIDE), mask_size=28)
    phrases = draw_example(source, find(source, "cup.jpg"), config, rng)
    boxes = SamplingConfig(PROMPTS, 0.0, boxes=1.0, max_exemplars=EXEMPLARS, box_noise=0.0)
    config = ExampleConfig(boxes, plain(SIDE), mask_size=28)
    for _ in range(30):  # until both cats are exemplars
        shown = draw_example(source, find(source, CAT), config, rng)
        cats = [prompt for prompt in shown.prompts if len(prompt.exemplars) == len(CATS)]
        if cats:
            break
    shown = shown._replace(prompts=tuple(cats))
    examples = phrases, shown
    batch = collate(examples, prompts=PROMPTS, exemplars=EXEMPLARS, buckets=(4,))
    return Data(folder, examples, batch)


def find(source, name: str) -> int:
    return next(i for i in range(len(source)) if source[i].picture.file_name == name)


def model_config() -> ModelConfig:
    """The toy model without dropout and drop path."""
    model = tiny_predictor.config()
    model.vision.drop_path = 0.0
    for part in (model.geometry, model.fusion, model.decoder, model.scoring):
        part.dropout = 0.0
    return model


@pytest.fixture(scope="module")
def training_forward():
    module, key = Sam3(model_config(), jnp.float32), jax.random.key(0)
    return jax.jit(lambda params, batch: forward(module, params, batch, key).detector)


def first_queries(out, row: int) -> RawOutput:
    """Of one prompt what answers at inference, without the one-to-many queries."""
    fields = {name: np.asarray(getattr(out, name)[row]) for name in RawOutput._fields}
    queries = tiny_predictor.config().decoder.num_queries
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        fields[name] = fields[name][:queries]
    return RawOutput(**fields)


def assert_same(actual: RawOutput, expected: RawOutput) -> None:
    """The same arithmetic in another order; the pixels differ in their last bit."""
    for name in ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg"):
        assert_close(getattr(actual, name), getattr(expected, name), TINY, name)
    spread = np.ptp(expected.pred_logits)
    np.testing.assert_allclose(
        actual.presence_logits, expected.presence_logits, atol=TINY * max(spread, 1)
    )


def test_training_finds_what_inference_finds(data, training_forward):
    """Phrases that are there and that are not, fillers beside them, exemplar boxes."""
    out = training_forward(tiny_predictor.params(), data.batch)
    assert out.pred_masks.shape[1] == 2 * tiny_predictor.config().decoder.num_queries
    predictor = tiny_predictor.predictor()
    phrases, shown = data.examples
    assert 0 < sum(len(prompt.boxes) > 0 for prompt in phrases.prompts) < PROMPTS
    predictor.set_image(data.folder / "cup.jpg")
    found = predictor.predict_raw([prompt.phrase for prompt in phrases.prompts])
    for row, raw in enumerate(found):
        assert_same(first_queries(out, row), raw)

    assert [prompt.phrase for prompt in shown.prompts] == ["cat"]
    predictor.set_image(data.folder / CAT)
    raw = predictor.predict_raw("cat", boxes=CATS)
    assert_same(first_queries(out, PROMPTS), raw)
    # Not by chance: the boxes count.
    hidden = data.batch.geometry._replace(box_mask=np.zeros_like(data.batch.geometry.box_mask))
    out = training_forward(tiny_predictor.params(), data.batch._replace(geometry=hidden))
    assert np.abs(first_queries(out, PROMPTS).pred_logits - raw.pred_logits).max() > 0.01


def optimizer(*freeze: str) -> Optimizer:
    config = optimizers.OptimizerConfig(
        rate_scale=1.0,
        schedule=optimizers.ScheduleConfig("cosine", warmup=0),
        freeze=(*optimizers.TRACKER, *freeze),
    )
    return optimizers.make_optimizer(config, depth=2, total=100)


def train(state: TrainState, batch: TrainBatch, using: Optimizer, loss: LossConfig) -> TrainState:
    """Two steps."""
    config = StepConfig("float32", "device")
    step = make_train_step(model_config(), loss, using, config, alpha=ALPHA)
    step = step.lower(state, batch).compile(QUICK)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert int(state.skipped) == 0
    assert np.isfinite(metrics["loss"])
    return state


def assert_torch_agrees(data: Data, training_forward, params: dict, folder: Path) -> None:
    """Checkpoint, transformers' folder, its model: the outputs of the training forward."""
    model = model_config()
    checkpoint.save(folder / "ckpt", params, model)
    loaded = checkpoint.load(folder / "ckpt")
    write_hf(folder / "hf", loaded.params, {}, loaded.config, "Sam3Model")
    torch_model = transformers.Sam3Model.from_pretrained(folder / "hf").eval()
    pixels = to_model_input(data.examples[0].image, (SIDE, SIDE))
    tokens = data.batch.tokens[:PROMPTS]
    expected = oracle.run_detector(
        torch_model, pixels[None], tokens, image_ids=np.zeros(PROMPTS, np.int64)
    )
    out = training_forward(params, data.batch)
    before = training_forward(tiny_predictor.params(), data.batch)
    for row in range(PROMPTS):
        wanted = RawOutput(*(expected[name][row] for name in RawOutput._fields))
        assert_same(first_queries(out, row), wanted)
        moved = np.abs(first_queries(before, row).pred_logits - wanted.pred_logits).max()
        assert moved > 100 * TINY * np.ptp(wanted.pred_logits)  # training did something


def with_lora(using: Optimizer, *, trained: bool) -> TrainState:
    """Of LoRA's two factors the second is zero until it has been trained; here maybe random."""
    params, key = tiny_predictor.params(), jax.random.key(1)
    lora = lora_lib.add_lora(params, (r"^(vision/trunk|decoder)/.*attn/[qv]$",), 4, key)
    if trained:
        lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), lora)
    return init_state(params, using, lora=lora)


def test_lora_back_to_torch(data, training_forward, tmp_path):
    using = optimizer()
    exported = export_params(with_lora(using, trained=True), using, alpha=ALPHA)
    assert_torch_agrees(data, training_forward, exported, tmp_path)


@pytest.mark.slow
def test_steps_of_lora_back_to_torch(data, training_forward, tmp_path):
    using, loss = optimizer(), LossConfig(masks=False, semantic=False)
    state = train(with_lora(using, trained=False), data.batch, using, loss)
    exported = export_params(state, using, alpha=ALPHA)
    assert_torch_agrees(data, training_forward, exported, tmp_path)


@pytest.mark.slow
def test_steps_of_all_parameters_back_to_torch(data, training_forward, tmp_path):
    using = optimizer(r"^text/")
    state = train(init_state(tiny_predictor.params(), using), data.batch, using, LossConfig())
    exported = export_params(state, using)
    assert_torch_agrees(data, training_forward, exported, tmp_path)
