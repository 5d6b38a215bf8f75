"""The published figures of the released checkpoint, for people who have it. Opt-in.

    SAM3_JAX_REAL_CHECKPOINT=sam3.pt SAM3_JAX_REAL_IMAGES=pictures pytest tests/test_real_weights.py

The first is what ``convert_torch_weights.py`` takes (``sam3.pt``, Hugging Face's folder or its
``model.safetensors``; converted into a temporary folder) or has made. The second is a folder with
the pictures of ``real_figures.PICTURES`` under the names there. On a CPU it takes some minutes.

The figures are those of transformers' integration tests (tests/models/sam3 and sam3_tracker in its
repository), so they are compared with ``hf_variant``: our model with transformers' departures,
which ``test_hf_variant.py`` compares with transformers itself at tiny size. Our model as it is must
find the same things.

Pictures: transformers resizes uint8 tensors with torchvision (antialiased bilinear, on a CPU, where
its processors run) and maps 0..255 to -1..1, as ``sam3_jax.data`` does, to the last uint8 step.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hf_variant import (
    ClickFigures,
    ConceptFigures,
    HfPredictor,
    HfSam3,
    click_figures,
    concept_figures,
    hf_settings,
)
from parity import Model, geometry
from real_checkpoint import (
    FRACTIONS,
    LOGITS,
    MASK_LOGITS,
    compare,
    mask_iou,
    real_checkpoint,
    real_files,
    skip_unless_given,
)
from real_figures import (
    BOX_CLICKS,
    CAT,
    CONCEPTS,
    DOG,
    DOG_FIGURES,
    DOG_POINTS,
    PICTURES,
    POINT,
    REFINED,
    TRUCK,
    TRUCK_POINT,
    TRUCK_SINGLE,
    Concept,
)
from sam3_jax import checkpoint
from sam3_jax.data.images import to_model_input
from sam3_jax.inference.image import ImagePredictor
from sam3_jax.inference.postprocess import ClickResult
from sam3_jax.inference.programs import RawOutput
from sam3_jax.inference.prompts import Prompt
from sam3_jax.models.sam_heads import select_masks
from sam3_jax.tokenizer import default_tokenizer
from sam3_jax.types import ClickPrompt, Levels

skip_unless_given(PICTURES)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    """Decoded as transformers' tests do: RGB, not turned by EXIF."""
    return {name: Image.open(path).convert("RGB") for name, path in real_files(PICTURES).items()}


@pytest.fixture(scope="module")
def loaded() -> checkpoint.Loaded:
    return real_checkpoint()


class Viewer:
    """A predictor that encodes a picture only when another one is asked for."""

    def __init__(self, predictor: ImagePredictor, pictures: dict[str, Image.Image]):
        self._predictor, self._pictures, self._current = predictor, pictures, ""

    def __call__(self, picture: str) -> ImagePredictor:
        if picture != self._current:
            self._predictor.set_image(self._pictures[picture])
            self._current = picture
        return self._predictor


@pytest.fixture(scope="module")
def hf(loaded, pictures) -> Viewer:
    return Viewer(HfPredictor(loaded.params, loaded.config), pictures)


@pytest.fixture(scope="module")
def ours(loaded, pictures) -> Viewer:
    return Viewer(ImagePredictor(loaded.params, loaded.config, dtype="float32"), pictures)


def hf_outputs(hf: Viewer, concept: Concept) -> RawOutput:
    prompts = [Prompt(concept.text, concept.boxes)]
    if concept.beside_box:
        prompts.append(Prompt(None, [[10, 10, 100, 100]]))  # any: only its presence counts
    return hf(concept.picture).predict_raw_batch(prompts)[0]


def check_concept(raw: RawOutput, concept: Concept, size: tuple[int, int]) -> None:
    actual, expected = concept_figures(raw, size, concept.threshold), concept.figures
    tolerances = ConceptFigures(LOGITS, FRACTIONS, MASK_LOGITS, FRACTIONS, FRACTIONS * max(size))
    for name, atol in tolerances._asdict().items():
        published = getattr(expected, name)
        np.testing.assert_allclose(
            getattr(actual, name), published, rtol=0, atol=atol, err_msg=name
        )


def check_click(actual: ClickFigures, expected: ClickFigures) -> None:
    np.testing.assert_allclose(actual.iou, expected.iou, rtol=0, atol=FRACTIONS)
    np.testing.assert_allclose(actual.corner, expected.corner, rtol=0, atol=MASK_LOGITS)


def figures_of(result: ClickResult) -> ClickFigures:
    return click_figures(result.iou, result.low_res_logits)


@pytest.mark.parametrize("name", CONCEPTS)
def test_concepts(hf, name):
    concept = CONCEPTS[name]
    raw = hf_outputs(hf, concept)
    check_concept(raw, concept, hf(concept.picture).image_size)


def test_click(hf):
    predictor = hf(TRUCK)
    check_click(figures_of(predictor.predict_points(**POINT)), TRUCK_POINT)
    check_click(figures_of(predictor.predict_points(**POINT, multimask=False)), TRUCK_SINGLE)


