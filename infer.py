"""Find things in pictures: ``python infer.py --help``. The same as the command ``sam3-infer``."""

import sys

from sam3_jax.inference.cli import main

if __name__ == "__main__":
    sys.exit(main())
