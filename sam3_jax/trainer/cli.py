"""``train.py``: trains SAM 3 as a configuration file says.

    python train.py --config=configs/sam3_finetune.py \\
        --config.init.checkpoint=sam3_jax_ckpt \\
        --config.train.annotations=data/train/_annotations.coco.json \\
        --config.valid.annotations=data/valid/_annotations.coco.json \\
        --config.output=runs/first

--config.NAME=VALUE overrides any field of the configuration (sam3_jax/trainer/config.py), nested
ones with dots: --config.optimizer.rate_scale=0.05. Names and types are checked.

The same command again goes on where the run stopped. The output folder holds config.json, log.jsonl
and TensorBoard events, states/ (to resume), validation/, and at the end model/ (best_model/ too,
where an earlier state had better figures), for infer.py and evaluate.py --checkpoint.

Several hosts: start the same command on each of them with --distributed (TPU pods and Slurm find
each other; elsewhere give --coordinator, --num_processes and --process_id).

Without an accelerator a small model trains faster on devices of one thread each, --cpu_devices=2 on
two cores, than with every operation on all cores.

Exit status: 0 trained, 1 stopped by an error, 2 could not start, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from sam3_jax.trainer.memory import keep_freed_memory

_CONFIG = config_flags.DEFINE_config_file("config", None, "file whose get_config() says it all")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other hosts' processes")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this one")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "on a CPU: share the batch among so many devices of one thread", 1
)


def main() -> None:
    """The command."""
    keep_freed_memory()  # before there are threads, each of which would manage memory of its own
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    argv = [find_config(argument) for argument in sys.argv]
    for argument in argv[1:]:
        problem = _bad_name(argument)
        if problem:
            print(f"error: {argument}: {problem}", file=sys.stderr)
            raise SystemExit(2)
    app.run(_main, argv)


def find_config(argument: str) -> str:
    """Configurations are also found where the package is installed."""
    name, _, value = argument.partition("=")
    file, colon, variant = value.partition(":")
    if name.lstrip("-") != "config" or not file or Path(file).exists():
        return argument
    installed = Path(__file__).parents[1] / "configs" / Path(file).name
    return f"{name}={installed}{colon}{variant}" if installed.exists() else argument


def _bad_name(argument: str) -> str | None:
    """What is wrong with an override's name; absl would answer with a trace."""
    name = argument.lstrip("-").partition("=")[0]
    from sam3_jax.trainer.config import check_name

    return check_name(name.removeprefix("config.")) if name.startswith("config.") else None


def _main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; overrides look like --config.x=1")
    if _CONFIG.value is None:
        raise app.UsageError("give --config=FILE, such as configs/sam3_finetune.py")
    sys.exit(run())


def _share_cpu(devices: int) -> None:
    """Has XLA, which is not there yet, make devices of a thread each, beside other settings."""
    wanted = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_cpu_multi_thread_eigen=false",
    )
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *wanted]).strip()


def run() -> int:
    """Runs the configuration of the flags; returns the exit status."""
    if _CPU_DEVICES.value:
        _share_cpu(_CPU_DEVICES.value)
    import jax

    if _DISTRIBUTED.value or _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    # Only now what takes time to import, and after the processes have met.
    from absl import logging

    from sam3_jax.checkpoint import CheckpointError
    from sam3_jax.data.records import AnnotationError
    from sam3_jax.trainer.loop import train
    from sam3_jax.trainer.start import RunError

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax and TFDS tell of every file
    config = _CONFIG.value
    try:
        finished = train(config)
    except (RunError, AnnotationError, CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if not finished.complete:
        print(
            f"interrupted after step {finished.step}, which was saved; the same command goes on",
            file=sys.stderr,
        )
        return 130
    print(f"trained {finished.step} steps into {config.output}", file=sys.stderr)
    return 0
