"""Everything that a training run can be told; ``configs/*.py`` make one each.

``train.py --config=FILE --config.NAME=VALUE`` overrides any field, with its type checked.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field

from sam3_jax.config import ModelConfig
from sam3_jax.data.clips import ClipsConfig
from sam3_jax.data.pipeline import DataConfig
from sam3_jax.training.clicks import ClickConfig
from sam3_jax.training.contrast import ContrastConfig
from sam3_jax.training.lora import LoraConfig
from sam3_jax.training.optimizer import OptimizerConfig
from sam3_jax.training.step import StepConfig
from sam3_jax.training.targets import LossConfig
from sam3_jax.training.tracker_clip import TrackerTrainingConfig


@dataclass
class SplitConfig:
    """Annotations (a COCO or SA-Co file, or a Roboflow folder) and the folder of their pictures.

    ``images``: default the annotation file's folder. ``max_bad``: share of entries that may be
    unusable; they are counted, named and left out.
    """

    annotations: str = ""
    images: str = ""
    max_bad: float = 0.1


@dataclass
class InitConfig:
    """Where parameters come from: a converted checkpoint, or random values ("").

    ``prefixes``: of what is taken from it, such as ("vision/trunk/",) for the backbone alone; what
    is not is random. ``copies``: pairs (to, from) of parts of which one then begins as the other,
    such as (("vision/tracker_neck/", "vision/detector_neck/"),). After that ``scales``: pairs
    (pattern of paths, factor) by which values are multiplied, and ``fills``: pairs (pattern,
    constant) which takes their place.
    """

    checkpoint: str = ""
    prefixes: tuple[str, ...] = ("",)
    copies: tuple[tuple[str, str], ...] = ()
    scales: tuple[tuple[str, float], ...] = ()
    fills: tuple[tuple[str, float], ...] = ()


@dataclass
class MeshConfig:
    """Devices of all processes: ``fsdp`` splits parameters and batch, ``tensor`` heads and hidden
    units, ``data`` the batch; 0 takes the devices that are left.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1


@dataclass
class CheckpointConfig:
    """``best``: the validation figure whose highest value is kept beside the latest states."""

    every: int = 500  # steps; one is also saved at the end and before the machine goes away
    keep: int = 2  # latest ones
    best: str = "segm/cgF1"  # without masks "bbox/cgF1" takes its place


@dataclass
class LogConfig:
    """``profile_start``: number of steps after which ``profile_steps`` more are recorded for
    TensorBoard's profiler; 0: never.
    """

    every: int = 10  # steps
    tensorboard: bool = True
    profile_start: int = 0
    profile_steps: int = 3


@dataclass
class ValidationConfig:
    """Figures and pictures of the ``valid`` split, by the code that ``evaluate.py`` runs."""

    every: int = 0  # steps; 0: only at the end
    images: int = 0  # the first so many (tracker: sequences); 0: all
    pictures: int = 8  # drawn for TensorBoard and the output folder
    threshold: float = 0.5
    negatives: bool = True  # every category in every picture


@dataclass
class TrainConfig:
    """One run.

    ``task``: "pictures" trains the image model as ``loss`` and ``clicks`` say, on ``data.example``;
    "contrast" teaches trunk and text encoder of a model from random values what phrases mean, on
    the same data, as ``contrast`` says; "tracker" trains the tracker as ``tracker`` says, on
    ``clips`` of videos. Then ``train.annotations`` is a YouTube-VIS file or a folder in SA-V's
    layout, ``valid.annotations`` one in DAVIS' layout.

    ``model``: of a run from random values; a run from a checkpoint takes the sizes from there, and
    from here what belongs to training: dropout, drop path, remat, precision. The side of its images
    is that of ``data.example.augment.resolution`` (tracker: ``clips.resolution``).
    """

    task: str = "pictures"  # or "contrast", "tracker"
    output: str = "runs/sam3"  # folder: settings, log, states, models, figures
    steps: int = 1000
    epochs: float = 0.0  # takes the place of steps: so many times through the pictures
    batch_size: int = 1  # images a step, over all devices (data.batch_size follows from it)
    seed: int = 0  # of parameters; added to those of data and step
    max_skipped: int = 20  # steps in a row whose loss or gradient was not finite: then it stops
    train: SplitConfig = field(default_factory=SplitConfig)
    valid: SplitConfig = field(default_factory=SplitConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    clicks: ClickConfig = field(default_factory=ClickConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    tracker: TrackerTrainingConfig = field(default_factory=TrackerTrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    step: StepConfig = field(default_factory=StepConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def check_name(name: str) -> str | None:
    """What is wrong with the name of a field, such as ``optimizer.rate_scale``, if anything."""
    cls: type = TrainConfig
    for part in name.split("."):
        fields = {f.name: f.type for f in dataclasses.fields(cls)} if _nested(cls) else {}
        if part not in fields:
            close = difflib.get_close_matches(part, fields, n=1)
            where = (
                f"{cls.__name__} has" if fields else f"{name.rpartition('.')[0]} is a value with"
            )
            hint = f"; did you mean {close[0]!r}?" if close else ""
            choices = f" It has: {', '.join(fields)}" if fields and not close else ""
            return f"{where} no field {part!r}{hint}{choices}"
        cls = fields[part]
    return None


def _nested(cls: typing.Any) -> bool:
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)


def _resolve_types(cls: type) -> None:
    """Types instead of their names in all fields: ml_collections' flags check values by them."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        f.type = hints[f.name]
        if _nested(f.type):
            _resolve_types(f.type)


_resolve_types(TrainConfig)
