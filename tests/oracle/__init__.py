"""The oracle of the parity tests: torch SAM 3 with the released model's behaviour.

transformers' ``Sam3Model`` and ``Sam3TrackerModel`` with seeded weights, called so that they
compute what upstream's own code (facebookresearch/sam3) computes. This package is the only place
that knows their quirks::

    import oracle

    model = oracle.randomize(oracle.tiny_detector(), seed=0)
    expected = oracle.run_detector(model, pixels, token_ids, boxes, box_labels)

Arrays come and go as numpy in this project's conventions: channels last, boxes (cx, cy, w, h)
fractions, True = valid, names of ``sam3_jax.types``. All is float32 and in evaluation mode.

What transformers 5.23 computes differently, and what is done about it here. So repaired, it was
compared with upstream's own code on the same weights: every output (and the gradients through DAC)
agrees to 1e-5 of its spread at tiny size, the detector's to 3e-5 at the released size.

Detector (``sam3/model/sam3_image.py`` and what it calls, upstream):
- Prompts without boxes get no geometry tokens at all; upstream always adds the class token.
  ``geometry.encode_geometry`` does, and has the point branch, which HF left out.
- Presence logits are clamped to +-10; upstream discards its clamp. Set to infinity.
- LayerNorm eps of the ViT is 1e-6; upstream 1e-5. Configured. All others agree: 1e-5 for
  LayerNorm and GroupNorm, 1e-6 for what upstream calls LayerNorm2d (prompt encoder, mask
  decoder, memory encoder, ConvNeXt).
- No DAC. ``detection.divide_and_conquer`` adds it.
- Without an attention mask, HF attends to the padding of the text; with one, it also masks inside
  the text encoder, which changes padded positions only. Upstream's way in ``run_text``.
- Boxes come out as xyxy. Here (cx, cy, w, h).
- Dropout differs, so oracles run in evaluation mode: no dropout on attention weights, none behind
  the activation of the feed-forward networks, no drop path.
- torchvision's Python RoIAlign repeats the border where the compiled one gives zero: ``roi``.

Interactive head (``sam3/model/sam1_task_predictor.py``, ``sam3/sam/`` upstream):
- From pixels, the no-memory embedding is added to the coarsest of four levels and that level is
  then dropped; upstream adds it to the 72x72 level. ``clicks.encode_click_image`` does.
- Prompts without points and boxes get two "not a point" tokens; upstream none.
- Points padded with label -10 become zero vectors that are attended. Prompts run one by one here.
- Box corners come after the points instead of before: the same result, tokens have no order.
- Hole filling is missing. It follows the low-resolution logits; these are compared.
- The Gaussian matrix is stored twice; ``randomize`` keeps both equal, as a release does.
"""

from . import torch_import  # noqa: F401, I001  (first: repairs torchvision's import)
from .build import (
    detector,
    full_detector,
    full_tracker,
    full_tracker_video,
    full_video,
    tiny_detector,
    tiny_tracker,
    tiny_tracker_video,
    tiny_video,
    tracker,
    tracker_video,
    video,
)
from .checkpoint import fake_sam3_pt, sam3_pt_tensors
from .clicks import encode_click_image, run_click
from .detection import (
    detect,
    divide_and_conquer,
    encode_image,
    run_detector,
    run_text,
    run_vision,
)
from .geometry import add_point_prompts
from .memory import run_memory_attention, run_memory_encoder, run_object_pointer
from .roi import roi_align
from .weights import adopt, randomize

__all__ = [
    "add_point_prompts",
    "adopt",
    "detect",
    "detector",
    "divide_and_conquer",
    "encode_click_image",
    "encode_image",
    "fake_sam3_pt",
    "full_detector",
    "full_tracker",
    "full_tracker_video",
    "full_video",
    "randomize",
    "roi_align",
    "run_click",
    "run_detector",
    "run_memory_attention",
    "run_memory_encoder",
    "run_object_pointer",
    "run_text",
    "run_vision",
    "sam3_pt_tensors",
    "tiny_detector",
    "tiny_tracker",
    "tiny_tracker_video",
    "tiny_video",
    "tracker",
    "tracker_video",
    "video",
]
