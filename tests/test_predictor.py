"""ImagePredictor on a tiny model with random weights: meaning of prompts, invariances, caching."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from jaxtyping import Array

import sam3_jax
import tiny_predictor
from sam3_jax import ImagePredictor, Prompt, checkpoint
from sam3_jax.data.images import ImageError, normalize, resize_image, to_model_input
from sam3_jax.inference import compile_cache, programs, prompts
from sam3_jax.inference.instances import keep_instances
from sam3_jax.inference.options import Options
from sam3_jax.inference.programs import RawOutput, compute_dtype
from sam3_jax.inference.prompts import PromptError
from sam3_jax.inference.variants import UntrainedWarning
from sam3_jax.models.detector import Sam3, empty_click, empty_geometry
from sam3_jax.models.sam_heads import select_masks
from sam3_jax.sharding import make_mesh
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.types import ClickOutput, GroundOutput, TextFeatures

ROOT = Path(__file__).resolve().parents[1]
BOX = (30.0, 20.0, 120.0, 90.0)
OTHER = (100.0, 60.0, 190.0, 130.0)
TWO = [BOX, OTHER]
POINTS = [(50.0, 60.0), (150.0, 20.0)]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.coffee()[60:200, 100:300])


@pytest.fixture
def predictor(image) -> ImagePredictor:
    """The shared one, with the image set (encoding it takes milliseconds)."""
    predictor = tiny_predictor.predictor()
    predictor.set_image(image)
    return predictor


@pytest.fixture(scope="module")
def reference(image) -> tuple[RawOutput, ClickOutput]:
    """What the model itself says to a concept prompt and a click; none of the predictor's code."""
    config = tiny_predictor.config()
    side, (height, width) = config.image_size, image.shape[:2]
    corners = np.asarray(TWO) / (width, height, width, height)
    boxes = np.concatenate(
        [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1
    )
    geometry = empty_geometry(1, boxes=2)._replace(
        boxes=jnp.asarray(boxes[None], jnp.float32),
        box_labels=jnp.asarray([[1, 0]]),
        box_mask=jnp.ones((1, 2), bool),
    )
    rows = np.concatenate([np.reshape(BOX, (2, 2)), POINTS]) * (side / width, side / height)
    click = empty_click(1, 4, (4 * side // 14,) * 2)._replace(
        points=jnp.asarray(rows[None], jnp.float32), labels=jnp.asarray([[2, 3, 1, 0]])
    )

    @jax.jit
    def run(params: dict, pixels: Array, ids: Array) -> tuple[GroundOutput, ClickOutput]:
        model = Sam3(config).bind({"params": params})
        features, text = model.encode_image(pixels), model.encode_text(ids)
        index = jnp.zeros(1, jnp.int32)
        found = model.ground(features.detector, text, geometry, index, index)
        return found, model.click(features.tracker, click, index)

    pixels, ids = to_model_input(image, (side, side)), default_tokenizer()(["coffee cup"], 32)
    found, clicked = run(tiny_predictor.params(), pixels[None], ids)
    return RawOutput(*(getattr(found, f)[0] for f in RawOutput._fields)), clicked


def assert_same(actual: NamedTuple, expected: NamedTuple, tolerance: float = 1e-5) -> None:
    """Fields agree to ``tolerance`` of the spread: another batch size adds in another order."""
    for name, a, b in zip(expected._fields, actual, expected, strict=True):
        if b.dtype == bool:  # a logit that is 0 up to rounding may fall on either side
            assert (a != b).mean() <= 1e-4, name
        else:
            atol = tolerance * max(float(np.ptp(b)), 1.0)
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


def differ(a: RawOutput, b: RawOutput) -> bool:
    return float(np.abs(a.pred_masks - b.pred_masks).max()) > 1e-3 * float(np.ptp(b.pred_masks))


# ------------------------------------------------------------------------------ concept prompts


def test_raw_outputs_are_the_models(predictor, reference):
    raw = predictor.predict_raw(text="coffee cup", boxes=TWO, box_labels=[1, 0])
    assert_same(raw, reference[0])
    assert raw.pred_logits.shape == (12,)
    assert raw.pred_boxes.shape == (12, 4)
    assert np.shape(raw.presence_logits) == ()
    assert raw.pred_masks.shape == (12, 32, 32)
    assert raw.semantic_seg.shape == (32, 32)


def test_detections_are_the_raw_outputs_above_the_threshold(predictor, image):
    raw = predictor.predict_raw(text="cup")
    scores = torch.tensor(raw.pred_logits).sigmoid() * torch.tensor(raw.presence_logits).sigmoid()
    ranked = torch.sort(scores, descending=True).values
    half = len(scores) // 2
    threshold = float(ranked[half - 1 : half + 1].mean())  # between two, whatever the rounding
    found = predictor.predict(text="cup", threshold=threshold)
    order = torch.argsort(-scores)[:half].numpy()

    height, width = image.shape[:2]
    assert found.masks.shape == (len(order), height, width)
    assert found.masks.dtype == bool
    np.testing.assert_allclose(found.scores, scores[order], rtol=1e-5)  # float32 sigmoids
    center, size = raw.pred_boxes[order, :2], raw.pred_boxes[order, 2:]
    corners = np.concatenate([center - size / 2, center + size / 2], 1)
    np.testing.assert_allclose(found.boxes, corners * ([width, height] * 2), atol=1e-3)
    logits = torch.nn.functional.interpolate(
        torch.tensor(raw.pred_masks[order])[:, None],
        (height, width),
        mode="bilinear",
        align_corners=False,
    )[:, 0].numpy()
    clear = np.abs(logits) > 1e-5 * np.ptp(logits)  # not 0 up to rounding
    np.testing.assert_array_equal(found.masks[clear], (logits > 0)[clear])


def test_thresholds_keep_nothing_or_everything(predictor, image):
    nothing = predictor.predict(text="cup", threshold=1.0)
    assert nothing.masks.shape == (0, *image.shape[:2])
    assert nothing.boxes.shape == (0, 4)
    everything = predictor.predict(text="cup", threshold=0.0)
    assert len(everything.scores) == 12
    assert (np.diff(everything.scores) <= 0).all()


def test_no_text_means_the_phrase_visual(predictor):
    assert_same(predictor.predict_raw(boxes=TWO), predictor.predict_raw("visual", TWO), 0.0)


def test_every_part_of_a_prompt_matters(predictor):
    base = predictor.predict_raw("cup", TWO, [1, 1])
    assert differ(predictor.predict_raw("plate", TWO), base)
    assert differ(predictor.predict_raw("cup", [BOX, (5, 5, 20, 30)]), base)
    assert differ(predictor.predict_raw("cup", TWO, [1, 0]), base)
    assert differ(predictor.predict_raw("cup"), base)
    assert_same(predictor.predict_raw("cup", TWO), base, 0.0)  # the default labels
    assert_same(predictor.predict_raw("cup", TWO, [True, True]), base, 0.0)


def test_order_of_boxes_does_not_matter(predictor):
    a = predictor.predict_raw("cup", TWO, [1, 0])
    assert_same(predictor.predict_raw("cup", TWO[::-1], [0, 1]), a)


def test_a_prompt_alone_or_in_company_gives_the_same(predictor):
    """Seven prompts: two groups, the second padded, boxes padded to those of others."""
    asked = [
        Prompt("cup"),
        Prompt("saucer", TWO),
        Prompt(None, [*TWO, BOX], [1, 0, 1]),
        Prompt("spoon", [*TWO, *TWO], [1, 1, 0, 0]),
        Prompt("cup"),
        Prompt("table"),
        Prompt("saucer", TWO, [0, 1]),
    ]
    together = predictor.predict_many(asked, threshold=0.0)
    for prompt, found in zip(asked, together, strict=True):
        (alone,) = predictor.predict_many([prompt], threshold=0.0)
        assert_same(found, alone)
    assert not np.allclose(together[0].scores, together[5].scores, atol=1e-4)


def test_order_of_prompts_does_not_matter(predictor):
    phrases = ["cup", "saucer", "spoon"]
    forward = predictor.predict_raw(phrases, TWO)
    backward = predictor.predict_raw(phrases[::-1], TWO)
    for a, b in zip(forward, backward[::-1], strict=True):
        assert_same(a, b)
    assert isinstance(forward, list)
    assert predictor.predict_raw([]) == []


def test_encoded_text_is_accepted(predictor):
    features = predictor.encode_text("cup")
    assert_same(predictor.predict_raw(features), predictor.predict_raw("cup"), 0.0)
    mixed = predictor.predict_raw([features, "plate", features], TWO)
    assert_same(mixed[1], predictor.predict_raw("plate", TWO))


def test_phrases_are_encoded_once_and_forgotten_in_time(predictor, monkeypatch):
    encoded = []
    text = predictor.engine.run.text

    def counted(params: dict, ids: np.ndarray) -> TextFeatures:
        encoded.append(ids)
        return text(params, ids)

    engine = predictor.engine
    monkeypatch.setattr(engine, "run", engine.run._replace(text=counted))
    monkeypatch.setattr("sam3_jax.inference.engine.PHRASES_KEPT", 2)
    engine._phrases.clear()
    for phrase in ("a", "b", "a", "c", "a", "b"):  # c drops b, not a: a was used later
        predictor.encode_text(phrase)
    assert len(encoded) == 4


def test_sources_of_an_image_agree(predictor, image, tmp_path):
    expected = predictor.predict_raw("cup")
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), PIL.Image.fromarray(image)):
        predictor.set_image(source)
        assert predictor.image_size == image.shape[:2]
        assert_same(predictor.predict_raw("cup"), expected, 0.0)


