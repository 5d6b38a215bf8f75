"""``hf_variant`` against transformers' own models: tiny, unpatched, loaded from one saved folder.

This is the path of ``test_real_weights.py`` (folder of weights, conversion, pictures, prompts in
pixels, figures) with random weights, so that the published figures can be compared by anybody who
has the real ones. It also pins down each departure of transformers from upstream.
"""

from __future__ import annotations

import oracle  # first: repairs torchvision's import

# isort: split
import copy

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from transformers import Sam3ImageProcessor, Sam3Model, Sam3TrackerModel, Sam3TrackerProcessor

import tiny_predictor
from hf_variant import (
    LAYER_NORM_EPS,
    PRESENCE_CLAMP,
    HfPredictor,
    click_figures,
    concept_figures,
)
from parity import TINY, assert_close
from sam3_jax import config as configs
from sam3_jax.checkpoint import load
from sam3_jax.convert.convert import convert
from sam3_jax.convert.source import open_source
from sam3_jax.data.images import to_model_input
from sam3_jax.inference.programs import RawOutput
from sam3_jax.inference.prompts import Prompt
from sam3_jax.tokenizer import default_tokenizer

SIDE = configs.tiny().image_size
BOX, OTHER_BOX = [60, 20, 150, 170], [10.5, 100, 80, 190]
# Of the whole spread: what a departure must change at least to be held by TINY, ten times that.
SEEN = 10 * TINY


def picture() -> Image.Image:
    """scikit-image's CC0 cat, 240 x 200: neither square nor of the model's size."""
    return Image.fromarray(data.chelsea()).resize((240, 200))


@pytest.fixture(scope="module")
def video_model():
    """Everything of the release in one model, random, with HF's settings."""
    config = tiny_predictor.config()
    config.vision.layer_norm_eps = LAYER_NORM_EPS
    config.memory.dim = 64  # transformers does not configure it everywhere
    model = oracle.randomize(oracle.video(config), seed=3)
    with torch.no_grad():
        embeddings = model.detector_model.vision_encoder.backbone.embeddings
        # Faint patches, so that eps of the first LayerNorm counts.
        embeddings.patch_embeddings.projection.weight.mul_(0.01)
        embeddings.position_embeddings.mul_(0.01)
        # Presence beyond its clamp for some prompts and within for others.
        model.detector_model.detr_decoder.presence_head.layer3.weight.mul_(20)
        # A no-memory embedding that cannot be overlooked, mask logits far beyond 32.
        model.tracker_model.no_memory_embedding.mul_(4)
        for mlp in model.tracker_model.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def folder(video_model, tmp_path_factory):
    """Saved as the hub holds the release."""
    path = tmp_path_factory.mktemp("hf") / "sam3"
    video_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def detector(folder):
    model = Sam3Model.from_pretrained(folder).eval()
    assert model.detr_decoder.clamp_presence_logit_max_val == PRESENCE_CLAMP  # as it is shipped
    return model


@pytest.fixture(scope="module")
def tracker(video_model):
    config = tiny_predictor.config()
    config.vision.layer_norm_eps = LAYER_NORM_EPS
    return oracle.adopt(oracle.tracker(config), video_model)


