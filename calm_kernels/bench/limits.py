"""What the machine can do, measured in the same run: a large copy, a large matmul."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from calm_kernels.bench.rows import Row
from calm_kernels.bench.timing import synchronize

_REPEATS = 3


class Limits:
    """The best rates of a device seen so far.

    They are measured again and again through a run, since other programs can only lower them.

    Args:
        device: CPU or CUDA.
        quick: small buffers and few repeats: not a limit of the machine, only for trying out.
    """

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device = device
        self.quick = quick
        self._copy = 0.0
        self._matmul: dict[str, float] = {}

    def measure(self, unit: str) -> None:
        """Measure the copy, and the matmul in a dtype given by its name."""
        self._copy = max(self._copy, self._copy_rate())
        self._matmul[unit] = max(self._matmul.get(unit, 0.0), self._matmul_rate(unit))

    def apply(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the share of the limit that they reach."""
        return [self._apply(row) for row in rows]

    def as_json(self) -> dict[str, float]:
        """What was measured so far."""
        found = {"copy_gb_per_s": self._copy * 1e-9} if self._copy else {}
        for unit, rate in self._matmul.items():
            found[f"matmul_{unit}_tflop_per_s"] = rate * 1e-12
        return found

    def _apply(self, row: Row) -> Row:
        seconds = row.graph or row.median
        if seconds is None or row.unit not in self._matmul:
            return row
        copy, matmul = row.bytes / self._copy, row.operations / self._matmul[row.unit]
        return replace(
            row,
            limit_percent=100.0 * max(copy, matmul) / seconds,
            limit_by="copy" if copy >= matmul else "matmul",
        )

    def _copy_rate(self) -> float:
        """Bytes read and written a second by a copy far larger than the caches."""
        megabytes = 8 if self.quick else (2048 if self.device.type == "cuda" else 256)
        source = torch.rand(megabytes * 2**18, device=self.device)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * source.element_size()
        return moved / self._fastest(lambda: target.copy_(source))

    def _matmul_rate(self, unit: str) -> float:
        """Operations a second of a square matmul, two an inner step; float32 as torch is set."""
        size = 128 if self.quick else (8192 if self.device.type == "cuda" else 2048)
        dtype: torch.dtype = getattr(torch, unit)
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self._fastest(lambda: a @ b)

    def _fastest(self, run: Callable[[], object]) -> float:
        """Least seconds of a call."""
        run()
        samples = []
        for _ in range(_REPEATS):
            synchronize(self.device)
            started = time.perf_counter()
            run()
            synchronize(self.device)
            samples.append(time.perf_counter() - started)
        return min(samples)
