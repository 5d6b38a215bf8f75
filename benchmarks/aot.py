"""What the forward needs on accelerators that are not here: memory, FLOPs and bytes a chip.

Compiles encode_image + encode_text + ground of the released size in bfloat16, one phrase an image,
ahead of time. For TPUs this takes the ``libtpu`` wheel that ``jax[tpu]`` names; for an H100
``jax-cuda12-plugin``, ``jax-cuda12-pjrt`` (of jax's version) and ``nvidia-cudnn-cu12``. No chip is
needed; a device whose packages are missing is left out and named::

    python benchmarks/aot.py --json benchmarks/results/aot.json
    python benchmarks/aot.py --case v5e:1x1:8 --case v6e:4x2:8

A case is DEVICE:DATAxTENSOR:BATCH. FLOPs and bytes are XLA's estimates; they do not count what
Pallas kernels (attention on TPUs) do, and there are none for GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# Before jax is imported: compile only, and ask neither a metadata server nor a driver.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from sam3_jax.config import ModelConfig, sam3  # noqa: E402
from sam3_jax.models.detector import Sam3, empty_geometry, init_shapes  # noqa: E402
from sam3_jax.sharding import batch_sharding, make_mesh, param_shardings  # noqa: E402
from sam3_jax.types import GroundOutput  # noqa: E402

QUICK = {"exec_time_optimization_effort": -1.0}
TPUS = ("v5e", "v6e")
H100 = "h100"
MEMORY_GB = {"v5e": 16, "v6e": 32, H100: 80}
TARGET = Path(__file__).with_name("h100_target_config.txtpb")
CASES = (
    "v5e:1x1:1 v5e:1x1:8 v5e:8x1:8 v5e:4x2:8 v6e:1x1:1 v6e:1x1:8 v6e:4x2:8 "
    "h100:1x1:1 h100:1x1:8 h100:1x1:32"
).split()


class Case(NamedTuple):
    """``data`` x ``tensor`` chips of a device, and images (one phrase each) over all of them."""

    device: str
    data: int
    tensor: int
    batch: int

    def __str__(self) -> str:
        return f"{self.device}:{self.data}x{self.tensor}:{self.batch}"


def parse_case(text: str) -> Case:
    """``"v5e:4x2:8"`` to a case; ValueError (which argparse reports) for anything else."""
    device, mesh, batch = text.split(":")
    data, tensor = mesh.split("x")
    if device not in MEMORY_GB:
        raise ValueError(f"{device!r}: choose one of {sorted(MEMORY_GB)}")
    return Case(device, int(data), int(tensor), int(batch))


def device_mesh(case: Case) -> Mesh:
    """Compile-only chips of a case as a mesh of axes (data, tensor).

    Raises:
      RuntimeError: where the packages that compile for the device are not installed.
    """
    jax.devices("cpu")  # first, so that jax starts no other backend
    chips = case.data * case.tensor
    if case.device in TPUS:
        rows = 2 ** (int(math.log2(chips)) // 2)
        grid = (rows, chips // rows)
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{case.device}:{grid[0]}x{grid[1]}",
            chips_per_host_bounds=(min(grid[0], 2), min(grid[1], 2), 1),
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"1x1x{chips}",
            topology=f"1x1x{chips}",
            target_config=TARGET.read_text(),
        )
    return make_mesh(case.data, case.tensor, devices=list(topology.devices))


def forward(config: ModelConfig, params: Any, pixels: jax.Array, ids: jax.Array) -> GroundOutput:
    """One phrase on each image, from pixels and token ids, in bfloat16."""
    model = Sam3(config, jnp.bfloat16)
    variables = {"params": params}
    image = model.apply(variables, pixels, tracker=False, method="encode_image")
    text = model.apply(variables, ids, method="encode_text")
    index = jnp.arange(len(pixels))
    prompt = empty_geometry(len(pixels))
    return model.apply(variables, image.detector, text, prompt, index, index, method="ground")


def arguments(config: ModelConfig, mesh: Mesh, batch: int) -> tuple:
    """Shapes of :func:`forward`'s arguments, placed on ``mesh``.

    The backbones' matrices are bfloat16, as :func:`sam3_jax.checkpoint.load` casts them.
    """
    shapes = init_shapes(config)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        matrix = path[0].key in ("vision", "text") and path[-1].key == "kernel"
        dtype = jnp.bfloat16 if matrix else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(place, shapes, param_shardings(shapes, mesh))
    rows = batch_sharding(mesh) if batch % mesh.shape["data"] == 0 else None
    side = config.image_size
    pixels = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32, sharding=rows)
    ids = jax.ShapeDtypeStruct((batch, config.text.context_length), jnp.int32, sharding=rows)
    return params, pixels, ids


def compile_forward(
    config: ModelConfig, mesh: Mesh, batch: int, *, quick: bool = False
) -> jax.stages.Compiled:
    """The forward compiled for the chips of ``mesh``; all parameters are kept in its memory.

    ``quick``: with XLA's least effort, which takes a third of the time and finds about the same
    memory.
    """

    def run(params: Any, pixels: jax.Array, ids: jax.Array) -> GroundOutput:
        return forward(config, params, pixels, ids)

    args = arguments(config, mesh, batch)
    with jax.set_mesh(mesh):
        lowered = jax.jit(run, keep_unused=True).lower(*args)
    return lowered.compile(compiler_options=QUICK if quick else None)


def measure(compiled: jax.stages.Compiled) -> dict[str, float | None]:
    """GB of memory, TFLOP and GB moved, per chip; None for what the compiler does not say."""
    memory = compiled.memory_analysis()
    sizes = {
        "arguments_gb": memory.argument_size_in_bytes,
        "outputs_gb": memory.output_size_in_bytes,
        "temporaries_gb": memory.temp_size_in_bytes,
    }
    result: dict[str, float | None] = {name: size / 1e9 for name, size in sizes.items()}
    result["total_gb"] = sum(sizes.values()) / 1e9
    try:
        cost = compiled.cost_analysis() or {}
    except jax.errors.JaxRuntimeError:  # GPUs: not implemented without one
        cost = {}
    flops, moved = cost.get("flops"), cost.get("bytes accessed")
    result["tflop"] = flops / 1e12 if flops else None
    result["moved_gb"] = moved / 1e9 if moved else None
    return result


COLUMNS = ("arguments_gb", "outputs_gb", "temporaries_gb", "total_gb", "tflop", "moved_gb")


def table(rows: list[dict]) -> str:
    """Markdown table of the measured cases."""
    head = ["case", *COLUMNS, "compile_s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in head[1:]]
        lines.append("| " + " | ".join([row["case"], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", type=parse_case, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="compile with XLA's least effort")
    parser.add_argument("--json", type=Path, help="where to write; other cases in it stay")
    args = parser.parse_args()
    rows: list[dict] = []
    missing: dict[str, str] = {}
    for case in args.case or map(parse_case, CASES):
        if case.device in missing:
            continue
        try:
            mesh = device_mesh(case)
        except (RuntimeError, ImportError, OSError) as error:
            missing[case.device] = str(error).splitlines()[0]
            print(f"{case.device} left out: {missing[case.device]}", file=sys.stderr)
            continue
        start = time.perf_counter()
        compiled = compile_forward(sam3(), mesh, case.batch, quick=args.quick)
        row = {"case": str(case), "quick": args.quick, **measure(compiled)}
        rows.append(row | {"compile_s": time.perf_counter() - start})
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.json:
            write(args.json, rows)
    print(table(rows))


def write(path: Path, rows: list[dict]) -> None:
    """Adds ``rows`` to the file, in place of older ones of the same case."""
    data = json.loads(path.read_text()) if path.exists() else {"rows": []}
    new = {row["case"] for row in rows}
    data = {
        "schema_version": 1,
        "jax": jax.__version__,
        "rows": [row for row in data["rows"] if row["case"] not in new] + rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
