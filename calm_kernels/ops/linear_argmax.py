"""The most likely token of each row without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import linear_argmax as reference


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty((hidden.shape[0],), dtype=torch.int64)


_linear_argmax = define(
    "linear_argmax",
    "(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor",
    reference=_autocast.disabled(reference.linear_argmax),
    fake=_fake,
)


def linear_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """argmax over the vocabulary of ``hidden @ weight.T + bias``, which is never stored.

    Args:
        hidden: [*, H], float32, bfloat16, float16 or float64.
        weight: [V, H], same dtype and device.
        bias: [V], same dtype and device, or None.

    Returns:
        int64 [*]. Logits are accumulated and compared in float32 (float64 for float64 inputs); a
        tie goes to the lowest index, and the first NaN of a row wins, as in ``torch.argmax``.
        No gradient. Temporary memory is a tile of logits, whatever the number of rows and V.

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
    result: Tensor = _linear_argmax(
        device, hidden.reshape(-1, hidden.shape[-1]).contiguous(), weight, bias
    )
    return result.reshape(hidden.shape[:-1])
