"""Whole sessions against torch's networks under upstream's rules, at tiny sizes.

Every step of tracking is compared elsewhere (``test_tracking_parity``, ``test_concepts_plan``);
here it is what the session makes of them: order, prompts, births, memory, outputs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import torch

import oracle
from oracle.concept_session import ConceptSession, clean
from oracle.params import params_from_hf
from oracle.tracking import Features, Session
from parity import assert_close
from sam3_jax import config
from sam3_jax.data.images import normalize
from sam3_jax.data.resize import resize_image
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.tracking.config import TrackerConfig
from sam3_jax.video.config import VideoConfig
from sam3_jax.video.predictor import VideoPredictor
from upstream_memory import Rules

# transformers fixes the memory's width at 64 and pointers are parted into it.
MODEL = dataclasses.replace(
    config.tiny(), dim=128, memory=dataclasses.replace(config.tiny().memory, dim=64)
)
FRAMES = 22
# Random networks segment half of the picture: overlaps mean less than in the release.
CONCEPTS = ConceptConfig(
    nms_overlap=0.4,
    match_overlap=0.3,
    track_overlap=0.6,
    hotstart=6,
    hotstart_unmatched=4,
    hotstart_duplicate=4,
    recondition_every=3,
    recondition_score=0.6,
    recondition_overlap=0.3,
    recondition_together=False,
)
# Float32 in another order, 22 frames that each read the ones before.
SHARE = 1e-3

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model():
    """transformers' model whose concept is there, and whose objects mostly are."""
    made = oracle.randomize(oracle.video(MODEL), seed=3)
    with torch.no_grad():
        made.detector_model.detr_decoder.presence_head.layer3.bias += 4.0
        made.tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias += 4.0
    return made


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """A window that wanders over a picture.

    As large as the memory encoder's input: new objects' masks are resized to the video's size and
    cut at one half, which in other sizes some pixels are exactly, so that rounding would decide.
    """
    noise = np.random.default_rng(5).normal(size=(200, 200, 3))
    picture = scipy.ndimage.gaussian_filter(noise, (2, 2, 0))
    picture = (255 * (picture - picture.min()) / np.ptp(picture)).astype(np.uint8)
    side = 16 * MODEL.image_size // MODEL.vision.patch_size
    return np.stack([picture[3 * t : 3 * t + side, t : t + side] for t in range(FRAMES)])


@pytest.fixture(scope="module")
def predictor(model) -> VideoPredictor:
    params = jax.tree.map(jnp.asarray, params_from_hf(model, MODEL))
    rules = VideoConfig(TrackerConfig(bucket_size=8), CONCEPTS)
    return VideoPredictor(params, MODEL, dtype="float32", video=rules)


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "together"), [("object", False), ("session", True)])
def test_phrase(model, clip, predictor, selection, together):
    """Objects are born, renewed, removed; masks, scores and identities stay equal."""
    concepts = dataclasses.replace(CONCEPTS, recondition_together=together)
    tracker = TrackerConfig(bucket_size=8, selection=selection)
    predictor = VideoPredictor.from_engine(predictor.engine, video=VideoConfig(tracker, concepts))
    tokens = default_tokenizer()(["a cat"], MODEL.text.context_length)
    rules = Rules(selection, FRAMES)
    side = MODEL.image_size
    pixels = [normalize(resize_image(picture, (side, side))) for picture in clip]
    want = ConceptSession(model, concepts, clip.shape[1:3], rules, tokens)
    session = predictor.start(clip, delay=0)
    session.add_text("a cat")
    happened = dict.fromkeys(("born", "removed", "renewed", "suppressed", "tracked"), 0)
    for frame in session.propagate():
        t = frame.index
        if t == 0:
            want.frame(0, pixels[0])  # upstream looks at the first frame twice
        expected = want.frame(t, pixels[t])
        output, logits, _ = session._timeline.tracking.latest
        assert output.ids.tolist() == sorted(expected.masks), f"frame {t}"
        assert set(output.removed.tolist()) == expected.removed
        logits = np.asarray(logits)
        for i, (name, mask) in enumerate(sorted(expected.masks.items())):
            spread = max(float(np.ptp(mask)), 1.0)
            where = f"mask of {name} on frame {t}"
            assert_close(logits[i], mask, SHARE, where, spread=spread)
            score = expected.scores[name]
            assert output.tracker_scores[i] == pytest.approx(score, abs=SHARE), where
        for name, times in expected.events.items():
            happened[name] += times
    never = {name for name, times in happened.items() if not times}
    assert never <= {"suppressed"}, happened


def test_points_and_box(model, clip, predictor):
    """Two clicked objects, one corrected in the past, then tracked on from there."""
    tracker = model.tracker_model
    side, frames = MODEL.image_size, 8
    clip = np.ascontiguousarray(clip[:frames, :side, :side])
    features = []
    with torch.no_grad():
        for picture in clip:
            pixels = torch.from_numpy(normalize(picture)).movedim(-1, 0)[None]
            image = model.detector_model.vision_encoder(pixels)
            flat, positions = model.get_vision_features_for_tracker(image)
            grid = side // MODEL.vision.patch_size
            sizes = [4 * grid, 2 * grid, grid]
            levels = [
                x.permute(1, 2, 0).unflatten(2, (s, s)) for x, s in zip(flat, sizes, strict=True)
            ]
            features.append(Features(levels, positions[-1]))
    want = Session(tracker, features, 2, Rules("object", frames))
    session = predictor.start(clip)
    points, box = np.array([[40.0, 50.0], [60.0, 30.0]]), np.array([20.0, 30.0, 70.0, 90.0])
    ids = [session.add_points(0, points, [1, 0]), session.add_box(0, box)]
    assert ids == [0, 1]
    want.prompt(0, 0, points, np.array([1, 0]))
    want.prompt(0, 1, box.reshape(2, 2), np.array([2, 3]))
    want.finish_prompts(0)

    def compare(start: int) -> None:
        for frame in session.propagate(start):
            expected = want.track(frame.index) if frame.index not in want.prompted[0] else None
            latest = session._timeline.tracking.latest
            for i in ids:
                one = want.found(frame.index, i) if expected is None else expected[i]
                mask = clean(one.mask, CONCEPTS.clean_area)
                got = np.asarray(latest.logits)[i]
                spread = max(float(np.ptp(mask)), 1.0)
                assert_close(got, mask, SHARE, f"object {i}, frame {frame.index}", spread=spread)
                score = 1 / (1 + np.exp(-one.object_logit))
                assert latest.output.tracker_scores[i] == pytest.approx(score, abs=SHARE)

    compare(0)
    point = np.array([[80.0, 20.0]])
    session.add_points(3, point, [1], object_id=0)
    want.prompt(3, 0, point, np.array([1]), want.found(3, 0).mask)
    # Ours makes the frame a prompted one of the corrected object alone.
    kept = want.tracked[1].pop(3)
    want.finish_prompts(3)
    want.tracked[1][3] = kept
    for i in ids:
        want.tracked[i] = {t: out for t, out in want.tracked[i].items() if t <= 3}
    compare(4)
