"""``hf_video`` against transformers' own video models: tiny, unpatched, random.

This is the path of ``test_real_video.py`` (bytes of frames, prompts in pixels, figures).
"""

from __future__ import annotations

import oracle  # first: repairs torchvision's import

# isort: split
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from skimage import data
from transformers import (
    Sam2VideoVideoProcessor,
    Sam3ImageProcessor,
    Sam3TrackerVideoModel,
    Sam3TrackerVideoProcessor,
    Sam3VideoModel,
    Sam3VideoProcessor,
)
from transformers.models.sam3_video import modeling_sam3_video
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

import tiny_predictor
import video_session
from hf_variant import LAYER_NORM_EPS, PRESENCE_CLAMP
from hf_video import (
    FOUR_FRAMES,
    HfVideoPredictor,
    add_mask_logits,
    resize_as_on_cuda,
    video_logits,
)
from oracle.params import params_from_hf
from oracle.tracking import Session as Upstream
from oracle.tracking import encode_frame
from parity import assert_close
from sam3_jax.config import ModelConfig
from sam3_jax.data.images import to_model_input
from sam3_jax.data.resize import resize_image
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.tracking.concepts.config import ConceptConfig
from sam3_jax.video.config import VideoConfig
from upstream_memory import Rules

FRAMES, TRACKED = 6, 3  # of the clip; after frame 0
PHRASE = "ear"
POINT, BOX = [40, 30], [10, 5, 60, 50]
# Random networks find a bit of everything everywhere.
CONCEPTS = ConceptConfig(detection_score=0.0, new_score=2.0, max_objects=3, hotstart=0)
RULES = VideoConfig(dataclasses.replace(FOUR_FRAMES, bucket_size=4), CONCEPTS)
# Float32 in another order, in frames that each read the ones before, from maps whose rounding to
# bfloat16 it may change; a mask's pixel at the very edge may be cut otherwise.
SHARE = 1e-3

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def config() -> ModelConfig:
    """One layer of each; transformers fixes the memory's width, and parts pointers into it."""
    made = tiny_predictor.config()
    made.dim, made.memory.dim = 128, 64
    made.memory.attention_depth = made.memory.fuser_depth = 1
    made.vision.layer_norm_eps = LAYER_NORM_EPS
    return made


SIDE = config().image_size


@pytest.fixture(scope="module")
def model() -> Sam3VideoModel:
    """As it is shipped, but for thresholds; concept and objects mostly are there."""
    made = oracle.randomize(oracle.video(config()), seed=3)
    made.detector_model.detr_decoder.clamp_presence_logit_max_val = PRESENCE_CLAMP
    made.score_threshold_detection = CONCEPTS.detection_score
    made.new_det_thresh = CONCEPTS.new_score
    made.max_num_objects = CONCEPTS.max_objects
    made.hotstart_delay = CONCEPTS.hotstart
    with torch.no_grad():
        made.detector_model.detr_decoder.presence_head.layer3.bias += 4.0
        made.tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias += 4.0
    return made


@pytest.fixture(scope="module")
def tracker(model) -> Sam3TrackerVideoModel:
    return oracle.adopt(oracle.tracker_video(config()), model)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """Neither square nor of the model's size."""
    return video_session.clip()[:FRAMES]


@pytest.fixture(scope="module")
def predictor(model) -> HfVideoPredictor:
    params = jax.tree.map(jnp.asarray, params_from_hf(model, config()))
    return HfVideoPredictor(params, config(), RULES)


def video_processor() -> Sam2VideoVideoProcessor:
    half = [0.5] * 3
    size = {"height": SIDE, "width": SIDE}
    return Sam2VideoVideoProcessor(size=size, image_mean=half, image_std=half)


@pytest.fixture(scope="module")
def clicked(tracker, clip) -> list[np.ndarray]:
    """transformers' logits (3, h, w) of a point's, a box's and a mask's object on each frame."""
    size = {"height": SIDE, "width": SIDE}
    processor = Sam3TrackerVideoProcessor(
        Sam3ImageProcessor(size=size), video_processor(), target_size=SIDE
    )
    session = processor.init_video_session(video=clip)

    def large(masks: torch.Tensor) -> torch.Tensor:
        return processor.post_process_masks([masks], [clip.shape[1:3]], binarize=False)[0]

    def add(number: int, **prompt: object) -> torch.Tensor:
        processor.add_inputs_to_inference_session(session, 0, number, **prompt)
        return large(tracker(inference_session=session, frame_idx=0).pred_masks)

    first = add(1, input_points=[[[POINT]]], input_labels=[[[1]]])
    add(2, input_boxes=[[BOX]])
    add(3, input_masks=first)
    return [
        large(out.pred_masks)[:, 0].numpy()
        for out in tracker.propagate_in_video_iterator(
            session, start_frame_idx=0, max_frame_num_to_track=TRACKED
        )
    ]


