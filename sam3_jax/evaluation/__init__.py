"""Measuring: annotation files and predictions in, cgF1, COCO AP and mIoU with their parts out."""
