"""Peak memory of one call above what was there before it, results included."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

from calm_kernels import _dispatch
from calm_kernels.bench.timing import Runnable, synchronize
from calm_kernels.bench.workload import Inputs
from calm_kernels.ops.memory import empty_cache

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"


def peak_bytes(runnable: Runnable, inputs: Inputs, device: torch.device) -> int | None:
    """Peak growth of memory during one call.

    On a GPU what torch allocated. On a CPU the resident pages of the process, so that a kernel's
    own buffers count as well: the kernel's high-water mark is reset before the call, after unused
    heap, and what the package keeps for its next calls, was given back. Call the variant before, or
    its first-time work counts, and collect garbage, or what is freed meanwhile hides some of the
    growth.

    Returns:
        bytes, exact to some pages on a CPU; None where the system does not tell (not Linux, or
        /proc is restricted).
    """
    with _dispatch.backend(runnable.backend):
        if device.type == "cuda":
            return _peak_of_device(runnable, inputs, device)
        return _peak_of_process(runnable, inputs)


def _peak_of_device(runnable: Runnable, inputs: Inputs, device: torch.device) -> int:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = runnable.call(inputs)
    synchronize(device)
    del outputs
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_process(runnable: Runnable, inputs: Inputs) -> int | None:
    _give_back_unused_heap()
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
        outputs = runnable.call(inputs)
        peak = _status_bytes("VmHWM")
    except OSError:
        return None
    del outputs
    return max(0, peak - before) if before and peak else None


def _give_back_unused_heap() -> None:
    # Blocks that are kept for later are resident already and would hide a call's use.
    empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    """An entry of /proc/self/status, 0 if it is not there."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
