"""What is asked about a picture: negatives, exemplars, crowds, limits, clicks."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

import data_sets
from sam3_jax.data import augment, clicks, sampling
from sam3_jax.data.annotations import load_annotations
from sam3_jax.data.contact_sheet import open_files
from sam3_jax.data.examples import ExampleConfig, draw_example, example_of
from sam3_jax.data.placement import box_of_mask
from sam3_jax.data.sampling import SamplingConfig, candidates, choose
from sam3_jax.data.scenes import Vocabulary, scenes_of, vocabulary_of
from sam3_jax.data.source import SceneSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos")
    data_sets.write_pictures(path)
    data_sets.write_json(path / "coco.json", data_sets.coco())
    data_sets.write_json(path / "saco.json", data_sets.saco())
    return path


@pytest.fixture(scope="module")
def coco(folder) -> SceneSource:
    return open_files(folder / "coco.json", None)


@pytest.fixture(scope="module")
def saco(folder) -> SceneSource:
    return open_files(folder / "saco.json", None)


def config_of(recipe=augment.plain, mask_size: int = 126, **options) -> ExampleConfig:
    return ExampleConfig(SamplingConfig(**options), recipe(126), mask_size)


def names(found) -> set[str]:
    return {candidate.phrase for candidate in found}


def test_a_closed_vocabulary_gives_negatives(coco):
    positive, negative = candidates([coco[0]], coco.vocabulary, 200)
    assert names(positive) == {"face"}
    assert names(negative) == {"Cup", "saucer", "cat", "dog", "red car", "coffee cup"}


def test_saco_names_its_negatives(saco):
    cat = next(s for s in (saco[0], saco[1]) if s.picture.file_name == "cat.png")
    positive, negative = candidates([cat], saco.vocabulary, 200)
    assert names(positive) == {"striped cat"}
    assert names(negative) == {"dog"}  # "whisker" is not exhaustive: nothing is known of it


def test_hard_negatives_share_group_or_word(coco):
    vocabulary = coco.vocabulary
    assert vocabulary.hard(["cat"]) == {"dog"}
    assert vocabulary.hard(["Cup"]) == {"saucer", "coffee cup"}
    assert vocabulary.hard(["red car", "face"]) == set()
    plain = Vocabulary(("a cup of tea", "cup", "bag of rice"), ("", "", ""), True)
    assert plain.hard(["a cup of tea"]) == {"cup"}  # "of" says nothing


def test_shares_of_negatives(coco, rng):
    positive, negative = candidates([coco[2]], coco.vocabulary, 200)
    config = SamplingConfig(phrases=2, negatives=0.5, hard=1.0)
    drawn = [names(choose(positive, negative, coco.vocabulary, config, rng)) for _ in range(50)]
    assert all(len(d) == 2 for d in drawn)
    assert all("dog" in d for d in drawn)  # the one that is like a cat
    assert sum("cat" in d for d in drawn) > 25  # two negatives leave no room in a quarter
    config.hard = 0.0
    seen = collections.Counter()
    for _ in range(100):
        seen.update(names(choose(positive, negative, coco.vocabulary, config, rng)))
    assert set(seen) == names(positive) | names(negative)
    config.negatives, config.phrases = 0.0, 1
    assert names(choose(positive, negative, coco.vocabulary, config, rng)) == {"cat"}
    assert choose([], [], coco.vocabulary, config, rng) == []


def test_crowds_are_neither_targets_nor_negatives(coco, folder, rng):
    positive, _ = candidates([coco[1]], coco.vocabulary, 200)
    cup = next(c for c in positive if c.phrase == "Cup")
    assert (len(cup.targets), len(cup.crowds), cup.exhaustive) == (1, 1, False)
    data = data_sets.coco()
    data["annotations"][1]["iscrowd"] = 1  # now all cups are crowds
    dataset = load_annotations([data_sets.write_json(folder / "crowds.json", data)])
    positive, negative = candidates([scenes_of(dataset)[1]], vocabulary_of(dataset), 200)
    assert "Cup" not in names(positive) | names(negative)
    # The semantic target covers crowds too.
    config = config_of(negatives=0.0, phrases=7)
    example = example_of([coco[1]], (1, 1), coco, config, rng)
    prompt = next(p for p in example.prompts if p.phrase == "Cup")
    assert len(prompt.boxes) == 1
    assert not prompt.exhaustive
    assert (prompt.semantic & ~prompt.masks.any(0)).sum() > 100


def test_phrases_with_too_many_targets_are_dropped(coco):
    positive, negative = candidates([coco[2]], coco.vocabulary, 1)
    assert "cat" not in names(positive) | names(negative)  # two cats
    only = SceneSource([coco._data[2]], Vocabulary(("cat",), ("",), True))
    with pytest.raises(ValueError, match="pictures in a row, .*, have no usable phrase"):
        draw_example(only, 0, config_of(max_targets=1), np.random.default_rng(0))


def test_a_mosaic_joins_what_all_its_pictures_know(coco, saco):
    scenes = [coco[0], coco[2], coco[2]]
    positive, negative = candidates(scenes, coco.vocabulary, 200)
    assert {c.phrase: len(c.targets) for c in positive} == {"face": 1, "cat": 4}
    assert names(negative) == {"Cup", "saucer", "dog", "red car", "coffee cup"}
    assert [number for number, _ in positive[1].targets] == [1, 1, 2, 2]
    # Nobody said whether the cup's picture shows a striped cat.
    assert candidates([saco[0], saco[1]], saco.vocabulary, 200) == ([], [])


def test_boxes_and_masks_of_examples_agree(coco, rng):
    """Whatever is drawn: a target's box is that of its mask, and its pixels are the object's."""
    config = config_of(augment.paper, phrases=3)
    config.augment.mosaic, config.augment.mosaic_max = 0.5, 2
    config.augment.hue = config.augment.brightness = 0.0
    seen = 0
    for index in range(40):
        example = draw_example(coco, index % 3, config, rng)
        assert example.image.shape == (126, 126, 3)
        for prompt in example.prompts:
            assert len(prompt.boxes) == len(prompt.masks)
            for box, mask, valid in zip(prompt.boxes, prompt.masks, prompt.mask_valid, strict=True):
                assert box.min() >= 0
                assert box.max() <= 126
                if valid and (box[2:] - box[:2]).min() > 6:
                    seen += 1
                    # Ellipses touch their box in a few pixels: half of one may round away.
                    np.testing.assert_allclose(box_of_mask(mask), box, atol=2.0)
            if prompt.mask_valid.any() and prompt.exhaustive:
                np.testing.assert_array_equal(prompt.semantic, prompt.masks.any(0))
    assert seen > 30


def test_what_a_crop_removes_becomes_a_negative(coco, rng):
    config = config_of(phrases=1, negatives=0.0)
    config.augment.crop, config.augment.crop_min = 1.0, 0.1
    for index, phrase, most in ((0, "face", 1), (2, "cat", 2)):
        drawn = [example_of([coco[index]], (1, 1), coco, config, rng) for _ in range(60)]
        prompts = [example.prompts[0] for example in drawn if example]
        assert {p.phrase for p in prompts} == {phrase}
        counts = {len(p.boxes) for p in prompts}
        assert counts == {0, 1} if most == 1 else {1, 2} <= counts
        assert not any(p.semantic.any() for p in prompts if not len(p.boxes))
    # A crowd may hide there: then nothing is asked rather than something wrong.
    only_cups = SceneSource([coco._data[1]], Vocabulary(("Cup",), ("",), True))
    for _ in range(30):
        example = draw_example(only_cups, 0, config, rng)
        assert all(len(p.boxes) or p.exhaustive for p in example.prompts)


def test_visual_prompts_and_exemplars(coco, rng):
    config = config_of(phrases=3, visual=0.4, boxes=0.5, max_exemplars=2, negative_exemplars=0.5)
    kinds = collections.Counter()
    for index in range(150):
        for prompt in draw_example(coco, 1 + index % 2, config, rng).prompts:
            labels = prompt.exemplar_labels.tolist()
            if not len(prompt.boxes):
                assert prompt.phrase == prompt.concept
                assert labels == []
                continue
            kind = "visual" if prompt.phrase == sampling.VISUAL else "text"
            kinds[kind + ("+" if labels else "")] += 1
            assert labels.count(1) <= min(2, len(prompt.boxes))
            assert labels.count(0) <= 1
            assert labels.count(1) or kind == "text"
            for box in prompt.exemplars[prompt.exemplar_labels == 1]:
                # 10% noise of an edge, five deviations: still on its target.
                assert (np.abs(prompt.boxes - box).max(1) < 50).any()
    total = kinds.total()
    assert kinds["visual"] == 0
    assert kinds["visual+"] / total == pytest.approx(0.4, abs=0.1)
    assert kinds["text+"] / total == pytest.approx(0.3, abs=0.1)  # half of the other .6


def test_noise_of_boxes(rng):
    config = SamplingConfig()
    box = np.array([300.0, 300.0, 400.0, 350.0])
    drawn = np.stack([sampling.noisy_box(box, (1000, 1000), config, rng) for _ in range(4000)])
    # A tenth of the side, cut at 20 pixels (two deviations in x: .96 of the normal's deviation).
    np.testing.assert_allclose((drawn - box).std(0), [9.6, 5, 9.6, 5], rtol=0.05)
    assert np.abs(drawn - box).max() == 20
    edge = np.array([0.0, 0.0, 40.0, 40.0])
    drawn = np.stack([sampling.noisy_box(edge, (40, 40), config, rng) for _ in range(200)])
    assert drawn.min() >= 0
    assert drawn.max() <= 40
    wild = SamplingConfig(box_noise=50.0, box_noise_max=1e6)
    drawn = [sampling.noisy_box(edge, (40, 40), wild, rng) for _ in range(100)]
    assert all((b[2:] > b[:2]).all() for b in drawn)


def test_clicks_of_examples(coco, rng):
    config = config_of(mask_size=63)
    config.clicks = 3
    kinds = collections.Counter()
    for index in range(30):
        found = draw_example(coco, index % 3, config, rng).clicks
        for points, labels, mask in zip(
            found.points[found.valid],
            found.labels[found.valid],
            found.masks[found.valid],
            strict=True,
        ):
            kinds[tuple(labels.tolist())] += 1
            if labels[0] == 1:
                x, y = (points[0] / 2).astype(int)
                assert mask[y, x]
            else:
                assert (points[1] > points[0]).all()
        assert (found.labels[~found.valid] == -2).all()
    assert set(kinds) == {(1, -2), (2, 3)}
    assert min(kinds.values()) > 5


def test_simulated_users(rng):
    mask = np.zeros((40, 60), bool)
    mask[10:31, 20:41] = True
    assert clicks.first_click(mask, rng, center=True).tolist() == [30.5, 20.5]
    points = np.stack([clicks.first_click(mask, rng) for _ in range(50)]).astype(int)
    assert mask[points[:, 1], points[:, 0]].all()
    assert len(np.unique(points, axis=0)) > 30
    predicted = np.roll(mask, 4, axis=1)  # misses 4 columns, adds 4
    predicted[35:, :4] = True
    for _ in range(30):
        (x, y), label = clicks.correction_click(predicted, mask, rng)
        assert predicted[int(y), int(x)] != mask[int(y), int(x)] == bool(label)
    half = mask.copy()
    half[:, 26:] = False
    point, label = clicks.correction_click(half, mask, rng, center=True)
    assert label == 1
    assert not half[int(point[1]), int(point[0])]
    assert clicks.correction_click(mask, mask, rng)[1] == 1  # nothing wrong: confirm
    assert clicks.correction_click(~mask, np.zeros_like(mask), rng)[1] == 0
    with pytest.raises(ValueError, match="empty mask"):
        clicks.first_click(np.zeros_like(mask), rng)


def test_an_example_hangs_on_the_generator_alone(coco):
    config = config_of(augment.paper, visual=0.3, boxes=0.3)
    a, b = (draw_example(coco, 1, config, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(a.image, b.image)
    assert [p.phrase for p in a.prompts] == [p.phrase for p in b.prompts]
    for p, q in zip(a.prompts, b.prompts, strict=True):
        np.testing.assert_array_equal(p.exemplars, q.exemplars)


def test_where_a_picture_is_grey_no_phrase_names_a_colour(coco, rng):
    config = config_of(phrases=8)
    config.augment.gray = 1.0
    for index in range(len(coco)):
        example = draw_example(coco, index, config, rng)
        asked = names(candidates([coco[index]], coco.vocabulary, 200)[0])
        is_grey = (example.image == example.image[..., :1]).all()
        assert is_grey == (asked != {"red car"})  # of a picture of nothing else the colours stay
        if is_grey:
            assert not any(prompt.phrase == "red car" for prompt in example.prompts)
    config.augment.gray = 0.0
    examples = [draw_example(coco, index, config, rng) for index in range(len(coco))]
    assert any(prompt.phrase == "red car" for e in examples for prompt in e.prompts)