def test_a_bad_image_leaves_the_one_before(predictor, image, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    before = predictor.predict_raw("cup")
    for source in (tmp_path / "broken.jpg", tmp_path / "missing.jpg", np.zeros((5, 5))):
        with pytest.raises(ImageError):
            predictor.set_image(source)
    assert predictor.image_size == image.shape[:2]
    assert_same(predictor.predict_raw("cup"), before, 0.0)


# ------------------------------------------------------------ batches, other images, thinning out


def test_a_batch_of_mixed_sizes_equals_images_alone(predictor, image):
    """Five images in batches of two, each with prompts of its own number."""
    images = [image, image[:90], image[:, 50:], image[::-1].copy(), image[20:, :120]]
    boxes = [[9, 9, 50, 60], [20, 30, 70, 80]]
    asked = [[Prompt("cup")], [Prompt("a"), Prompt("b", boxes)], [Prompt("cup", boxes)], [], []]
    together = predictor.predict_batch(images, asked, 0.0, batch_size=2)
    assert [len(found) for found in together] == [1, 2, 1, 0, 0]
    assert predictor.image_size == image.shape[:2]
    for picture, own, found in zip(images, asked, together, strict=True):
        predictor.set_image(picture)
        for a, b in zip(found, predictor.predict_many(own, 0.0), strict=True):
            assert_same(a, b)
    same = predictor.predict_batch(images[:1], [Prompt("cup")], 0.0, batch_size=2)
    assert_same(same[0][0], together[0][0])
    with pytest.raises(PromptError, match="1 lists of prompts for 2 images"):
        predictor.predict_batch(images[:2], [[Prompt("cup")]])


def test_options(predictor):
    def find(**chosen):
        return predictor.predict("cup", threshold=0.0, options=Options(**chosen))

    everything = find()
    assert len(find(max_instances=2).scores) == 2
    assert_same(find(max_instances=2), type(everything)(*(f[:2] for f in everything)))
    raw = predictor.predict_raw("cup")
    np.testing.assert_allclose(
        find(presence=False).scores, np.sort(1 / (1 + np.exp(-raw.pred_logits)))[::-1], rtol=1e-5
    )
    thin = find(nms="iom", nms_threshold=0.3)
    assert 0 < len(thin.scores) < len(everything.scores)
    tight = find(boxes="masks")
    for mask, box in zip(tight.masks, tight.boxes, strict=True):
        if mask.any():
            rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            np.testing.assert_array_equal(box, [cols[0], rows[0], cols[-1] + 1, rows[-1] + 1])
    for wrong in ({"nms": "box"}, {"boxes": "x"}, {"max_instances": -1}, {"nms_threshold": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            find(**wrong)


def test_exemplars_of_another_image(predictor, image):
    """Their tokens are what the model makes of the boxes there, without the class token."""
    shown = predictor.encode_exemplars(TWO, [1, 0], "cup")
    text = predictor.encode_text("cup")
    assert shown.tokens.shape[1] == text.tokens.shape[1] + 4  # two boxes in a bucket of four
    assert int(shown.mask.sum()) == int(text.mask.sum()) + 2
    predictor.set_image(image[::-1].copy())
    with_them = predictor.predict_raw(shown)
    assert differ(with_them, predictor.predict_raw("cup"))
    mixed = predictor.predict_raw(["cup", shown])  # prompts of different lengths
    assert_same(mixed[1], with_them)
    assert_same(mixed[0], predictor.predict_raw("cup"))


def test_mask_exemplars_work_and_warn(predictor):
    plain = predictor.predict_raw("cup")
    other = ImagePredictor.from_engine(copy.copy(predictor.engine))
    other._encoded = predictor._encoded
    mask = np.zeros((1, 140, 200), bool)
    mask[0, 20:90, 30:120] = True
    with pytest.warns(UntrainedWarning, match="untrained"):
        (found,) = other.predict_many([Prompt("cup", masks=mask)], 0.0)
    assert not np.allclose(found.scores, predictor.predict("cup", threshold=0.0).scores, atol=1e-4)
    assert_same(predictor.predict_raw("cup"), plain, 0.0)  # whose engine has not changed
    for wrong in (mask[0], mask.astype(float)):
        with pytest.raises(PromptError, match=r"\(n, h, w\) of bool"):
            other.predict_many([Prompt("cup", masks=wrong)], 0.0)


def test_other_resolutions(image):
    """The weights stay; boxes come from the masks away from the trained size."""
    params, config = tiny_predictor.params(), tiny_predictor.config()
    small = ImagePredictor(params, config, dtype="float32", resolution=56)
    assert small.config.image_size == 56
    assert config.image_size == 112
    assert small.engine.boxes_from_masks(Options())
    assert not small.engine.boxes_from_masks(Options(boxes="model"))
    small.set_image(image)
    assert small._encoded.trunk.shape[1:3] == (4, 4)
    for wrong in (50, 28, 0):
        with pytest.raises(ValueError, match="multiple of 14"):
            ImagePredictor(params, config, resolution=wrong)


def test_a_batch_spreads_over_a_mesh_and_stays_there(predictor, image):
    """Four devices: the same results, and rounds whose outputs stay split."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = make_mesh(devices=jax.devices()[:4])
    params, config = tiny_predictor.params(), tiny_predictor.config()
    spread = ImagePredictor(params, config, dtype="float32", mesh=mesh)
    images = [image, image[::-1].copy(), image[:, ::-1].copy()]
    found = spread.predict_batch(images, [Prompt("cup")], 0.0, batch_size=4)
    expected = predictor.predict_batch(images, [Prompt("cup")], 0.0, batch_size=2)
    for (a,), (b,) in zip(found, expected, strict=True):
        assert_same(a, b, 2e-5)
    side = config.image_size
    inputs = np.stack([resize_image(i, (side, side)) for i in images])
    (found,) = spread.engine.submit(inputs, [[Prompt("a")]] * 3, [(140, 200)] * 3, 4)
    for masks in (found.out.pred_masks, found.masks):
        assert not masks.is_fully_replicated
        assert masks.sharding.shard_shape(masks.shape)[0] == 1


def test_bytes_are_normalised_on_the_devices():
    """Every value; a compiler may round once less than the table does, a step of 6e-8 at 1."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    device = np.asarray(jax.jit(programs.normalize)(values))
    np.testing.assert_allclose(device, normalize(values), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("expected", [1, 4, 64])
def test_masks_come_whether_they_were_expected_or_not(predictor, image, expected):
    """Fewer instances were asked for ahead of time than there are, and more."""
    engine, side = predictor.engine, predictor.config.image_size
    engine._likely = expected
    pixels = resize_image(image, (side, side))[None]
    rounds = engine.submit(pixels, [[Prompt("cup")]], [image.shape[:2]], 1)
    assert rounds[0].masks.shape[1] == min(expected, 12)
    (scores,) = [instances.scores for instances in keep_instances(rounds[0].out, [0.0])]
    for threshold in (0.0, float(scores[2]), 1.0):
        ((found,),) = engine.collect(rounds, [[threshold]])
        (alone,) = keep_instances(rounds[0].out, [threshold])
        for a, b in zip(found[:3], alone[:3], strict=True):
            np.testing.assert_array_equal(a, b)
    assert engine._likely == 1  # what the latest batch had


def test_points_as_prompts_of_their_own(predictor):
    logits, iou = predictor.predict_point_batch(POINTS)
    assert logits.shape == (2, 3, 32, 32)
    for i, point in enumerate(POINTS):
        alone = predictor.predict_points([point])
        np.testing.assert_allclose(iou[i], alone.iou, atol=1e-5)
        spread = float(np.ptp(logits[i]))
        clipped = np.clip(logits[i], -32, 32)
        np.testing.assert_allclose(clipped, alone.low_res_logits, atol=1e-5 * spread)
    single, _ = predictor.predict_point_batch(POINTS, multimask=False)
    assert single.shape[1] == 1
    with pytest.raises(PromptError, match="must lie on the image"):
        predictor.predict_point_batch([(999, 3)])


# --------------------------------------------------------------------------------------- clicks


def test_clicks_are_the_models(predictor, reference, image):
    """Scaling, a box before points, clamping."""
    for multimask, count in ((True, 3), (False, 1)):
        masks, iou = select_masks(reference[1], predictor.config.sam, multimask=multimask)
        result = predictor.predict_points(POINTS, [1, 0], box=BOX, multimask=multimask)
        assert result.masks.shape == (count, *image.shape[:2])
        assert result.low_res_logits.shape == (count, 32, 32)
        np.testing.assert_allclose(result.iou, iou[0], atol=1e-5)
        atol = 1e-5 * float(np.ptp(masks))
        np.testing.assert_allclose(result.low_res_logits, np.clip(masks[0], -32, 32), atol=atol)


def test_only_the_output_mask_has_its_holes_filled(predictor, monkeypatch):
    """A small hole of a 32 x 32 mask: closed in the picture, kept in what refines a click."""
    logits = np.full((3, 32, 32), 40.0, np.float32)
    logits[:, 10, 10:13] = -50.0
    predictor.predict_points([(50, 50)])
    fake = {True: (logits[None], np.ones((1, 3), np.float32))}
    engine = predictor.engine
    monkeypatch.setattr(engine, "run", engine.run._replace(click=lambda *_: fake))
    result = predictor.predict_points([(50, 50)])
    assert result.masks.all()
    assert result.low_res_logits.min() == -32
    assert result.low_res_logits.max() == 32


def test_padding_of_points_does_not_matter(predictor, monkeypatch):
    expected = predictor.predict_points(POINTS, [1, 0], box=BOX)
    monkeypatch.setattr(prompts, "POINT_BUCKETS", (16,))
    assert_same(predictor.predict_points(POINTS, [1, 0], box=BOX), expected)


def test_every_part_of_a_click_matters(predictor):
    def logits(*args, **kwargs):
        return predictor.predict_points(*args, **kwargs).low_res_logits

    base = logits([(50, 60)], [1])
    np.testing.assert_array_equal(logits([(50, 60)]), base)
    spread = np.ptp(base)
    for other in (
        logits([(90, 60)], [1]),
        logits([(50, 60)], [0]),
        logits([(50, 60)], [1], box=BOX),
        logits(box=BOX),
        logits([(50, 60)], [1], mask_input=base[0]),
        logits(mask_input=base[0]),
    ):
        assert np.abs(other - base).max() > 1e-3 * spread
    np.testing.assert_array_equal(logits(mask_input=base[:1]), logits(mask_input=base[0]))
    assert len(logits([(50, 60)], multimask=False)) == 1


def test_pyramids_are_made_once_and_only_when_needed(predictor, image, monkeypatch):
    calls = []

    def counted(name: str):
        function = getattr(predictor.engine.run, name)
        return lambda *args: calls.append(name) or function(*args)

    names = ("trunk", "detector_levels", "tracker_levels")
    run = predictor.engine.run._replace(**{name: counted(name) for name in names})
    monkeypatch.setattr(predictor.engine, "run", run)
    predictor.set_image(image)
    assert calls == ["trunk"]
    predictor.predict("cup")
    predictor.predict("plate")
    assert calls == ["trunk", "detector_levels"]
    predictor.predict_points([(3, 3)])
    predictor.predict_points([(9, 9)])
    assert calls == ["trunk", "detector_levels", "tracker_levels"]


# --------------------------------------------------------------------------------- compilation


def test_nothing_compiles_again_within_a_bucket(predictor):
    ground, click = predictor.engine.run.ground_one, predictor.engine.run.click
    predictor.predict(["a", "b", "c"], TWO)
    predictor.predict_points(POINTS, box=BOX)
    before = ground._cache_size(), click._cache_size()
    predictor.predict(["d", "e", "f", "g"], [*TWO, *TWO])
    predictor.predict_many([Prompt("a", [*TWO, BOX]), Prompt("b"), Prompt("c")], threshold=0.1)
    predictor.predict_points([*POINTS, (4, 4)], mask_input=np.zeros((32, 32)))
    assert (ground._cache_size(), click._cache_size()) == before


@pytest.mark.parametrize(
    ("n", "sizes", "expected"),
    [(0, (0, 1, 4), 0), (1, (0, 1, 4), 1), (2, (0, 1, 4), 4), (5, (0, 1, 4), 8), (64, (1,), 64)],
)
def test_buckets(n, sizes, expected):
    assert prompts.bucket(n, sizes) == expected


def test_compiled_programs_are_kept_on_disk(tmp_path):
    """In processes of their own: jax settles on a cache once."""
    code = """
import jax
from sam3_jax.inference import compile_cache
compile_cache.MIN_COMPILE_SECONDS = 0.0  # tiny programs compile quickly
jax.jit(lambda x: x + 1)(1)  # a cache must be noticed though jax has compiled something already
compile_cache.enable()
jax.jit(lambda x: x * 3 + 1)(2.0)
print(jax.config.jax_compilation_cache_dir)
"""

    def run(**variables: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.endswith("_CACHE_DIR")}
        env = {**inherited, "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run(SAM3_JAX_CACHE_DIR=str(tmp_path / "a")) == str(tmp_path / "a")
    assert any((tmp_path / "a").iterdir())
    assert run(SAM3_JAX_CACHE_DIR="off") == "None"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "sam3_jax")
    chosen = str(tmp_path / "b")
    assert run(JAX_COMPILATION_CACHE_DIR=chosen, SAM3_JAX_CACHE_DIR=str(tmp_path / "c")) == chosen
    assert not (tmp_path / "c").exists()


def test_several_devices_equal_one(predictor, image):
    """The trunk's three heads on three devices; the other programs run the same way."""
    if jax.device_count() < 3:
        pytest.skip("needs three devices")
    mesh = make_mesh(data=1, tensor=3, devices=jax.devices()[:3])
    params, config = tiny_predictor.params(), tiny_predictor.config()
    spread = ImagePredictor(params, config, dtype="float32", mesh=mesh)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(spread.engine.params))
    spread.set_image(image)
    actual, expected = (np.asarray(p._encoded.trunk) for p in (spread, predictor))
    # sums over heads in another order
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.ptp(expected))


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path):
    params, config = tiny_predictor.params(), tiny_predictor.config()
    checkpoint.save(tmp_path / "ckpt", params, config)
    loaded = ImagePredictor.from_pretrained(tmp_path / "ckpt")
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.engine.params, params)
    mesh = make_mesh(data=1, tensor=1, devices=jax.devices()[-1:])
    elsewhere = ImagePredictor.from_pretrained(str(tmp_path / "ckpt"), "bfloat16", mesh)
    assert elsewhere.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(elsewhere.engine.params):
        assert leaf.devices() == {jax.devices()[-1]}
    with pytest.raises(checkpoint.CheckpointError, match="missing"):
        ImagePredictor.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match="dtype must be one of"):  # before it looks for the folder
        ImagePredictor.from_pretrained(tmp_path / "missing", dtype="int8")


