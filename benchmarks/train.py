"""What a training step needs: memory a chip, compiled ahead of time, and the matcher's time.

The step is the released size's (860M parameters, bfloat16 compute, float32 state, AdamW), with
one-to-many queries, mask and semantic losses at 288 x 288, 200 target slots and remat everywhere.
The matcher is the host's on TPUs; on GPUs it is the device's, as jax cannot compile a callback for
a GPU that is not there. No chip is needed: see ``benchmarks/aot.py`` for the packages. A device
whose packages are missing is left out and named::

    python benchmarks/train.py --json benchmarks/results/train.json
    python benchmarks/train.py --case v5e:1x16x1:16:2:full --no-matcher --quick

Compiling the whole step takes memory of this machine: 10 GB and 10 minutes of a core for a GPU,
13 GB and 6 to 9 minutes for a TPU, where equal blocks are loops (``sam3_jax/models/scan.py``).

A case is DEVICE:DATAxFSDPxTENSOR:IMAGES:PROMPTS:MASKS: images over all chips, prompts an image, and
masks compared at "full" size (the release) or at 12544 "points". With "clips" it is the tracker's
step (``configs/sam3_tracker.py``): clips of 8 frames over all chips, and objects a clip. FLOPs are
left out: XLA counts the body of a loop once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the benchmarks beside it are imported by their full name
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.aot import H100, MEMORY_GB, QUICK, TARGET  # first: it sets jax up to compile only

# isort: split
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import matcher
from sam3_jax.config import ModelConfig, rematerialized, sam3
from sam3_jax.models.detector import empty_geometry, init_shapes
from sam3_jax.sharding import batch_sharding, make_mesh, param_shardings
from sam3_jax.training.batch import Clicks, TrainBatch
from sam3_jax.training.clicks import ClickConfig
from sam3_jax.training.clip_batch import ClipBatch
from sam3_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer, tracking
from sam3_jax.training.state import TrainState, init_state
from sam3_jax.training.step import StepConfig, make_train_step, unused_parameters
from sam3_jax.training.targets import LossConfig, Targets
from sam3_jax.training.tracker_clip import TrackerTrainingConfig
from sam3_jax.training.tracker_step import make_clip_step, unused_by_clips

# Besides: products that wait for their whole operand, instead of a loop over the parts that other
# chips hold, which XLA unrolls. It saves a tenth of the time to compile and a fifth of its memory.
QUICK_TPU = QUICK | {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}
# No product by Triton: without a GPU to time them on, XLA takes tiles that fail for a few.
GPU = {"xla_gpu_enable_triton_gemm": False}
AXES = {"v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of a TPU's grid of chips
CHIP_GB = {**MEMORY_GB, "v5p": 95}
POINTS = 12544
TARGETS = 200
MASK_SIDE = 288
EXEMPLARS = 1
CLIPS, FRAMES = "clips", 8
CASES = (
    "v5e:1x16x1:16:1:points v5e:1x16x1:16:1:full v5e:1x16x1:16:2:points v5e:1x16x1:16:4:points "
    "v5e:16x16x1:256:1:points v5e:1x16x1:16:3:clips v5p:1x16x1:16:1:points v6e:1x16x1:16:1:points "
    "h100:1x1x1:4:1:points h100:1x1x1:4:1:full h100:1x1x1:4:2:points h100:1x1x1:4:4:points"
).split()


class Case(NamedTuple):
    """``data`` x ``fsdp`` x ``tensor`` chips; ``images`` over all of them, ``prompts`` an image.

    With ``masks`` "clips": clips, and objects of each.
    """

    device: str
    data: int
    fsdp: int
    tensor: int
    images: int
    prompts: int
    masks: str

    def __str__(self) -> str:
        mesh = f"{self.data}x{self.fsdp}x{self.tensor}"
        return f"{self.device}:{mesh}:{self.images}:{self.prompts}:{self.masks}"


def parse_case(text: str) -> Case:
    """``"v5e:1x16x1:16:1:full"`` to a case; ValueError (which argparse reports) otherwise."""
    device, mesh, images, prompts, masks = text.split(":")
    data, fsdp, tensor = mesh.split("x")
    if device not in CHIP_GB:
        raise ValueError(f"{device!r}: choose one of {sorted(CHIP_GB)}")
    if masks not in ("full", "points", CLIPS):
        raise ValueError(f"masks {masks!r}: choose full, points or clips")
    return Case(device, int(data), int(fsdp), int(tensor), int(images), int(prompts), masks)


def device_mesh(case: Case) -> Mesh:
    """Compile-only chips of a case as a mesh; of TPUs a grid as square as a power of two can be.

    Raises:
      RuntimeError: where the packages that compile for the device are not installed.
    """
    jax.devices("cpu")  # first, so that jax starts no other backend
    chips = case.data * case.fsdp * case.tensor
    if case.device == H100:
        name = f"1x1x{chips}"
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=name, target_config=TARGET.read_text()
        )
    else:
        grid = [1] * AXES[case.device]
        while math.prod(grid) < chips:
            grid[grid.index(min(grid))] *= 2
        grid.sort()
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{case.device}:{'x'.join(map(str, grid))}",
            chips_per_host_bounds=tuple(map(min, [*grid, 1][:3], (2, 2, 1))),
        )
    return make_mesh(case.data, case.tensor, fsdp=case.fsdp, devices=list(topology.devices))


def model_config(case: Case) -> ModelConfig:
    """The released size, every stage computed again in the backward pass; for TPUs in loops."""
    return rematerialized(sam3(), scan=case.device != H100)


def matcher_of(case: Case) -> str:
    """The host's where jax can compile a callback ahead of time."""
    return "device" if case.device == H100 else "host"


