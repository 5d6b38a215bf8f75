"""Imports point one way, the core stays pure, and every dependency is declared.

The rules are read from the source with ``ast``: nothing is imported here.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sam3_jax"

# Part of the package -> height. A part imports from its own height and below. The outermost ones
# are shells around everything else.
LAYERS = {
    "config": 0,
    "types": 0,
    "ops": 1,
    "models": 2,
    "sharding": 3,
    "functional": 3,
    "training": 4,
    "tracking": 4,
    "tokenizer": 5,
    "data": 5,
    "checkpoint": 5,
    "convert": 5,
    "evaluation": 5,
    "inference": 5,
    "trainer": 5,
    "demo": 5,
    "video": 5,
    PACKAGE: 6,  # sam3_jax/__init__.py, the curated namespace
    "scripts": 7,  # the programs in the repository's root, benchmarks, configs
}
PURE_UP_TO = LAYERS["training"]

# Disk, clock, network, flags, chance. Nothing up to `training` may import them.
IMPURE = set(
    "PIL absl array_record argparse asyncio datetime fcntl glob grain http huggingface_hub io "
    "mmap multiprocessing orbax os pathlib pickle random requests safetensors secrets shutil "
    "signal socket sqlite3 subprocess tempfile tensorflow_datasets threading time tqdm urllib "
    "urllib3".split()
)
# Programs that are oracles of tests, or too heavy or too old to be needed at run time.
NEVER = set(
    "clu decord hydra pkg_resources tensorflow tokamax torch torchvision transformers "
    "triton".split()
)
# The distribution that provides a module, where the two names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


class Import(NamedTuple):
    """One import statement's target; ``lazy`` where it stands inside a function."""

    module: str
    line: int
    lazy: bool


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a source file: ``sam3_jax/ops/__init__.py`` -> ``sam3_jax.ops``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, relative ones made absolute; ``from a import b`` gives ``a.b``."""
    package = list(path.relative_to(root).parts[:-1])

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for name in node.names:
                parts = [*base, *(node.module or "").split("."), name.name]
                yield Import(".".join(p for p in parts if p), node.lineno, lazy)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or isinstance(node, ast.FunctionDef | ast.Lambda))

    yield from visit(ast.parse(path.read_text(), str(path)), False)


def package_files(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


def script_files(root: Path) -> list[Path]:
    folders = (root / "benchmarks", root / "configs")
    return sorted([*root.glob("*.py"), *(f for folder in folders for f in folder.rglob("*.py"))])


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to; ``sam3_jax`` for its root."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return "scripts"
    if len(parts) == 1 or parts[1] not in LAYERS:
        return PACKAGE
    return parts[1]


def layering_problems(root: Path) -> list[str]:
    """Imports that point upwards, and parts of the package without a place in ``LAYERS``."""
    problems = []
    for child in sorted((root / PACKAGE).iterdir()):
        code = child.suffix == ".py" or (child.is_dir() and list(child.rglob("*.py")))
        if code and child.stem not in LAYERS and child.stem != "__init__":
            problems.append(f"{PACKAGE}/{child.name}: give it a height in LAYERS")
    for path in [*package_files(root), *script_files(root)]:
        part = part_of(module_name(path, root))
        for found in read_imports(path, root):
            if found.module.split(".")[0] != PACKAGE:
                continue
            target = part_of(found.module)
            if LAYERS[target] > LAYERS[part]:
                where = f"{path.relative_to(root)}:{found.line}"
                problems.append(f"{where}: {part} must not import {target} ({found.module})")
    return problems


def forbidden_problems(root: Path) -> list[str]:
    """Third-party and standard modules that a part of the package must do without."""
    problems = []
    for path in package_files(root):
        part = part_of(module_name(path, root))
        forbidden = set(NEVER)
        if LAYERS[part] <= PURE_UP_TO:
            forbidden |= IMPURE
        if part == "ops":
            forbidden |= {"flax"}
        if part == "models":
            forbidden |= {"optax"}
        for found in read_imports(path, root):
            top = found.module.split(".")[0]
            if top in forbidden:
                problems.append(f"{path.relative_to(root)}:{found.line}: {part} imports {top}")
    return problems


def impure_calls(root: Path) -> list[str]:
    """``open`` and numpy's random numbers up to the purity line: no import gives them away."""
    problems = []
    for path in package_files(root):
        if LAYERS[part_of(module_name(path, root))] > PURE_UP_TO:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
            if re.fullmatch(r"(np|numpy)\.random", text) or re.match(r"open\(", text):
                problems.append(f"{path.relative_to(root)}:{node.lineno}: {text}")
    return problems


