"""Train SAM 3: ``python train.py --help``. The same as the command ``sam3-train``."""

from sam3_jax.trainer.cli import main

if __name__ == "__main__":
    main()
