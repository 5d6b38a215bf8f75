"""Convert SAM 3 from PyTorch: ``python convert_torch_weights.py --help``. Also ``sam3-convert``."""

import sys

from sam3_jax.convert.cli import main

if __name__ == "__main__":
    sys.exit(main())
