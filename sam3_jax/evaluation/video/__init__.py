"""Measuring tracks: videos in, J&F, cgF1 of mask volumes, HOTA and TETA out."""
