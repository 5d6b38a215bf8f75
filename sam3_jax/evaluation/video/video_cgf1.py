"""cgF1 of videos: as of pictures, with mask volumes in place of masks.

A video and a phrase are a pair, a track is an instance, and two tracks overlap as their volumes
do: common pixels of all frames over pixels of either (``VideoCGF1Evaluator`` in
``sam3/eval/saco_veval_evaluators.py`` upstream). IL_MCC is then about "is it in the video".
"""

from __future__ import annotations

from sam3_jax.evaluation.cgf1 import PairScore, score_pair
from sam3_jax.evaluation.video.overlaps import Overlaps


def count(pair: Overlaps) -> PairScore:
    """The score of one video-phrase pair; ``cgf1.accumulate`` makes the figures of many.

    A predicted track that is visible in no frame is one, and a wrong one.
    """
    return score_pair(pair.volume_iou())
