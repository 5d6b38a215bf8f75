"""The oracle itself: its repairs of transformers, its weights, its checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import oracle
from sam3_jax import config

# Two orders of summing the same float32 numbers; activations here are of order one.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
TOKENS = np.zeros((2, 32), np.int64)
TOKENS[0, :4] = [49406, 2368, 1234, 49407]
TOKENS[1, :6] = [49406, 320, 12, 14000, 25000, 49407]
BOXES = np.array([[[0.3, 0.4, 0.2, 0.3], [0.9, 0.6, 0.4, 0.4]]] * 2, np.float32)
LABELS = np.array([[1, 0], [0, 1]])


@pytest.fixture(scope="module")
def detector():
    return oracle.add_point_prompts(oracle.randomize(oracle.tiny_detector(), 0), 0)


@pytest.fixture(scope="module")
def tracker():
    return oracle.randomize(oracle.tiny_tracker(), 0)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def image(detector, pixels):
    return oracle.encode_image(detector, pixels)


@pytest.fixture(scope="module")
def click_image(tracker, pixels):
    return oracle.encode_click_image(tracker, pixels[:1])


def roi_by_definition(image: np.ndarray, box: np.ndarray, bins: int) -> np.ndarray:
    """torchvision's kernel sample by sample: image (c, h, w), box xyxy in cells."""
    _, height, width = image.shape
    x0, y0 = box[:2]
    size = np.maximum(box[2:] - box[:2], 1.0)[::-1] / bins  # of a bin: y, x
    counts = [max(math.ceil(s), 1) for s in size]
    out = np.zeros((image.shape[0], bins, bins))
    for by, bx, iy, ix in np.ndindex(bins, bins, *counts):
        y = y0 + by * size[0] + (iy + 0.5) * size[0] / counts[0]
        x = x0 + bx * size[1] + (ix + 0.5) * size[1] / counts[1]
        if not (-1 <= y <= height and -1 <= x <= width):
            continue
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        for yy, xx in np.ndindex(2, 2):
            row, column = min(int(y) + yy, height - 1), min(int(x) + xx, width - 1)
            weight = abs(1 - yy - (y - int(y))) * abs(1 - xx - (x - int(x)))
            out[:, by, bx] += weight * image[:, row, column]
    return out / math.prod(counts)


@pytest.mark.parametrize(
    "box",
    [
        (1.0, 2.0, 6.5, 7.9),
        (-3.0, -2.5, 4.0, 9.0),  # samples more than one cell outside count as zero
        (5.0, 4.0, 40.0, 30.0),
        (8.8, 5.9, 8.9, 6.0),  # a side below one cell counts as one, here over the border
    ],
)
def test_roi_align_follows_the_definition(rng, box):
    image = rng.standard_normal((3, 7, 9)).astype(np.float32)
    box = np.array(box, np.float32)
    got = oracle.roi_align(torch.from_numpy(image)[None], [torch.from_numpy(box)[None]], 7)
    # Coordinates of up to 40 carry float32 rounding of 4e-6 into the interpolation weights.
    np.testing.assert_allclose(got[0], roi_by_definition(image, box, 7), atol=1e-4)


def test_roi_align_without_boxes_is_empty():
    got = oracle.roi_align(torch.zeros(2, 3, 7, 9), [torch.zeros(0, 4)] * 2, 7)
    assert got.shape == (0, 3, 7, 7)


