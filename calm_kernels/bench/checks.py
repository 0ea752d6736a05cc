"""Measures of error that workloads share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from calm_kernels.bench.workload import Check

RELATIVE = "relative to fp64"
MISMATCHES = "share of wrong entries"
STANDARD_ERRORS = "standard errors from the exact mean"

ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
"""Relative L2 error that a chain of a few operations in a dtype may make."""

LARGEST_Z = 5.0
"""Standard errors allowed to a random result: a false alarm in 1.7 million checks."""


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||, in float64; infinite for a wrong shape."""
    if result.shape != exact.shape:
        return math.inf
    exact = exact.double()
    difference = torch.linalg.vector_norm(result.detach().double() - exact)
    scale = torch.linalg.vector_norm(exact)
    if float(scale) == 0.0:
        return 0.0 if float(difference) == 0.0 else math.inf
    return float(difference / scale)


def largest_relative_error(
    results: Sequence[Tensor], exacts: Sequence[Tensor], bound: float
) -> Check:
    """The worst relative error among several results."""
    errors = [relative_error(r, e) for r, e in zip(results, exacts, strict=True)]
    # max() would pass over a NaN that does not come first.
    worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    return Check(worst, bound, RELATIVE)


def share_of_mismatches(result: Tensor, exact: Tensor) -> Check:
    """Entries that differ; none may."""
    if result.shape != exact.shape:
        return Check(math.inf, 0.0, MISMATCHES)
    wrong = (result != exact).double().mean()
    return Check(float(wrong), 0.0, MISMATCHES)


def paired_z(estimate: Tensor, exact: Tensor) -> float:
    """|mean difference| over independent entries, as a standard normal number.

    Student's t of the differences, brought to the normal quantile of the same probability
    (Wallace, "Bounds on normal approximations to Student's and the chi-square distributions",
    1959), so that one bound serves few and many entries. Infinite where an entry is not finite,
    or the differences are as large as the exact values.
    """
    if estimate.shape != exact.shape:
        return math.inf
    difference = (estimate.detach().double() - exact.double()).flatten()
    scale = float(exact.double().square().mean().sqrt())
    spread = float(difference.square().mean().sqrt())
    if not math.isfinite(spread) or spread > 0.5 * scale:
        return math.inf
    error = float(difference.std()) / math.sqrt(difference.numel())
    mean = abs(float(difference.mean()))
    if error == 0.0:
        return 0.0 if mean == 0.0 else math.inf
    freedom = difference.numel() - 1
    narrowed = freedom * math.log1p((mean / error) ** 2 / freedom)
    return (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(narrowed)
