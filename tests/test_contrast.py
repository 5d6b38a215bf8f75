"""The contrast of objects with phrases: its loss against torch's, its step and its run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tiny_predictor
import tiny_run
from sam3_jax import checkpoint
from sam3_jax.checkpoint.tree import flatten
from sam3_jax.models.detector import empty_geometry
from sam3_jax.trainer.loop import train
from sam3_jax.trainer.start import RunError
from sam3_jax.trainer.tasks import task_of
from sam3_jax.training import optimizer as optimizers
from sam3_jax.training.batch import Clicks, TrainBatch
from sam3_jax.training.contrast import (
    ContrastConfig,
    contrast_loss,
    region_loss,
    unused_by_contrast,
)
from sam3_jax.training.contrast_step import make_contrast_step
from sam3_jax.training.state import TrainState, init_state
from sam3_jax.training.step import Step, StepConfig
from sam3_jax.training.targets import Targets
from sam3_jax.types import TextFeatures

IMAGES, PROMPTS, SLOTS, DIM = 2, 4, 2, 8


def made_up() -> dict:
    """Two images with two prompts each; prompt 3 says what prompt 0 says."""
    rng = np.random.default_rng(0)
    masks = np.zeros((PROMPTS, SLOTS, 8, 8), bool)
    for mask in masks.reshape(-1, 8, 8):
        row, column = rng.integers(0, 3, 2) * 2
        mask[row : row + 4, column : column + 3] = True
    valid = np.array([[1, 1], [1, 0], [1, 1], [1, 0]], bool)
    yes = np.ones(PROMPTS, bool)
    boxes = np.zeros((PROMPTS, SLOTS, 4), np.float32)
    return {
        "maps": rng.standard_normal((IMAGES, 4, 4, DIM)).astype(np.float32),
        "text": rng.standard_normal((PROMPTS, 3, DIM)).astype(np.float32),
        "tokens": np.array([[5, 6, 0], [5, 7, 8], [9, 0, 0], [5, 6, 0]], np.int32),
        "targets": Targets(boxes, valid, masks, valid, masks.any(1), yes, yes),
    }


def ours(case: dict) -> tuple[float, dict]:
    tokens, targets = jnp.asarray(case["tokens"]), jax.tree.map(jnp.asarray, case["targets"])
    text = TextFeatures(jnp.asarray(case["text"]), tokens != 0)
    config = ContrastConfig(temperature=0.2)
    loss, metrics = contrast_loss(jnp.asarray(case["maps"]), text, tokens, targets, config)
    return float(loss), {name: float(value) for name, value in metrics.items()}


def by_torch(case: dict) -> tuple[float, float]:
    """Object by object, with torch's pooling, cosine and cross entropy."""
    functional, targets, losses, named = torch.nn.functional, case["targets"], [], []
    spoken = case["tokens"] != 0
    phrases = [torch.tensor(t[m].mean(0)) for t, m in zip(case["text"], spoken, strict=True)]
    for prompt, slot in np.argwhere(targets.valid & targets.prompt_valid[:, None]):
        mask = torch.tensor(targets.masks[prompt, slot]).float()
        cover = functional.interpolate(mask[None, None], (4, 4), mode="bilinear", antialias=True)[
            0, 0
        ]
        if not cover.any():
            continue
        maps = torch.tensor(case["maps"][prompt // (PROMPTS // IMAGES)])
        pooled = (cover[..., None] * maps).sum((0, 1)) / cover.sum()
        kept = [
            q
            for q in range(PROMPTS)
            if q == prompt
            or (targets.prompt_valid[q] and (case["tokens"][q] != case["tokens"][prompt]).any())
        ]
        logits = torch.stack(
            [functional.cosine_similarity(pooled, phrases[q], dim=0) / 0.2 for q in kept]
        )
        label = torch.tensor(kept.index(prompt))
        losses.append(functional.cross_entropy(logits, label).item())
        named.append(bool(logits.argmax() == label))
    return float(np.mean(losses)), float(np.mean(named))


@pytest.mark.parametrize("change", ["", "filler", "nothing under a mask"])
def test_the_loss(change: str):
    case = made_up()
    targets = case["targets"]
    if change == "filler":
        case["targets"] = targets._replace(prompt_valid=np.array([1, 1, 0, 1], bool))
    if change == "nothing under a mask":
        targets.masks[0, 0] = False
    loss, metrics = ours(case)
    expected, named = by_torch(case)
    # Cosines of float32, divided by .2.
    assert loss == pytest.approx(expected, abs=1e-5)
    assert metrics == {"contrast": loss, "named": pytest.approx(named)}


def test_a_batch_without_objects_has_no_loss():
    case = made_up()
    case["targets"] = case["targets"]._replace(valid=np.zeros((PROMPTS, SLOTS), bool))
    assert ours(case) == (0.0, {"contrast": 0.0, "named": 0.0})


@pytest.mark.parametrize("filler", [False, True])
def test_the_loss_of_regions(filler: bool):
    """Prompt by prompt, with torch's cosine, resize and losses; prompt 2 names nothing."""
    case, config = made_up(), ContrastConfig(temperature=0.2, margin=0.3, alpha=0.7)
    targets = case["targets"]
    targets.semantic[2] = False
    if filler:
        targets = targets._replace(prompt_valid=np.array([1, 1, 1, 0], bool))
    spoken = case["tokens"] != 0
    text = TextFeatures(jnp.asarray(case["text"]), jnp.asarray(spoken))
    loss, metrics = region_loss(
        jnp.asarray(case["maps"]), text, jax.tree.map(jnp.asarray, targets), config
    )

    functional, focal, dice = torch.nn.functional, [], []
    for prompt in np.flatnonzero(targets.prompt_valid):
        phrase = torch.tensor(case["text"][prompt][spoken[prompt]].mean(0))
        maps = torch.tensor(case["maps"][prompt // (PROMPTS // IMAGES)])
        cosine = functional.cosine_similarity(maps, phrase[None, None], dim=-1)
        size = targets.semantic.shape[1:]
        cosine = functional.interpolate(cosine[None, None], size, mode="bilinear")[0, 0]
        logits, goal = (cosine - 0.3) / 0.2, torch.tensor(targets.semantic[prompt]).float()
        p = logits.sigmoid()
        right = torch.where(goal > 0, p, 1 - p)
        share = torch.where(goal > 0, torch.tensor(0.7), torch.tensor(0.3))
        focal.append((-share * (1 - right) ** 2 * right.log()).mean().item())
        if goal.any():
            dice.append((1 - (2 * (p * goal).sum() + 1) / (p.sum() + goal.sum() + 1)).item())
    assert len(dice) == len(focal) - 1
    # Sums of float32 over 64 pixels.
    assert float(loss) == pytest.approx(0.4 * np.mean(focal) + 0.6 * np.mean(dice), rel=1e-5)
    assert metrics == {"regions": loss}


def step_and_state(
    contrast: ContrastConfig | None = None, freeze: tuple[str, ...] | None = None
) -> tuple[Step, TrainState]:
    contrast = contrast or ContrastConfig()
    freeze = unused_by_contrast(contrast) if freeze is None else freeze
    optimizer = optimizers.make_optimizer(
        optimizers.OptimizerConfig(freeze=freeze), depth=2, total=100
    )
    model = tiny_predictor.config()
    step = make_contrast_step(model, contrast, optimizer, StepConfig("float32"))
    return step, init_state(tiny_predictor.params(), optimizer)


def test_what_cannot_be_contrasted():
    case = made_up()
    step, state = step_and_state()
    pixels = jnp.zeros((IMAGES, 112, 112, 3), jnp.uint8)
    no_clicks = Clicks(
        jnp.zeros((IMAGES, 0, 2, 2)),
        jnp.zeros((IMAGES, 0, 2), jnp.int32),
        jnp.zeros((IMAGES, 0, 0, 0), bool),
        jnp.zeros((IMAGES, 0), bool),
    )
    targets = jax.tree.map(jnp.asarray, case["targets"])
    tokens = jnp.asarray(case["tokens"])
    batch = TrainBatch(pixels, tokens, empty_geometry(PROMPTS), targets, no_clicks)
    with pytest.raises(ValueError, match="no use for LoRA"):
        step(state._replace(lora={}), batch)
    none = batch.targets._replace(masks=jnp.zeros((*batch.targets.valid.shape, 0, 0), bool))
    with pytest.raises(ValueError, match=r"give data\.example\.mask_size"):
        step(state, batch._replace(targets=none))
    freeze = (r"^(?!vision/trunk/|vision/d|text/)",)
    for contrast, level in ((ContrastConfig(), 0), (ContrastConfig(regions=1.0), 1)):
        step, state = step_and_state(contrast, freeze)
        with pytest.raises(ValueError, match=rf"detector_neck/level_{level}.*would train"):
            step(state, batch)
    config = tiny_run.get_config()
    config.task, config.data.example.mask_size = "contrast", 0
    with pytest.raises(RunError, match=r"give data\.example\.mask_size"):
        task_of(config)
    config.task, config.contrast.along = "pictures", 1.0
    with pytest.raises(RunError, match=r"contrast\.along.*give data\.example\.mask_size"):
        task_of(config)


@pytest.mark.parametrize("regions", [0.0, 1.0])
def test_a_run_learns_words_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regions: float):
    """Trunk and text encoder move, nothing else does, and what was learned is in the checkpoint."""
    # The mesh of tests has eight devices, and the run is one of a single device.
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    config = tiny_run.get_config()
    config.task, config.steps, config.clicks.weight = "contrast", 12, 0.0
    config.contrast.regions = regions
    config.data.example.clicks = 0
    config.data.example.sampling = dataclasses.replace(
        config.data.example.sampling, boxes=0.0, negatives=0.0
    )
    config.optimizer.freeze, config.optimizer.rate_scale = (r"^text/token_embed/",), 1.0
    config.optimizer.vision.rate = config.optimizer.text.rate = 3e-4
    config.init.checkpoint = str(tiny_run.write_checkpoint(tmp_path / "start"))
    config.train.annotations = str(tiny_run.write_data(tmp_path / "data"))
    config.output = str(tmp_path / "run")
    train(config)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    falls = {"contrast": 0.8, "regions": 0.95} if regions else {"contrast": 0.8}
    for name, factor in falls.items():
        losses = [entry[name] for entry in log if entry["kind"] == "train"]
        assert len(losses) == config.steps
        assert np.mean(losses[-3:]) < factor * np.mean(losses[:3])

    before, after = (
        flatten(checkpoint.load(tmp_path / name).params) for name in ("start", "run/model")
    )
    moved = {path for path in before if (np.asarray(before[path]) != np.asarray(after[path])).any()}
    assert any(path.startswith("vision/trunk/") for path in moved)
    assert any(path.startswith("text/block_0/") for path in moved)
    for path in moved:
        assert not any(re.search(p, path) for p in unused_by_contrast(config.contrast)), path
    assert any("level_0" in path for path in moved) == bool(regions)
    assert "text/token_embed/embedding" not in moved