def test_norm_eps_is_upstreams(detector, tracker):
    eps = {m.eps for m in detector.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {1e-5}
    eps = {n: m.eps for n, m in tracker.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {n for n, e in eps.items() if e == 1e-6} == {
        "prompt_encoder.mask_embed.layer_norm1",
        "prompt_encoder.mask_embed.layer_norm2",
        "mask_decoder.upscale_layer_norm",
    }
    assert set(eps.values()) == {1e-5, 1e-6}


def test_with_boxes_the_detector_agrees_with_transformers_forward(detector, image):
    got = oracle.run_detector(detector, image, TOKENS, BOXES, LABELS)
    with torch.no_grad():
        want = detector(
            vision_embeds=image,
            input_ids=torch.from_numpy(TOKENS),
            attention_mask=torch.from_numpy((TOKENS != 0).astype(np.int64)),
            input_boxes=torch.from_numpy(BOXES),
            input_boxes_labels=torch.from_numpy(LABELS),
        )
    centre, size = np.split(got["pred_boxes"], 2, -1)
    corners = np.concatenate([centre - size / 2, centre + size / 2], -1)
    np.testing.assert_allclose(corners, want.pred_boxes, **CLOSE)
    np.testing.assert_allclose(got["presence_logits"], want.presence_logits[:, 0], **CLOSE)
    np.testing.assert_allclose(got["semantic_seg"], want.semantic_seg[:, 0], **CLOSE)
    for name in ("pred_logits", "pred_masks"):
        np.testing.assert_allclose(got[name], want[name], **CLOSE)


def test_text_alone_still_has_the_class_token(detector, image):
    got = oracle.run_detector(detector, image, TOKENS)
    assert got["geometry_mask"].tolist() == [[True], [True]]
    padded = oracle.run_detector(
        detector, image, TOKENS, BOXES, LABELS, box_mask=np.zeros((2, 2), bool)
    )
    assert padded["geometry_mask"].sum() == 2
    for name in ("memory", "pred_logits", "pred_boxes", "pred_masks", "semantic_seg"):
        np.testing.assert_allclose(padded[name], got[name], **CLOSE)


def test_points_come_before_boxes_and_class_token(detector, image):
    points = np.array([[[0.2, 0.7]], [[0.5, 0.1]]], np.float32)
    mask = np.array([[True], [False]])
    got = oracle.run_detector(
        detector, image, TOKENS, BOXES, LABELS, points=points, point_mask=mask
    )
    assert got["geometry_mask"].tolist() == [[True] * 4, [True] * 3 + [False]]
    without = oracle.run_detector(detector, image, TOKENS, BOXES, LABELS)
    np.testing.assert_allclose(got["pred_logits"][1], without["pred_logits"][1], **CLOSE)
    assert np.abs(got["pred_logits"][0] - without["pred_logits"][0]).max() > 1e-2
    with pytest.raises(ValueError, match="geometry for 1 prompts, but text for 2"):
        oracle.run_detector(detector, image, TOKENS, BOXES[:1], LABELS[:1])


def test_presence_is_not_clamped(detector, image):
    before = oracle.run_detector(detector, image, TOKENS)["presence_logits"]
    raised = copy.deepcopy(detector)
    with torch.no_grad():
        raised.detr_decoder.presence_head.layer3.bias += 30
    after = oracle.run_detector(raised, image, TOKENS)["presence_logits"]
    np.testing.assert_allclose(after, before + 30, **CLOSE)


def test_prompts_choose_their_image(detector, pixels):
    got = oracle.run_detector(detector, pixels, TOKENS[[0, 1, 1]], image_ids=[1, 1, 0])
    want = oracle.run_detector(detector, pixels[:1], TOKENS[1:])
    np.testing.assert_allclose(got["pred_masks"][2:], want["pred_masks"], **CLOSE)


def test_padding_does_not_reach_the_phrase(detector):
    short, long = TOKENS[:1, :4], TOKENS[:1]
    got, want = (oracle.run_text(detector, ids) for ids in (long, short))
    np.testing.assert_allclose(got["tokens"][:, :4], want["tokens"], **CLOSE)
    assert got["mask"].sum() == 4


def test_dac_keeps_the_first_half_and_isolates_the_second(detector, image):
    def run(dac: bool) -> dict:
        return oracle.run_detector(detector, image, TOKENS, BOXES, LABELS, dac=dac)

    plain, both = run(False), run(True)
    count = plain["pred_logits"].shape[1]
    assert both["layer_logits"].shape[2] == 2 * count == both["pred_masks"].shape[1]
    for name in ("layer_boxes", "layer_logits"):
        np.testing.assert_allclose(both[name][:, :, :count], plain[name], **CLOSE)
        assert np.abs(both[name][:, :, count:] - plain[name]).max() > 0.01
    np.testing.assert_allclose(both["layer_presence"], plain["layer_presence"], **CLOSE)
    # Another first query reaches its neighbours through self-attention, which copies skip.
    with torch.no_grad():
        detector.detr_decoder.query_embed.weight[0] *= -1
    moved = run(True)
    with torch.no_grad():
        detector.detr_decoder.query_embed.weight[0] *= -1
    change = np.abs(moved["layer_logits"] - both["layer_logits"]).max((0, 1))
    assert change[0] > 1e-2
    assert change[count] > 1e-2
    assert change[1:count].min() > 1e-4
    assert change[count + 1 :].max() < 1e-5


def test_click_agrees_with_transformers_forward(tracker, click_image):
    points, labels = np.array([[30.0, 40.0], [80.5, 61.0]]), np.array([1, 0])
    embeddings = [*click_image.high_resolution, click_image.coarse]
    for multimask in (True, False):
        got = oracle.run_click(tracker, click_image, points, labels, multimask=multimask)
        with torch.no_grad():
            want = tracker(
                image_embeddings=embeddings,
                input_points=torch.from_numpy(points).float()[None, None],
                input_labels=torch.from_numpy(labels)[None, None],
                multimask_output=multimask,
            )
        np.testing.assert_allclose(got["selected_masks"], want.pred_masks[0, 0], **CLOSE)
        np.testing.assert_allclose(got["selected_iou"], want.iou_scores[0, 0], **CLOSE)
        np.testing.assert_allclose(got["object_logits"], want.object_score_logits[0, 0, 0], **CLOSE)


def test_click_hypotheses_and_selection(tracker, click_image):
    box = np.array([10.0, 20.0, 70.0, 90.0])
    three = oracle.run_click(tracker, click_image, box=box)
    assert three["masks"].shape == (4, 32, 32)
    np.testing.assert_array_equal(three["selected_masks"], three["masks"][1:])
    one = oracle.run_click(tracker, click_image, box=box, multimask=False)
    logits = one["masks"][0]
    stable = (logits > 0.05).sum() / (logits > -0.05).sum() >= 0.98
    chosen = 0 if stable else 1 + one["iou"][1:].argmax()
    np.testing.assert_array_equal(one["selected_masks"][0], one["masks"][chosen])
    np.testing.assert_array_equal(
        three["low_res_logits"], np.clip(three["selected_masks"], -32, 32)
    )


def test_click_prompts_without_points_have_no_point_tokens(tracker, click_image, monkeypatch):
    seen = []
    decode = tracker.mask_decoder.forward

    def spy(**kwargs):
        seen.append(kwargs["sparse_prompt_embeddings"].shape[2])
        return decode(**kwargs)

    monkeypatch.setattr(tracker.mask_decoder, "forward", spy)
    previous = np.random.default_rng(1).standard_normal((32, 32)) * 5
    oracle.run_click(tracker, click_image, mask_input=previous)
    assert set(seen) == {0}
    seen.clear()
    oracle.run_click(tracker, click_image, box=np.array([10.0, 20.0, 70.0, 90.0]))
    assert set(seen) == {3}  # two corners, "not a point"


def test_click_image_has_the_no_memory_embedding_on_the_coarse_level(tracker, pixels, click_image):
    levels = oracle.run_vision(tracker, pixels[:1])["levels"]
    coarse = np.moveaxis(click_image.coarse.numpy(), 1, -1)
    embedding = tracker.no_memory_embedding.detach().numpy().reshape(1, 1, 1, -1)
    np.testing.assert_allclose(coarse, levels[2] + embedding, **CLOSE)
    with pytest.raises(ValueError, match="one image"):
        oracle.encode_click_image(tracker, pixels)


def test_randomize_is_a_function_of_the_seed(detector, tracker):
    again = oracle.randomize(oracle.tiny_detector(), 0).state_dict()
    other = oracle.randomize(oracle.tiny_detector(), 1).state_dict()
    for name, tensor in again.items():
        assert torch.equal(tensor, detector.state_dict()[name]), name
        assert not torch.equal(tensor, other[name]), name
        assert tensor.numel() == 1 or tensor.std() > 0, name
    # One trunk, two necks, one Gaussian matrix.
    theirs = tracker.state_dict()
    trunk = [n for n in theirs if n.startswith("vision_encoder.backbone.")]
    assert trunk
    assert all(torch.equal(theirs[n], again[n]) for n in trunk)
    neck = "vision_encoder.neck.fpn_layers.0.proj1.weight"
    assert not torch.equal(theirs[neck], again[neck])
    assert torch.equal(
        theirs["shared_image_embedding.positional_embedding"],
        theirs["prompt_encoder.shared_embedding.positional_embedding"],
    )


def test_random_models_are_alive(detector, tracker, image, click_image):
    out = oracle.run_detector(detector, image, TOKENS, BOXES, LABELS)
    assert 0.3 < out["memory"].std() < 5
    assert out["layer_logits"].std() > 0.3
    assert np.abs(out["layer_logits"]).max() < 12  # the scoring clamp
    assert out["layer_logits"].std(2).min() > 0.1  # queries differ, in every layer
    assert out["pred_boxes"].std((0, 1)).min() > 0.01
    assert out["layer_boxes"].min() > 0
    assert out["layer_boxes"].max() < 1
    assert np.abs(np.diff(out["layer_boxes"], axis=0)).mean((1, 2, 3)).min() > 0.01
    assert 0.1 < (out["pred_masks"] > 0).mean() < 0.9
    assert 0.5 < out["pred_masks"].std() < 20
    clicks = oracle.run_click(tracker, click_image, np.array([[50.0, 60.0]]), np.array([1]))
    assert 0.1 < (clicks["masks"] > 0).mean() < 0.9
    assert np.ptp(clicks["iou"]) > 0.1


def test_other_sizes_build(pixels):
    c = dataclasses.replace(config.tiny(), image_size=84)  # a 6x6 grid: windows of 4 are padded
    model = oracle.randomize(oracle.detector(c), 0)
    out = oracle.run_vision(model, pixels[:, :84, :84])
    assert out["trunk"].shape == (2, 6, 6, c.vision.dim)
    assert [level.shape for level in out["levels"]] == [(2, n, n, c.dim) for n in (24, 12, 6)]


def test_video_models_build_with_every_weight_set():
    for build in (oracle.tiny_tracker_video, oracle.tiny_video):
        state = oracle.randomize(build(), 0).state_dict()
        assert all(torch.isfinite(t).all() and t.abs().max() < 50 for t in state.values())


def test_fake_checkpoint_has_the_release_container(tmp_path):
    tensors = oracle.sam3_pt_tensors()
    assert len(tensors) == 1465
    assert sum(d == torch.complex64 for _, d in tensors.values()) == 32
    some = {
        n: spec
        for n, spec in tensors.items()
        if ".blocks.0." in n or n.startswith(("detector.geometry_encoder.", "tracker.no_"))
    }
    plain, wrapped = tmp_path / "plain.pt", tmp_path / "wrapped.pt"
    oracle.fake_sam3_pt(plain, 0, some)
    oracle.fake_sam3_pt(wrapped, 0, some, wrapped=True)
    state = torch.load(plain, weights_only=True)
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == some
    for name, tensor in torch.load(wrapped, weights_only=True)["model"].items():
        assert torch.equal(tensor, state[name]), name
    table = state["detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis"]
    assert torch.allclose(table.abs(), torch.ones(()))
    weight = state["detector.backbone.vision_backbone.trunk.blocks.0.mlp.fc1.weight"]
    assert weight.std().item() == pytest.approx(1024**-0.5, rel=0.01)
