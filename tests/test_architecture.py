"""Who may import whom: the floors of docs/architecture.md, held by reading every import."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import calm_kernels

PACKAGE = Path(calm_kernels.__file__).parent

# Floors from the ground up; a module imports from its own floor or from below.
FLOORS = (
    {"reference"},
    {"_checks", "_modules", "_native", "_dispatch", "_autocast"},
    {"triton"},
    {"ops"},
    {"nn"},
    {"models", "integrations"},
    {"training", "bench"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# Floors on which every operation stands alone, and what its module may share.
ALONE = ("reference", "triton", "ops")
SHARED = {"calm_kernels.reference.philox", "calm_kernels.triton.specialization"}
OPERATIONS = (
    "brier",
    "decoder_step",
    "energy_score",
    "gated_ffn",
    "linear_argmax",
    "linear_cross_entropy",
    "patch_codec",
    "random",
    "repeated_draws",
    "rms_norm",
    "rotary_attention",
    "row_layers",
    "temperature_sampling",
)
CORE = ("reference", "ops", "nn", "_checks", "_modules", "_native", "_dispatch", "_autocast")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(dotted: str) -> str | None:
    """The floor that a dotted name of this package lies on; None for the public face."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else None


def operation(module: str) -> str:
    """The operation that a module is part of: one may be told in several files."""
    if module.startswith("expected_distance"):
        return "energy_score"
    if module == "attention_block":
        return "rotary_attention"
    return next((name for name in OPERATIONS if module.startswith(name)), module)


def violations(path: Path, names: set[str]) -> list[str]:
    relative = path.relative_to(PACKAGE).with_suffix("")
    floor = relative.parts[0]
    if floor not in LEVEL:
        return []
    found = []
    for name in sorted(names):
        if not name.startswith("calm_kernels"):
            continue
        target = floor_of(name)
        if target is None:
            # Importing the public face from inside goes upward, except from the roof.
            if LEVEL[floor] < LEVEL["training"]:
                found.append(f"{relative} imports the public face ({name})")
            continue
        if LEVEL[target] > LEVEL[floor]:
            found.append(f"{relative} imports upward: {name}")
        if floor in ALONE and target == floor and relative.name != "__init__":
            module = ".".join(name.split(".")[:3])
            other = name.split(".")[2]
            same_operation = operation(other) == operation(relative.name)
            if module not in SHARED and not same_operation:
                found.append(f"{relative} imports sideways: {name}")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_and_never_sideways(path: Path) -> None:
    assert not violations(path, imported_names(path))


def test_the_import_check_sees_each_kind_of_violation() -> None:
    cases = {
        "ops/brier.py": "calm_kernels.nn.energy.EnergyLoss",
        "reference/brier.py": "calm_kernels._checks.tensor",
        "ops/linear_argmax.py": "calm_kernels.ops.brier.brier_scores",
        "models/autoencoder.py": "calm_kernels.training.presets",
        "nn/energy.py": "calm_kernels.energy_score",
    }
    for module, name in cases.items():
        assert violations(PACKAGE / module, {name}), (module, name)
    assert not violations(PACKAGE / "ops/brier.py", {"calm_kernels.reference.brier.brier_scores"})


def core_modules() -> list[Path]:
    return [p for p in modules() if p.relative_to(PACKAGE).with_suffix("").parts[0] in CORE]


@pytest.mark.parametrize("path", core_modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_depends_on_torch_alone(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported_names(path)}
    assert outside <= {*sys.stdlib_module_names, "torch", "calm_kernels"}


def test_no_module_is_too_long_to_read_at_once() -> None:
    long = {
        str(p.relative_to(PACKAGE)): n
        for p in modules()
        if (n := len(p.read_text().splitlines())) > 420
    }
    assert not long