def optimizer_of(config: ModelConfig, loss: LossConfig) -> Optimizer:
    """The released recipe's over a run of some length; what the loss does not reach is frozen."""
    frozen = unused_parameters(loss, ClickConfig())
    settings = OptimizerConfig(freeze=frozen)
    return make_optimizer(settings, depth=config.vision.depth, total=1000)


def state_shapes(config: ModelConfig, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """The training state as shapes, placed on ``mesh``."""
    shapes = jax.eval_shape(lambda params: init_state(params, optimizer), init_shapes(config))
    return _placed(shapes, param_shardings(shapes, mesh))


def batch_shapes(config: ModelConfig, case: Case, mesh: Mesh, mask_side: int) -> TrainBatch:
    """A batch as shapes, split over ``mesh``: every slot for targets, one exemplar a prompt."""
    side, rows = config.image_size, case.images * case.prompts

    def batch() -> TrainBatch:
        yes = jnp.zeros((rows, TARGETS), bool)
        targets = Targets(
            boxes=jnp.zeros((rows, TARGETS, 4)),
            valid=yes,
            masks=jnp.zeros((rows, TARGETS, mask_side, mask_side), bool),
            mask_valid=yes,
            semantic=jnp.zeros((rows, mask_side, mask_side), bool),
            exhaustive=yes[:, 0],
            prompt_valid=yes[:, 0],
        )
        none = (case.images, 0)
        clicks = Clicks(
            jnp.zeros((*none, 2, 2)),
            jnp.zeros((*none, 2), jnp.int32),
            jnp.zeros((*none, mask_side, mask_side), bool),
            jnp.zeros(none, bool),
        )
        pixels = jnp.zeros((case.images, side, side, 3), jnp.uint8)
        tokens = jnp.zeros((rows, config.text.context_length), jnp.int32)
        return TrainBatch(pixels, tokens, empty_geometry(rows, boxes=EXEMPLARS), targets, clicks)

    shapes = jax.eval_shape(batch)
    return _placed(shapes, jax.tree.map(lambda _: batch_sharding(mesh), shapes))


def clip_shapes(config: ModelConfig, case: Case, mesh: Mesh, mask_side: int) -> ClipBatch:
    """A batch of clips as shapes, split over ``mesh``."""
    side, clips, objects = config.image_size, case.images, case.prompts

    def batch() -> ClipBatch:
        return ClipBatch(
            jnp.zeros((clips, FRAMES, side, side, 3), jnp.uint8),
            jnp.zeros((clips, objects, FRAMES, mask_side, mask_side), bool),
            jnp.zeros((clips, objects, FRAMES), bool),
            jnp.zeros((clips, objects), bool),
        )

    shapes = jax.eval_shape(batch)
    return _placed(shapes, jax.tree.map(lambda _: batch_sharding(mesh), shapes))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def compile_step(
    config: ModelConfig,
    mesh: Mesh,
    case: Case,
    *,
    method: str | None = None,
    mask_side: int = MASK_SIDE,
    quick: bool = False,
) -> jax.stages.Compiled:
    """The step of a case compiled for the chips of ``mesh``.

    Args:
      method: of the matcher; default: :func:`matcher_of`.
      quick: with XLA's least effort.
    """
    step = StepConfig(matcher=method or matcher_of(case))
    if case.masks == CLIPS:
        tracker = TrackerTrainingConfig()
        settings = dataclasses.replace(tracking(), freeze=unused_by_clips(tracker))
        optimizer = make_optimizer(settings, depth=config.vision.depth, total=10_000)
        run = make_clip_step(config, tracker, optimizer, step)
        batch = clip_shapes(config, case, mesh, mask_side)
    else:
        loss = LossConfig(mask_points=POINTS if case.masks == "points" else 0)
        optimizer = optimizer_of(config, loss)
        run = make_train_step(config, loss, optimizer, step)
        batch = batch_shapes(config, case, mesh, mask_side)
    state = state_shapes(config, optimizer, mesh)
    with jax.set_mesh(mesh):
        lowered = run.lower(state, batch)
    if case.device == H100:
        options = GPU | (QUICK if quick else {})
    else:
        options = QUICK_TPU if quick else None
    return lowered.compile(compiler_options=options)


def measure(compiled: jax.stages.Compiled) -> dict[str, float]:
    """GB of memory a chip.

    ``total_gb`` is what a chip must have: a donated argument's memory is its output's.
    """
    memory = compiled.memory_analysis()
    sizes = {
        "arguments_gb": memory.argument_size_in_bytes,
        "new_outputs_gb": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries_gb": memory.temp_size_in_bytes,
        "code_gb": memory.generated_code_size_in_bytes,
    }
    result = {name: size / 1e9 for name, size in sizes.items()}
    return result | {"total_gb": sum(sizes.values()) / 1e9}


COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter|"
    r"ragged-all-to-all)(-start)?\("
)
SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