def test_compute_dtypes():
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert compute_dtype("auto") == jnp.dtype(auto)
    assert compute_dtype(jnp.bfloat16) == compute_dtype("bfloat16") == jnp.dtype("bfloat16")
    for wrong in ("float16", "half", "nonsense", None, 3):
        with pytest.raises(ValueError, match="auto, bfloat16, float32"):
            compute_dtype(wrong)


def test_bfloat16_is_used_inside_and_float32_comes_out():
    params, config = tiny_predictor.params(), tiny_predictor.config()
    run = ImagePredictor(params, config, dtype="bfloat16").engine.run
    shape = jax.eval_shape  # nothing is compiled
    trunk = shape(run.trunk, params, np.zeros((1, 112, 112, 3), np.float32))
    text = shape(run.text, params, np.zeros((1, 32), np.int32))
    levels = shape(run.detector_levels, params, trunk)
    for inside in (trunk, text.tokens, *levels):
        assert inside.dtype == jnp.bfloat16
    out = shape(
        run.ground_each, params, levels, [text], prompts.pad_geometry([Prompt("a")], [(9, 9)])
    )
    assert {leaf.dtype for leaf in out} == {jnp.dtype("float32")}
    click = empty_click(1, 1, (32, 32))
    out = shape(run.click, params, shape(run.tracker_levels, params, trunk), click)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("float32")}


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give text, boxes, or both"),
        ({"text": "  "}, "must be a phrase"),
        ({"text": ["cup", ""]}, "must be a phrase"),
        ({"text": "cup", "boxes": [1, 2, 3, 4]}, r"shape \(n, 4\), got \(4,\)"),
        ({"text": "cup", "boxes": [[1, 2, "x", 4]]}, "must be numbers"),
        ({"text": "cup", "boxes": [[5, 5, 5, 9]]}, "x0 < x1"),
        ({"text": "cup", "boxes": [[500, 5, 600, 9]]}, "outside the image of 200 x 140"),
        ({"text": "cup", "boxes": [[1, 2, float("nan"), 4]]}, "finite"),
        ({"text": "cup", "boxes": [BOX], "box_labels": [1, 0]}, "1 values, one for each"),
        ({"text": "cup", "boxes": [BOX], "box_labels": [2]}, "1 .positive. or 0"),
        ({"text": "cup", "box_labels": [1]}, "0 values"),
    ],
)
def test_bad_concept_prompts(predictor, arguments, message):
    with pytest.raises(PromptError, match=message):
        predictor.predict_raw(**arguments)
    with pytest.raises(PromptError, match=message):
        predictor.predict(**arguments)


