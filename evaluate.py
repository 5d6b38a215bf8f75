"""Measure predictions: ``python evaluate.py --help``. The same as the command ``sam3-evaluate``."""

import sys

from sam3_jax.evaluation.cli import main

if __name__ == "__main__":
    sys.exit(main())