@pytest.fixture(scope="module")
def loaded(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert(open_source(str(folder)), output)
    return load(output)


@pytest.fixture(scope="module")
def variant(loaded):
    predictor = HfPredictor(loaded.params, loaded.config)
    predictor.set_image(picture())
    return predictor


def image_processor() -> Sam3ImageProcessor:
    return Sam3ImageProcessor(size={"height": SIDE, "width": SIDE})


def spread(array: np.ndarray) -> float:
    return float(np.ptp(array))


@torch.no_grad()
def hf_concepts(detector: Sam3Model, prompts: list[Prompt]) -> tuple[list[RawOutput], list[dict]]:
    """transformers' raw and post-processed outputs of prompts answered in one batch."""
    image = image_processor()(picture(), return_tensors="pt")
    ids = default_tokenizer()([prompt.text or "visual" for prompt in prompts])
    inputs = {
        "input_ids": torch.from_numpy(np.asarray(ids, np.int64)),
        "attention_mask": torch.from_numpy((ids != 0).astype(np.int64)),
        "pixel_values": image.pixel_values.expand(len(prompts), -1, -1, -1),
    }
    most = max(len(prompt.boxes) for prompt in prompts)
    if most:
        size = np.array([picture().width, picture().height] * 2)
        boxes, labels = np.full((len(prompts), most, 4), -10.0), np.full((len(prompts), most), -10)
        for i, prompt in enumerate(prompts):
            for j, box in enumerate(prompt.boxes):
                low, high = np.split(np.array(box) / size, 2)
                boxes[i, j] = np.concatenate([(low + high) / 2, high - low])
                labels[i, j] = 1 if prompt.box_labels is None else prompt.box_labels[j]
        inputs["input_boxes"] = torch.from_numpy(boxes.astype(np.float32))
        inputs["input_boxes_labels"] = torch.from_numpy(labels)
    out = detector(**inputs)
    sizes = image.original_sizes.tolist() * len(prompts)
    found = image_processor().post_process_instance_segmentation(out, 0.0, target_sizes=sizes)
    low, high = out.pred_boxes[..., :2], out.pred_boxes[..., 2:]
    fields = RawOutput(
        out.pred_logits,
        torch.cat([(low + high) / 2, high - low], -1),
        out.presence_logits[:, 0],
        out.pred_masks,
        out.semantic_seg[:, 0],
    )
    raw = [RawOutput(*(field[i].numpy() for field in fields)) for i in range(len(prompts))]
    return raw, found


def assert_same_outputs(actual: RawOutput, expected: RawOutput) -> None:
    for name in RawOutput._fields:
        value = getattr(expected, name)
        width = 2 * PRESENCE_CLAMP if name == "presence_logits" else None
        assert_close(getattr(actual, name), value, TINY, name, spread=width)


CONCEPTS = {
    "text": [Prompt("ear")],
    "text and boxes": [Prompt("ear", [BOX, OTHER_BOX], [1, 0])],
    "boxes": [Prompt(None, [BOX, OTHER_BOX])],
    "text beside a box": [Prompt("ear"), Prompt(None, [BOX], [1])],
}


@pytest.mark.parametrize("kind", CONCEPTS)
def test_concepts(detector, variant, kind):
    expected, _ = hf_concepts(detector, CONCEPTS[kind])
    actual = variant.predict_raw_batch(CONCEPTS[kind])
    for one, other in zip(actual, expected, strict=True):
        assert_same_outputs(one, other)


def test_public_methods_depart_too(detector, variant):
    ((expected,), _) = hf_concepts(detector, [Prompt("a striped tail")])
    assert_same_outputs(variant.predict_raw("a striped tail"), expected)


def test_concept_figures(detector, variant):
    """Figures equal those that transformers' own processing leads to."""
    (raw,), (found,) = hf_concepts(detector, CONCEPTS["text and boxes"])
    scores = found["scores"].numpy()  # of all queries: the threshold was 0
    assert len(scores) == len(raw.pred_logits)
    low, high = np.sort(scores)[::-1][2:4]
    threshold = float(low + high) / 2  # three queries pass
    size = (picture().height, picture().width)
    figures = concept_figures(
        variant.predict_raw_batch(CONCEPTS["text and boxes"])[0], size, threshold
    )
    first = np.flatnonzero(scores > threshold)[0]
    # Pixels: float32 on coordinates of some hundreds, refined layer by layer.
    np.testing.assert_allclose(figures.pixel_box, found["boxes"][first], atol=5e-3)
    np.testing.assert_allclose(figures.score, scores[first], atol=1e-5)
    best = raw.pred_logits.argmax()
    np.testing.assert_allclose(figures.logits, np.sort(raw.pred_logits)[:-4:-1], atol=1e-4)
    box = found["boxes"][best].numpy() / np.array([*size[::-1]] * 2)
    np.testing.assert_allclose(figures.box, box, atol=2e-5)
    corner = raw.pred_masks[best, :3, :3]
    assert_close(figures.corner, corner, TINY, "corner", spread=spread(raw.pred_masks))


def hf_click(tracker: Sam3TrackerModel, given: dict, multimask: bool) -> tuple[np.ndarray, ...]:
    """transformers' IoU estimates (n,) and mask logits (n, h, w) of prompts in pixels."""
    inputs = Sam3TrackerProcessor(image_processor(), target_size=SIDE)(
        images=picture(),
        input_points=[[given["points"]]] if "points" in given else None,
        input_labels=[[given["labels"]]] if "points" in given else None,
        input_boxes=[[given["box"]]] if "box" in given else None,
        return_tensors="pt",
    )
    inputs.pop("original_sizes")
    mask = given.get("mask_input")
    mask = None if mask is None else torch.from_numpy(mask)[None, None]
    with torch.no_grad():
        out = tracker(**inputs, input_masks=mask, multimask_output=multimask)
    return out.iou_scores[0, 0].numpy(), out.pred_masks[0, 0].numpy()


POINT = {"points": [[100, 80]], "labels": [1]}
CLICKS = {
    "point": POINT,
    "points": {"points": [[100, 80], [239, 3.5]], "labels": [1, 0]},
    "box": {"box": [60, 20, 150, 170]},
}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", CLICKS)
def test_clicks(tracker, variant, kind, multimask):
    iou, masks = hf_click(tracker, CLICKS[kind], multimask)
    out = variant.predict_points(**CLICKS[kind], multimask=multimask)
    assert_close(out.low_res_logits, masks, TINY, "masks")
    np.testing.assert_allclose(out.iou, iou, atol=TINY)
    figures = click_figures(out.iou, out.low_res_logits)
    np.testing.assert_allclose(figures.iou, np.sort(iou)[::-1], atol=TINY)
    corner = masks[iou.argmax(), :3, :3]
    assert_close(figures.corner, corner, TINY, "corner", spread=spread(masks))


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("label", [1, 0])
def test_refinement(tracker, variant, label, multimask):
    """The best mask of the first click, unclamped, with a second point."""
    iou, masks = hf_click(tracker, POINT, True)
    assert np.abs(masks).max() > 64, "logits that a clamp to 32 would not change test nothing"
    given = {"points": [[100, 80], [180, 150]], "labels": [1, label]}
    theirs = given | {"mask_input": masks[iou.argmax()]}
    iou, masks = hf_click(tracker, theirs, multimask)
    first = variant.predict_points(**POINT)
    out = variant.predict_points(
        **given, mask_input=first.low_res_logits[first.iou.argmax()], multimask=multimask
    )
    assert_close(out.low_res_logits, masks, 2 * TINY, "masks")  # two clicks in a row
    np.testing.assert_allclose(out.iou, iou, atol=2 * TINY)


# The rest asks torch alone: do the departures change what these weights give? Then the agreement
# above says that the variant has them. (That ours without them is upstream: test_parity.py.)


def share_changed(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max()) / spread(expected)


def model_input() -> np.ndarray:
    return to_model_input(np.asarray(picture()), (SIDE, SIDE))[None]


def test_class_token_and_presence_clamp_are_departures(detector):
    repaired = copy.deepcopy(detector)
    repaired.detr_decoder.clamp_presence_logit_max_val = float("inf")
    (prompt,) = CONCEPTS["text"]
    ((hf,), _) = hf_concepts(detector, [prompt])
    upstream = oracle.run_detector(repaired, model_input(), default_tokenizer()([prompt.text]))
    assert share_changed(hf.pred_masks, upstream["pred_masks"][0]) > SEEN

    ((clamped,), _) = hf_concepts(detector, CONCEPTS["boxes"])
    ((free,), _) = hf_concepts(repaired, CONCEPTS["boxes"])
    assert abs(clamped.presence_logits) == PRESENCE_CLAMP
    assert abs(free.presence_logits) > PRESENCE_CLAMP + SEEN * 2 * PRESENCE_CLAMP
    assert 1 < abs(hf.presence_logits) < PRESENCE_CLAMP


def test_no_memory_embedding_is_a_departure(tracker):
    _, hf = hf_click(tracker, POINT, True)
    points = np.array(POINT["points"]) / picture().size * SIDE
    upstream = oracle.run_click(tracker, model_input(), points, POINT["labels"])
    assert share_changed(hf, upstream["selected_masks"]) > SEEN


def test_layer_norm_eps_is_a_departure(loaded, tracker):
    """It comes with the container."""
    assert loaded.config.vision.layer_norm_eps == LAYER_NORM_EPS
    config = copy.deepcopy(loaded.config)
    config.vision.layer_norm_eps = 1e-5
    other = oracle.tracker(config)
    other.load_state_dict(tracker.state_dict())
    hf, upstream = (oracle.run_vision(m, model_input())["trunk"] for m in (tracker, other))
    assert share_changed(hf, upstream) > SEEN