def test_a_prompt_of_the_wrong_type(predictor):
    with pytest.raises(PromptError, match="must be a phrase such as 'red car', got 3"):
        predictor.predict_many([Prompt("cup"), Prompt(3)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give points, a box, or mask_input"),
        ({"labels": [1]}, "labels were given without points"),
        ({"points": (3, 4)}, r"shape \(n, 2\), got \(2,\)"),
        ({"points": [(3, 4)], "labels": [1, 1]}, "1 values"),
        ({"points": [(3, 4)], "labels": [2]}, "1 .positive. or 0"),
        ({"points": [(150, 190)]}, "must lie on the image of 200 x 140"),
        ({"box": [BOX, BOX]}, "one box at a time"),
        ({"box": (9, 9, 3, 3)}, "x0 < x1"),
        ({"mask_input": np.zeros((3, 32, 32))}, "of one mask"),
        ({"mask_input": np.full((32, 32), np.inf)}, "finite"),
    ],
)
def test_bad_clicks(predictor, arguments, message):
    with pytest.raises(PromptError, match=message):
        predictor.predict_points(**arguments)


def test_order_of_calls(predictor, monkeypatch):
    monkeypatch.setattr(predictor, "_encoded", None)
    for call in (
        lambda: predictor.predict("cup"),
        lambda: predictor.predict_raw("cup"),
        lambda: predictor.predict_points([(1, 1)]),
        lambda: predictor.image_size,
    ):
        with pytest.raises(RuntimeError, match="call set_image first"):
            call()