def reachable(start: str, root: Path) -> dict[str, str]:
    """Modules of the package that importing ``start`` runs -> the module that imports them."""
    files = {module_name(path, root): path for path in package_files(root)}
    found = {name: "" for name in files if name == start or name.startswith(f"{start}.")}
    waiting = list(found)
    while waiting:
        name = waiting.pop()
        targets = [name, *(i.module for i in read_imports(files[name], root) if not i.lazy)]
        for target in targets:
            parts = target.split(".")
            for end in range(1, len(parts) + 1):  # a module's packages run before it
                prefix = ".".join(parts[:end])
                if prefix in files and prefix not in found:
                    found[prefix] = name
                    waiting.append(prefix)
    return found


def declared(root: Path) -> tuple[set[str], set[str]]:
    """Names of the distributions that pyproject.toml requires, and those of its extras."""

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", r)[0].lower().replace("_", "-") for r in requirements}

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "test"}
    return names(project["dependencies"]), set().union(*map(names, extras.values()))


def undeclared_imports(root: Path) -> list[str]:
    """Imports that a plain installation may lack; an extra's only inside functions."""
    core, extras = declared(root)
    problems = []
    for path in package_files(root):
        for found in read_imports(path, root):
            top = found.module.split(".")[0]
            if top in sys.stdlib_module_names or top == PACKAGE:
                continue
            name = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
            if name in core or (found.lazy and name in extras):
                continue
            reason = "an extra: import it in a function" if name in extras else "not declared"
            problems.append(f"{path.relative_to(root)}:{found.line}: {name} is {reason}")
    return problems


def test_imports_point_one_way():
    assert layering_problems(ROOT) == []


def test_core_is_pure():
    assert forbidden_problems(ROOT) + impure_calls(ROOT) == []


def test_inference_needs_no_training():
    chains = reachable(f"{PACKAGE}.inference", ROOT)
    assert {m: by for m, by in chains.items() if part_of(m) == "training"} == {}


def test_dependencies_are_declared():
    assert undeclared_imports(ROOT) == []


@pytest.fixture
def package(tmp_path: Path):
    """A function that writes a toy repository from {path: source} and returns its root."""

    def write(files: dict[str, str]) -> Path:
        pyproject = '[project]\ndependencies = ["numpy>=2"]\n[project.optional-dependencies]\n'
        files = {"pyproject.toml": pyproject + 'convert = ["huggingface_hub"]\n', **files}
        for name, source in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("path", "source", "check", "message"),
    [
        ("ops/a.py", "from sam3_jax.models import vit", layering_problems, "ops must not import"),
        ("ops/a.py", "def f():\n    from ..models import x", layering_problems, "a.py:2: ops must"),
        ("data.py", "import sam3_jax", layering_problems, "data must not import sam3_jax"),
        ("data.py", "from . import nothing", layering_problems, "data must not import sam3_jax"),
        ("utils.py", "", layering_problems, "sam3_jax/utils.py: give it a height"),
        ("ops/a.py", "import flax.linen as nn", forbidden_problems, "ops imports flax"),
        ("models/a.py", "import optax", forbidden_problems, "models imports optax"),
        ("training/a.py", "from absl import flags", forbidden_problems, "training imports absl"),
        ("convert/a.py", "import torch", forbidden_problems, "convert imports torch"),
        ("ops/a.py", "import numpy as np\nnp.random.rand(3)", impure_calls, "a.py:2: np.random"),
        ("models/a.py", "x = open('f')", impure_calls, "a.py:1: open('f')"),
        ("data.py", "import grain", undeclared_imports, "grain is not declared"),
        ("convert/a.py", "import huggingface_hub", undeclared_imports, "is an extra"),
    ],
)
def test_a_breach_is_found(package, path, source, check, message):
    problems = check(package({f"sam3_jax/{path}": source}))
    assert len(problems) == 1, problems
    assert message in problems[0]


def test_allowed_imports_pass(package):
    root = package(
        {
            "sam3_jax/__init__.py": "from .inference import predictor",
            "sam3_jax/inference/predictor.py": "import os\nfrom ..models import vit\nimport numpy",
            "sam3_jax/models/vit.py": "from sam3_jax import config\nfrom ..ops import boxes",
            "sam3_jax/ops/boxes.py": "import numpy as np",
            "sam3_jax/config.py": "import dataclasses",
            "sam3_jax/convert/hub.py": "def get():\n    import huggingface_hub",
            "infer.py": "from sam3_jax.inference.predictor import main",
        }
    )
    checks = (layering_problems, forbidden_problems, impure_calls, undeclared_imports)
    assert [check(root) for check in checks] == [[]] * 4


def test_training_is_found_behind_other_modules(package):
    root = package(
        {
            "sam3_jax/inference/image.py": "from sam3_jax import checkpoint",
            "sam3_jax/checkpoint.py": "from sam3_jax.training.state import TrainState",
            "sam3_jax/training/state.py": "def f():\n    import sam3_jax.data",
            "sam3_jax/data.py": "",
        }
    )
    chains = reachable("sam3_jax.inference", root)
    assert chains["sam3_jax.training.state"] == "sam3_jax.checkpoint"
    assert "sam3_jax.data" not in chains