class Collective(NamedTuple):
    """Arrays that chips exchange in one operation of a compiled program."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]


def collectives(text: str) -> list[Collective]:
    """What a compiled program (``as_text``) sends between chips."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            result = line[line.index(" = ") : match.start()]
            shapes = (tuple(map(int, filter(None, s.split(",")))) for s in SHAPE.findall(result))
            found.append(Collective(match[1], tuple(shapes)))
    return found


COLUMNS = ("arguments_gb", "temporaries_gb", "total_gb", "compile_s")


def table(rows: list[dict]) -> str:
    """Markdown table of the measured cases."""
    head = ["device", "data x fsdp x tensor", "images", "prompts", "masks", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        case = parse_case(row["case"])
        mesh = f"{case.data} x {case.fsdp} x {case.tensor}"
        names = [case.device, mesh, str(case.images), str(case.prompts), case.masks]
        cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in COLUMNS]
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    return "\n".join(lines)


def compile_cases(cases: list[Case], path: Path | None, *, quick: bool) -> list[dict]:
    """A row for each case that can be compiled here; written one by one."""
    rows: list[dict] = []
    missing: set[str] = set()
    for case in cases:
        if case.device in missing:
            continue
        try:
            mesh = device_mesh(case)
        except (RuntimeError, ImportError, OSError) as error:
            missing.add(case.device)
            print(f"{case.device} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        start = time.perf_counter()
        compiled = compile_step(model_config(case), mesh, case, quick=quick)
        row = {"case": str(case), "chip_gb": CHIP_GB[case.device], "quick": quick}
        row |= {"matcher": matcher_of(case)}
        row |= measure(compiled) | {"compile_s": time.perf_counter() - start}
        rows.append(row)
        print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
        if path:
            write(path, rows=rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", type=parse_case, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="compile with XLA's least effort")
    parser.add_argument("--no-matcher", action="store_true", help="compile only")
    parser.add_argument("--json", type=Path, help="where to write; other cases in it stay")
    args = parser.parse_args()
    times = []
    if not args.no_matcher:  # first: compiling leaves threads behind
        times = [matcher.measure(p, n, 3) for p in (1, 4, 16) for n in (16, TARGETS)]
        print(matcher.table(times) + "\n", flush=True)
        if args.json:
            write(args.json, matcher=times)
    cases = args.case or [parse_case(text) for text in CASES]
    print(table(compile_cases(cases, args.json, quick=args.quick)))


def write(path: Path, **parts: list[dict]) -> None:
    """Puts ``parts`` into the file; of "rows" only those of the same case are replaced."""
    data = json.loads(path.read_text()) if path.exists() else {"rows": [], "matcher": []}
    new = {row["case"] for row in parts.get("rows", ())}
    rows = [row for row in data["rows"] if row["case"] not in new] + parts.get("rows", [])
    data = {
        "schema_version": 1,
        "jax": jax.__version__,
        "targets": TARGETS,
        "mask_side": MASK_SIDE,
        "rows": rows,
        "matcher": parts.get("matcher", data["matcher"]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
