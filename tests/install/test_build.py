"""Installing from source: each wheel is built in a temporary folder and looked into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that builds in parallel do not meet."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / name)
    for name in ("calm_kernels", "csrc"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    return folder


def build_wheel(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"),
            *("-w", str(checkout / "dist"), str(checkout)),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def wheel_of(checkout: Path) -> Path:
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


SCORE = (
    "import torch, calm_kernels\n"
    "from calm_kernels import _native\n"
    "assert calm_kernels.__file__.startswith(sys.path[0])\n"
    "ids = torch.zeros(3, 2, 4, dtype=torch.int64)\n"
    "print(_native.library('cpu').loaded, calm_kernels.brier_scores(ids, ids[0]).sum().item())\n"
)


def test_a_pure_python_install_works_and_says_what_is_missing(
    checkout: Path, tmp_path: Path
) -> None:
    run = build_wheel(checkout, CALM_KERNELS_BUILD="none")
    assert run.returncode == 0, run.stderr
    wheel = wheel_of(checkout)
    assert wheel.name.endswith("py3-none-any.whl")
    assert run_installed(wheel, tmp_path / "site", SCORE) == "False 8.0"


def test_the_native_wheel_serves_every_python_from_3_10(checkout: Path, tmp_path: Path) -> None:
    run = build_wheel(checkout, CALM_KERNELS_BUILD="cpu")
    assert run.returncode == 0, run.stderr
    wheel = wheel_of(checkout)
    assert "cp310-abi3" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "calm_kernels/_cpu.abi3.so" in names
    assert "calm_kernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "csrc"))]
    assert run_installed(wheel, tmp_path / "site", SCORE) == "True 8.0"


def test_a_failing_compiler_stops_the_build_with_a_readable_reason(checkout: Path) -> None:
    broken = checkout / "csrc" / "cpu" / "brier.cpp"
    broken.write_text(broken.read_text() + "\nthis is not C++\n")
    run = build_wheel(checkout, CALM_KERNELS_BUILD="cpu")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "calm_kernels: compiling the native libraries failed" in output
    assert "CALM_KERNELS_BUILD=none" in output


def test_a_missing_compiler_is_named_before_anything_is_compiled(checkout: Path) -> None:
    run = build_wheel(checkout, CALM_KERNELS_BUILD="cpu", CXX="no-such-compiler")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "no C++ compiler found (no-such-compiler)" in output


def test_an_unknown_build_choice_is_refused(checkout: Path) -> None:
    run = build_wheel(checkout, CALM_KERNELS_BUILD="gpu")
    assert run.returncode != 0
    assert "CALM_KERNELS_BUILD='gpu' is not one of auto, cpu, cuda, none" in run.stdout + run.stderr
