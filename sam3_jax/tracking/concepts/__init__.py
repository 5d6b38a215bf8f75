"""Heuristics that turn detections of a phrase and propagated masks into masklets with identities.

Masks stay on the device (:mod:`overlap`, :mod:`detections`, :mod:`cleaning`, :mod:`shrinkage`,
:mod:`outputs`: fixed shapes, compiled once); what is decided about a few hundred numbers a frame is
numpy over the table of :mod:`masklets`. :mod:`plan` puts them in order. Upstream:
``sam3/model/sam3_video_base.py``, ``sam3/model/sam3_video_inference.py``.
"""