@pytest.mark.parametrize("label", REFINED)
def test_refinement(hf, label):
    first = hf(TRUCK).predict_points(**POINT)
    result = hf(TRUCK).predict_points(
        [[500, 375], [1125, 625]],
        [1, label],
        mask_input=first.low_res_logits[first.iou.argmax()],
        multimask=False,
    )
    check_click(figures_of(result), REFINED[label])


@pytest.mark.parametrize(("picture", "box", "iou", "logit"), BOX_CLICKS)
def test_box_click(hf, picture, box, iou, logit):
    result = hf(picture).predict_points(box=box, multimask=False)
    np.testing.assert_allclose(result.iou, [iou], rtol=0, atol=FRACTIONS)
    np.testing.assert_allclose(result.low_res_logits[0, 0, 0], logit, rtol=0, atol=MASK_LOGITS)


@pytest.fixture(scope="module")
def batch_model(loaded) -> Model:
    params, config = hf_settings(loaded.params, loaded.config)
    model = Model(config, params)
    model.module = HfSam3(config)
    return model


def batch_levels(model: Model, images: list[Image.Image], *, detector: bool) -> Levels:
    """Pyramids of several images, encoded one by one."""
    side = model.config.image_size
    pyramids = []
    for image in images:
        pixels = to_model_input(np.asarray(image), (side, side))[None]
        out = model("encode_image", pixels, detector=detector, tracker=not detector)
        pyramids.append(out.detector if detector else out.tracker)
    return tuple(map(jnp.concatenate, zip(*pyramids, strict=True)))


def test_concepts_in_a_batch_of_images(batch_model, pictures):
    concepts = [CONCEPTS["ear"], CONCEPTS["dial"]]
    images = [pictures[concept.picture] for concept in concepts]
    levels = batch_levels(batch_model, images, detector=True)
    text = batch_model("encode_text", default_tokenizer()([c.text for c in concepts]))
    each = np.arange(2)
    out = batch_model("ground", levels, text, geometry(2), each, each)
    for i, (concept, image) in enumerate(zip(concepts, images, strict=True)):
        raw = RawOutput(*(np.asarray(getattr(out, name)[i]) for name in RawOutput._fields))
        check_concept(raw, concept, image.size[::-1])


def test_clicks_in_a_batch_of_images(batch_model, pictures):
    """The padding of the first prompt is not seen (by transformers it is: IoU .8837)."""
    images = [pictures[TRUCK], pictures[DOG]]
    levels = batch_levels(batch_model, images, detector=False)
    frame, side = batch_model.config.image_size, levels[0].shape[1]
    points, labels = np.zeros((2, 2, 2), np.float32), np.full((2, 2), -2, np.int32)
    for i, (given, image) in enumerate(zip((POINT, DOG_POINTS), images, strict=True)):
        count = len(given["labels"])
        points[i, :count] = np.array(given["points"]) / image.size * frame
        labels[i, :count] = given["labels"]
    nothing = np.zeros((2, side, side), np.float32), np.zeros(2, bool)
    prompt = ClickPrompt(*map(jnp.asarray, (points, labels, *nothing)))
    out = batch_model("click", levels, prompt, np.arange(2))
    masks, iou = select_masks(out, batch_model.config.sam, multimask=True)
    for i, published in enumerate((TRUCK_POINT, DOG_FIGURES)):
        check_click(click_figures(np.asarray(iou[i]), np.asarray(masks[i])), published)


CAT_PROMPTS = [Prompt(c.text, c.boxes) for c in CONCEPTS.values() if c.picture == CAT]


def test_ours_finds_the_same(hf, ours):
    """Upstream's class token and eps move logits, not what is found. Nobody published by how much:
    these bounds say "the same objects".
    """
    theirs = hf(CAT).predict_many(CAT_PROMPTS)
    for a, b in zip(theirs, ours(CAT).predict_many(CAT_PROMPTS), strict=True):
        difference = compare(a, b)
        assert difference.mask_iou.min() >= 0.9, difference
        assert difference.scores.max() <= 0.1, difference


def test_ours_segments_the_same_clicks(hf, ours):
    """Nor does the no-memory embedding; boxes leave no doubt which object is meant."""
    for picture, box, *_ in BOX_CLICKS[:4]:
        a, b = (v(picture).predict_points(box=box, multimask=False).masks for v in (hf, ours))
        assert mask_iou(a, b).item() >= 0.9, box


def test_bfloat16_gate(ours, loaded, pictures):
    """The margins that other implementations pass, against our float32."""
    half = ImagePredictor(loaded.params, loaded.config, dtype="bfloat16")
    half.set_image(pictures[CAT])
    exact, low = ours(CAT).predict_many(CAT_PROMPTS), half.predict_many(CAT_PROMPTS)
    found = [compare(a, b) for a, b in zip(exact, low, strict=True)]
    overlap = np.concatenate([one.mask_iou for one in found])
    assert overlap.min() >= 0.95
    assert overlap.mean() >= 0.99
    assert max(one.boxes.max() for one in found) <= 2.0
    assert max(one.scores.max() for one in found) <= 0.025