def test_points_box_and_mask(predictor, clip, clicked):
    session = predictor.start(clip)
    ids = [session.add_points(0, [POINT], [1]), session.add_box(0, BOX)]
    ids.append(add_mask_logits(session, 0, video_logits(session, ids[0], 0)))
    for frame in session.propagate(0, 1 + TRACKED):
        for i, expected in zip(ids, clicked[frame.index], strict=True):
            assert np.ptp(expected) > 1, "an object that is absent compares nothing"
            actual = video_logits(session, i, frame.index)
            assert_close(actual, expected, SHARE, f"object {i}, frame {frame.index}")


def test_clicks_depart(tracker, clip, clicked):
    """From upstream, by more than what the comparison allows."""
    features = [encode_frame(tracker, to_model_input(x, (SIDE, SIDE))) for x in clip]
    upstream = Upstream(tracker, features, 3, Rules("session", FRAMES))
    size = clip.shape[1:3]
    scale = SIDE / np.array(size[::-1])
    upstream.prompt(0, 0, [POINT] * scale, np.array([1]))
    upstream.prompt(0, 1, np.reshape(BOX, (2, 2)) * scale, np.array([2, 3]))
    upstream.prompt_mask(0, 2, clicked[0][0] > 0)
    upstream.finish_prompts(0)
    for t in range(1, 1 + TRACKED):
        for found, expected in zip(upstream.track(t), clicked[t], strict=True):
            small = torch.from_numpy(found.mask)[None, None]
            large = torch.nn.functional.interpolate(small, size, mode="bilinear")[0, 0].numpy()
            assert np.abs(large - expected).max() > 5 * SHARE * np.ptp(expected)


def hf_phrase(model: Sam3VideoModel, clip: np.ndarray) -> Iterator[tuple]:
    """transformers' outputs of each frame, as the model and as the processor gives them."""
    pixels = video_processor()(videos=clip, return_tensors="pt").pixel_values_videos[0]
    session = Sam3VideoInferenceSession(pixels, *clip.shape[1:3], dtype=torch.float32)
    number = session.add_prompt(PHRASE)
    ids = default_tokenizer()([PHRASE])
    session.prompt_input_ids[number] = torch.from_numpy(np.asarray(ids, np.int64))
    session.prompt_attention_masks[number] = torch.from_numpy((ids != 0).astype(np.int64))
    processor = Sam3VideoProcessor.__new__(Sam3VideoProcessor)  # without a tokenizer
    for out in model.propagate_in_video_iterator(session, max_frame_num_to_track=TRACKED):
        yield out, processor.postprocess_outputs(session, out)


def test_phrase(predictor, model, clip, monkeypatch):
    monkeypatch.setattr(modeling_sam3_video, "cv_utils_kernel", False)  # not to be looked for
    session = predictor.start(clip)
    session.add_text(PHRASE)
    theirs = hf_phrase(model, clip)
    for frame, (raw, shown) in zip(session.propagate(0, 1 + TRACKED), theirs, strict=True):
        assert frame.index == raw.frame_idx
        output, logits, _ = session._timeline.tracking.latest
        assert output.ids.tolist() == sorted(raw.obj_id_to_mask)
        assert len(output.ids) > 1
        for i in output.ids.tolist():
            where = f"object {i}, frame {frame.index}"
            expected = raw.obj_id_to_mask[i][0].numpy()
            assert np.ptp(expected) > 1, where
            assert_close(logits[i], expected, SHARE, where)
            assert output.scores[i] == pytest.approx(raw.obj_id_to_score[i], abs=SHARE)
            score = raw.obj_id_to_tracker_score[i]
            assert output.tracker_scores[i] == pytest.approx(score, abs=SHARE)
        assert frame.ids.tolist() == shown["object_ids"].tolist()
        # transformers' boxes end with the last pixel. One may be on the other side of zero.
        boxes = shown["boxes"].numpy() + [0, 0, 1, 1]
        np.testing.assert_allclose(frame.boxes, boxes, rtol=0, atol=1)
        assert (frame.masks != shown["masks"].numpy()).mean() < SHARE


def test_resize_as_on_cuda():
    """A rounding less than on a CPU: one step in some of the values, no more."""
    image, size = data.chelsea(), (SIDE, SIDE)
    difference = resize_as_on_cuda(image, size).astype(int) - resize_image(image, size)
    assert np.abs(difference).max() == 1
    assert 0.01 < (difference != 0).mean() < 0.25
