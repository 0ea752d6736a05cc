"""The autocast rule of the matmul operators.

Under ``torch.autocast`` for their device, floating tensors of 32 bits or fewer are cast to the
autocast dtype at the public function, as ``torch.nn.functional.linear`` does; the cast is
differentiable. Inside, what an operator computes in float32 stays in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def cast(device: torch.device, tensor: _MaybeTensor) -> _MaybeTensor:
    """``tensor`` in the dtype that autocast asks for on ``device``; as it is without autocast."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    if not torch.is_autocast_enabled(device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device.type))


def disabled(implementation: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """An operator's implementation, forward or backward, that autocast leaves alone."""

    @functools.wraps(implementation)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        device_type = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device_type):
            return implementation(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args, **kwargs)

    return wrapper
