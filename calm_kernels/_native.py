"""Finding and loading the compiled libraries.

Two shared libraries may lie beside this file: ``_cpu`` and ``_cuda``. Each registers kernels for
operators whose schemas Python has defined already, so a missing library removes speed and nothing
else. The CUDA one is opened at the first CUDA tensor: importing the package touches no device.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """What became of one compiled library."""

    name: str
    path: str | None
    loaded: bool
    problem: str | None
    """Why it does not serve, and how to make it serve; None when it does."""


_libraries: dict[str, Library] = {}


def _open(name: str) -> Library:
    candidates = sorted(_PACKAGE.glob(f"_{name}*.so"))
    if not candidates:
        return Library(
            name,
            None,
            False,
            f"the {name} library was not built: install with a C++ compiler"
            + (" and CALM_KERNELS_BUILD=cuda" if name == "cuda" else "")
            + " and without CALM_KERNELS_BUILD=none",
        )
    if name == "cuda" and not torch.cuda.is_available():
        return Library(name, str(candidates[0]), False, "torch sees no CUDA device")
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return Library(
            name,
            str(candidates[0]),
            False,
            f"it does not load ({reason}): reinstall the package against this torch",
        )
    return Library(name, str(candidates[0]), True, None)


def library(name: str) -> Library:
    """The state of library ``"cpu"`` or ``"cuda"``, loading it if it can be loaded."""
    state = _libraries.get(name)
    if state is None:
        with _lock:
            state = _libraries.get(name)
            if state is None:
                state = _libraries[name] = _open(name)
    return state


def serves(qualified_name: str, device_type: str) -> bool:
    """Whether a compiled kernel is registered for an operator on ``"cpu"`` or ``"cuda"``."""
    if device_type not in ("cpu", "cuda") or not library(device_type).loaded:
        return False
    key = device_type.upper()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, key))


def why_not_avx512() -> str | None:
    """Why CPU kernels that pay on AVX-512 alone do not; None if they do."""
    has_it = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return None if has_it else "the CPU has no AVX-512"
