"""The package's random stream as operators: Philox4x32-10 uniforms and normals.

A number is a pure function of (seed, stream, row, element); nothing depends on how many are asked
for at once, on the order, or on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import Operator, define
from calm_kernels.reference import philox as reference

_SCHEMA = "(Tensor seed, Tensor rows, int count, int stream, int first=0) -> Tensor"
_MAX_ELEMENTS = 2**34  # the block number, a quarter of the element's, is one 32-bit word


def _uniform(seed: Tensor, rows: Tensor, count: int, stream: int, first: int = 0) -> Tensor:
    return reference.uniform(seed, rows, count, stream, first=first).contiguous()


def _normal(seed: Tensor, rows: Tensor, count: int, stream: int, first: int = 0) -> Tensor:
    return reference.normal(seed, rows, count, stream, first=first).contiguous()


def _fake(seed: Tensor, rows: Tensor, count: int, stream: int, first: int = 0) -> Tensor:
    return rows.new_empty((rows.shape[0], count), dtype=torch.float32)


_philox_uniform = define("philox_uniform", _SCHEMA, reference=_uniform, fake=_fake)
_philox_normal = define("philox_normal", _SCHEMA, reference=_normal, fake=_fake)


def _call(
    operator: Operator,
    seed: int | Tensor | None,
    rows: Tensor,
    count: int,
    stream: int,
    first: int,
) -> Tensor:
    _checks.tensor("rows", rows, (torch.int64,), ("R",))
    _checks.at_least("count", count, 0)
    _checks.at_least("first", first, 0)
    _checks.in_range("stream", stream, 0, 2**32 - 1)
    if first + count > _MAX_ELEMENTS:
        raise ValueError(
            f"first + count: expected at most 2**34 elements a row; got {first + count}; "
            "use more rows"
        )
    seed = _checks.seed_tensor(seed, rows.device)
    result: Tensor = operator(rows.device, seed, rows, count, int(stream), first)
    return result


def philox_uniform(
    seed: int | Tensor | None, rows: Tensor, count: int, stream: int, *, first: int = 0
) -> Tensor:
    """Uniform numbers in the open interval (0, 1): elements [first, first + count) of each row.

    Args:
        seed: key of the stream: an int of 64 bits, an int64 tensor of one element on the device of
            ``rows``, or None to draw one from torch's generator.
        rows: row numbers, int64 [R], any values.
        count: elements per row.
        stream: a member of :class:`calm_kernels.reference.philox.Stream`, or any 32-bit number.
        first: number of the first element.

    Returns:
        float32 [R, count], multiples of 2^-24, never 0 or 1. No gradient.

    Raises:
        TypeError: wrong dtype or type. ValueError: wrong shape, a negative or too large number.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    return _call(_philox_uniform, seed, rows, count, stream, first)


def philox_normal(
    seed: int | Tensor | None, rows: Tensor, count: int, stream: int, *, first: int = 0
) -> Tensor:
    """Standard normal numbers, by Box-Muller on neighbouring pairs of the uniforms.

    Arguments, result and errors as :func:`philox_uniform`; the same words are used, so take
    uniforms and normals from different streams. The largest magnitude is 5.77.
    """
    return _call(_philox_normal, seed, rows, count, stream, first)
