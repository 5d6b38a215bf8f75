"""Batches: fixed shapes, reproducible, split over processes, resumable; and the contact sheet."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

import data_sets
from sam3_jax.data import augment, contact_sheet
from sam3_jax.data.batch import collate, pad_targets
from sam3_jax.data.builder import Source, prepare
from sam3_jax.data.examples import draw_example
from sam3_jax.data.pipeline import DataConfig, make_pipeline
from sam3_jax.data.source import open_split
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.training.batch import TrainBatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos")
    data_sets.write_pictures(path)
    file = data_sets.write_json(path / "coco.json", data_sets.coco())
    return prepare({"train": Source(file)}, path / "out", "small")


@pytest.fixture
def config(folder) -> DataConfig:
    """Everything random that there is, at a tiny size."""
    config = DataConfig(str(folder), batch_size=2, seed=3, buckets=(4, 200))
    config.example.augment = augment.paper(84)
    config.example.augment.mosaic = 0.3
    config.example.mask_size, config.example.clicks = 42, 2
    config.example.sampling.visual = config.example.sampling.boxes = 0.4
    return config


def take(config: DataConfig, count: int, **options) -> list[TrainBatch]:
    iterator = iter(make_pipeline(config, **options))
    batches = [jax.tree.map(np.array, batch) for batch in itertools.islice(iterator, count)]
    iterator.close()
    return batches


def same(a: list[TrainBatch], b: list[TrainBatch]) -> bool:
    return len(a) == len(b) and all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_shapes_are_fixed(config):
    config.buckets = (200,)
    batches = take(config, 4)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), batch) for batch in batches]
    assert all(shape == shapes[0] for shape in shapes)
    batch = batches[0]
    assert batch.images.shape == (2, 84, 84, 3)
    assert batch.images.dtype == np.uint8
    assert batch.tokens.shape == (8, 32)
    assert batch.targets.masks.shape == (8, 200, 42, 42)
    assert batch.geometry.boxes.shape == (8, 1, 4)
    assert batch.clicks.points.shape == (2, 2, 2, 2)


def test_a_batch_holds_its_examples(config, rng):
    source = open_split(Path(config.folder), config.split)
    config.example.sampling.negatives = 0.0
    config.example.augment = augment.plain(84)
    examples = [draw_example(source, index, config.example, rng) for index in range(3)]
    examples = [e._replace(prompts=e.prompts[:3]) for e in examples]  # one filler each
    batch = collate(examples, prompts=4, exemplars=1, buckets=(4, 200))
    assert batch.targets.prompt_valid.tolist() == [True, True, True, False] * 3
    for row, (example, number) in enumerate(itertools.product(examples, range(4))):
        if number == 3:
            assert not batch.targets.valid[row].any()
            continue
        prompt, count = example.prompts[number], len(example.prompts[number].boxes)
        assert batch.targets.valid[row].tolist() == [i < count for i in range(4)]
        cx, cy, w, h = (batch.targets.boxes[row, :count] * 84).T
        corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], axis=1)
        np.testing.assert_allclose(corners, prompt.boxes, atol=1e-4)
        np.testing.assert_array_equal(batch.targets.masks[row, :count], prompt.masks)
        given = len(prompt.exemplars)
        assert batch.geometry.box_mask[row].sum() == given
        assert default_tokenizer().decode(batch.tokens[row]) == prompt.phrase.lower()
    wide = pad_targets(batch, 16)
    assert wide.targets.valid.shape == (12, 16)
    assert wide.targets.valid.sum() == batch.targets.valid.sum()
    np.testing.assert_array_equal(wide.targets.masks[:, :4], batch.targets.masks)
    np.testing.assert_array_equal(wide.targets.semantic, batch.targets.semantic)
    with pytest.raises(ValueError, match="cannot be padded to 2"):
        pad_targets(batch, 2)
    with pytest.raises(ValueError, match="2 targets, the largest bucket is 1"):
        collate(examples, prompts=4, exemplars=1, buckets=(1,))
    with pytest.raises(ValueError, match="3 prompts, there are 2 slots"):
        collate(examples, prompts=2, exemplars=1, buckets=(4,))


def test_two_and_two_batches_are_four(config):
    whole = take(config, 4)
    assert same(whole, take(config, 4))
    assert not same(whole[:2], whole[2:])
    assert same(whole[2:], take(config, 2, start=2))
    iterator = iter(make_pipeline(config))
    first = list(itertools.islice(iterator, 2))
    state = iterator.get_state()
    resumed = iter(make_pipeline(config))
    resumed.set_state(state)
    assert same(whole, first + list(itertools.islice(resumed, 2)))
    config.seed += 1
    assert not same(whole, take(config, 4))


def test_workers_change_nothing(config):
    whole = take(config, 3)
    config.workers = 1
    assert same(whole, take(config, 3))


def test_processes_share_the_global_batch(config):
    """Two processes with one image each see what one sees with two, also from the middle on."""
    whole = take(config, 3)
    config.batch_size = 1
    parts = [take(config, 2, process_index=i, process_count=2, start=1) for i in range(2)]
    for number in range(2):
        for index in range(2):
            part, batch = parts[index][number], whole[number + 1]
            np.testing.assert_array_equal(part.images[0], batch.images[index])
            np.testing.assert_array_equal(part.tokens, batch.tokens[4 * index : 4 * index + 4])


def test_an_epoch_has_every_picture_once(config):
    config.batch_size, config.epochs = 1, 2
    config.example.augment = augment.plain(84)
    pictures = [batch.images.tobytes() for batch in take(config, 99)]
    assert len(pictures) == 6
    assert len(set(pictures[:3])) == len(set(pictures[3:])) == 3
    assert set(pictures[:3]) == set(pictures[3:])
    orders = set()
    for seed in range(6):
        config.seed = seed
        orders.add(tuple(batch.images.tobytes() for batch in take(config, 3)))
    assert len(orders) > 1
    config.shuffle = False
    orders = {tuple(b.images.tobytes() for b in take(config, 3)) for config.seed in range(3)}
    assert len(orders) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": (16, 64)}, "must ascend to at least max_targets=200"),
        ({"buckets": (64, 16, 200)}, "must ascend"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"batch_size": 4, "epochs": 1}, "3 pictures are less than one batch of 4 for each of 1"),
    ],
)
def test_contradictions_are_refused(config, change, message):
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        make_pipeline(config)


def test_more_contradictions(config):
    config.example.mask_size = 0
    with pytest.raises(ValueError, match="clicks need masks"):
        make_pipeline(config)
    config.example.clicks, config.example.augment.max_side = 0, 85
    with pytest.raises(ValueError, match="must lie within the resolution of 84"):
        make_pipeline(config)


def test_contact_sheet(tmp_path, capsys):
    data_sets.write_pictures(tmp_path)
    file = data_sets.write_json(tmp_path / "a.json", data_sets.coco())
    output = tmp_path / "sheet.png"
    options = ["--annotations", str(file), "--output", str(output), "--resolution", "126"]
    options += ["--count", "2", "--phrases", "2", "--columns", "2", "--side", "100"]
    options += ["--recipe", "paper", "--clicks", "1"]
    assert contact_sheet.main(options) == 0
    assert "4 prompts written" in capsys.readouterr().out
    sheet = np.asarray(PIL.Image.open(output))
    assert sheet.shape == (2 * (100 + contact_sheet.HEADER), 200, 3)
    assert contact_sheet.main([*options, "--images", str(tmp_path / "none")]) == 2
    assert "3 of 3 pictures are missing" in capsys.readouterr().err
    assert contact_sheet.main([*options, "--output", str(tmp_path / "sheet.what")]) == 2
