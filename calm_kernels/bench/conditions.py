"""The conditions of a run: versions, device, commit, date. Every row carries them."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import calm_kernels

COMMIT_VARIABLE = "CALM_KERNELS_COMMIT"
"""Names the commit where the package is installed apart from its repository."""


def conditions(device: torch.device, seed: int) -> dict[str, Any]:
    """What a reader needs to judge or repeat a figure, as JSON types."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "calm_kernels": calm_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "device": device.type,
        "seed": seed,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device_name"] = properties.name
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    else:
        found["device_name"] = _processor()
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        found["driver"] = None
    found["threads"] = torch.get_num_threads()
    found["load_average"] = round(os.getloadavg()[0], 2)
    return found


def commit() -> str | None:
    """The commit of the repository that this package lies in, ``+changes`` if it has any."""
    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        return named
    root = Path(calm_kernels.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return f"{head}+changes" if head and changes else head


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0].strip() if lines else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
