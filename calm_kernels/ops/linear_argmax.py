"""The most likely token of each row without storing its logits."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import linear_argmax as reference


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = (hidden.shape[0],)
    return (
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=reference.logit_dtype(hidden.dtype)),
    )


_linear_argmax = define(
    "linear_argmax",
    "(Tensor hidden, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    reference=_autocast.disabled(reference.linear_argmax),
    fake=_fake,
    triton_module="calm_kernels.triton.linear_argmax",
)


@overload
def linear_argmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = ..., *, return_max: Literal[False] = ...
) -> Tensor: ...


@overload
def linear_argmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = ..., *, return_max: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def linear_argmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, return_max: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """argmax over the vocabulary of ``hidden @ weight.T + bias``, which is never stored.

    Args:
        hidden: [*, H], float32, bfloat16, float16 or float64.
        weight: [V, H], same dtype and device.
        bias: [V], same dtype and device, or None.
        return_max: also return the largest logit of each row.

    Returns:
        int64 [*]. Logits are accumulated and compared in float32 (float64 for float64 inputs); a
        tie goes to the lowest index, and the first NaN of a row wins, as in ``torch.argmax``.
        With ``return_max`` a pair of that and the logit chosen, [*] float32 (float64).
        No gradient. Temporary memory is a tile of logits (one a thread on CPUs, registers on GPUs),
        whatever the number of rows and V.

    Any H is served; on GPUs, 16-bit operands whose H is no multiple of 8 are read slowly.
    Autocast: the inputs are cast to the autocast dtype.

    Raises:
        TypeError: a dtype is not floating, or they differ. ValueError: a shape does not fit, the
            vocabulary is empty, devices differ.
    """
    _checks.tensor("hidden", hidden, _checks.FLOAT_DTYPES, ("*", "H"))
    _checks.tensor("weight", weight, _checks.FLOAT_DTYPES, ("V", hidden.shape[-1]))
    _checks.at_least("weight.shape[0]", weight.shape[0], 1, " row: an argmax needs a candidate")
    if bias is not None:
        _checks.tensor("bias", bias, _checks.FLOAT_DTYPES, (weight.shape[0],))
    device = _checks.same_device(hidden=hidden, weight=weight, bias=bias)
    hidden, weight = (_autocast.cast(device, t.detach()) for t in (hidden, weight))
    bias = _autocast.cast(device, None if bias is None else bias.detach())
    _checks.same_dtype(hidden=hidden, weight=weight, bias=bias)
    index: Tensor
    value: Tensor
    index, value = _linear_argmax(
        device, hidden.reshape(-1, hidden.shape[-1]).contiguous(), weight, bias
    )
    index = index.reshape(hidden.shape[:-1])
    return (index, value.reshape(hidden.shape[:-1])) if return_max else index
