"""``convert_torch_weights.py``: PyTorch weights of SAM 3 to a checkpoint of this package, and back.

Exit status: 0 converted, 1 the weights or the place for the output are no good (nothing is left
behind), 2 a mistake in the arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sam3_jax.config import ModelConfig

PARTS = ("all", "image", "tracker")
LAYOUTS = ("Sam3Model", "Sam3TrackerModel", "Sam3TrackerVideoModel", "Sam3VideoModel")

DESCRIPTION = """\
Convert the weights of SAM 3 from PyTorch to a checkpoint for infer.py and sam3_jax, or back.

INPUT is sam3.pt, model.safetensors, the folder that holds one of them (Hugging Face's, sharded or
not), or an id of the Hugging Face hub such as facebook/sam3. Files are read as data: nothing in
them is run, and PyTorch need not be installed. Every tensor must be accounted for; otherwise all
problems are listed and nothing is written."""

EXAMPLES = """\
examples:
  Meta's file:
    %(prog)s --input sam3.pt --output sam3_jax_ckpt
  Hugging Face's file, concept prompts on images only:
    %(prog)s --input sam3/model.safetensors --output sam3_jax_ckpt --part image
  from the hub (the weights are gated: get access, then `hf auth login`):
    %(prog)s --input facebook/sam3 --output sam3_jax_ckpt
  back, for PyTorch and for transformers:
    %(prog)s --input sam3_jax_ckpt --output my_sam3.pt --to-torch
    %(prog)s --input sam3_jax_ckpt --output my_sam3 --to-hf Sam3VideoModel

Needs free disk space of the size of INPUT and at most twice that in memory.
SAM 3.1 (sam3.1_multiplex.pt) is another model and is not converted."""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments and help."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="INPUT", help="weights: a file, folder, or hub id")
    add("--output", required=True, metavar="OUTPUT", help="what to make")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is of this command")
    add(
        "--part",
        choices=PARTS,
        default="all",
        help="image: text and example boxes on images; tracker: clicks and video (default all)",
    )
    add(
        "--config",
        metavar="NAME|FILE",
        help="sizes of a model that is not the released one: sam3, tiny, or a JSON file with the "
        "fields of sam3_jax.config.ModelConfig that differ; default: config.json of Hugging Face's "
        "folders, else the released sizes",
    )
    back = parser.add_mutually_exclusive_group()
    back.add_argument("--to-torch", action="store_true", help="back: OUTPUT becomes like sam3.pt")
    back.add_argument(
        "--to-hf",
        choices=LAYOUTS,
        metavar="LAYOUT",
        help="back: OUTPUT becomes a folder for this class of transformers: " + ", ".join(LAYOUTS),
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    backwards = args.to_torch or args.to_hf
    if backwards and (args.config or args.part != "all"):
        parser.error("--part and --config say how to read PyTorch weights; not with --to-...")

    # Only now what takes seconds to import: --help and mistakes answer at once.
    from sam3_jax.checkpoint import CheckpointError
    from sam3_jax.convert.errors import ConversionError

    try:
        with _clean_up_when_killed():
            (_export if backwards else _convert)(args)
    except (ConversionError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _clean_up_when_killed() -> Iterator[None]:
    """Turns a polite kill into an exception, so that what is half written goes away."""
    if threading.current_thread() is not threading.main_thread():  # only that one may
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _convert(args: argparse.Namespace) -> None:
    from sam3_jax.convert.convert import convert
    from sam3_jax.convert.progress import progress_bar
    from sam3_jax.convert.source import open_source

    start = time.monotonic()
    config = _read_config(args.config) if args.config else None
    source = open_source(args.input)
    report = convert(
        source,
        args.output,
        part=args.part,
        config=config,
        overwrite=args.overwrite,
        progress=progress_bar,
    )
    print(
        f"{args.output}: {report.parameters / 1e6:.1f}M parameters from {report.layout} names, "
        f"parts {', '.join(report.parts)}, {report.unused} unused tensors kept, "
        f"{time.monotonic() - start:.0f} s"
    )
    if report.missing_parts:
        partly = " (only what clicks on images need)" if "clicks" in report.parts else ""
        print(f"note: {args.input} has no whole {' or '.join(report.missing_parts)} part{partly}")
    if report.left_out:
        print(f"note: {report.left_out} tensors belong to parts that were not converted")
    if report.zero_filled:
        print(
            f"note: this kind of file lacks {len(report.zero_filled)} parameters, now zero: "
            f"{', '.join(report.zero_filled)}"
        )


def _read_config(name: str) -> ModelConfig:
    from sam3_jax import config
    from sam3_jax.convert.errors import ConversionError

    if name in config.NAMED:
        return config.NAMED[name]()
    try:
        return config.from_dict(json.loads(Path(name).read_text()))
    except (OSError, ValueError) as error:
        known = ", ".join(config.NAMED)
        raise ConversionError(f"--config {name}: neither {known} nor readable ({error})") from error


def _export(args: argparse.Namespace) -> None:
    from sam3_jax import checkpoint
    from sam3_jax.convert import export
    from sam3_jax.convert.progress import progress_bar

    loaded = checkpoint.load(args.input)
    unused = checkpoint.load_unused(args.input)
    progress = progress_bar("writing", export.total_bytes(loaded.params, unused))
    weights = (loaded.params, unused, loaded.config)
    options = {"overwrite": args.overwrite, "progress": progress}
    if args.to_torch:
        export.write_sam3_pt(args.output, *weights, **options)
    else:
        export.write_hf(args.output, *weights, args.to_hf, **options)
    print(f"{args.output}: parts {', '.join(loaded.metadata['parts'])} of {args.input}")
    if args.to_torch and loaded.metadata.get("layout", "sam3.pt") != "sam3.pt":
        print(
            "note: the weights came from Hugging Face's file, which lacks RoPE tables and more; "
            "upstream computes what is missing (load_state_dict with strict=False)"
        )