def test_parts_that_a_checkpoint_lacks_are_named(predictor, monkeypatch):
    engine, params = predictor.engine, predictor.engine.params
    monkeypatch.setattr(engine, "params", {k: v for k, v in params.items() if k != "tracker"})
    with pytest.raises(RuntimeError, match="converted with --part all or --part tracker"):
        predictor.predict_points([(1, 1)])
    monkeypatch.setattr(engine, "params", {k: params[k] for k in ("vision", "tracker")})
    with pytest.raises(RuntimeError, match="converted with --part all or --part image"):
        predictor.predict("cup")


def test_threshold_must_be_a_probability(predictor):
    with pytest.raises(ValueError, match="between 0 and 1"):
        predictor.predict("cup", threshold=1.5)


# --------------------------------------------------------------------------------- public names


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, sam3_jax; print([m for m in ('jax', 'numpy', 'PIL') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    for name in sam3_jax.__all__:
        assert getattr(sam3_jax, name) is not None
        assert name in dir(sam3_jax)
    with pytest.raises(AttributeError, match="nonsense"):
        sam3_jax.nonsense  # noqa: B018
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sam3_jax.__version__ == project["version"]


def test_cache_folder_follows_the_platform(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LOCALAPPDATA", "/l")
    for platform, parent in (("linux", "/x"), ("win32", "/l"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        folder = compile_cache.default_folder()
        assert folder.name == "sam3_jax"
        assert folder.parent.as_posix().endswith(parent)
