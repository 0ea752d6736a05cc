"""What to compile ahead of time: instances of Triton kernels, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specialization:
    """One instance of a Triton kernel, as a launch on real tensors would make it.

    Attributes:
        name: as the report shows it, e.g. ``"linear_argmax bf16 H=512"``.
        kernel: the ``triton.jit`` function.
        signature: type of every argument in order: ``"*bf16"``, ``"i32"``, ``"constexpr"``.
        constants: the values of the constexpr arguments.
        aligned: arguments that are multiples of 16 (pointers: addresses).
        num_warps, num_stages: as launched.
        tensor_cores: whether the machine code has to use the matrix units.
        capability: target, 90 for sm_90 (wgmma), 80 for sm_80 (mma).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = field(default=True, kw_only=True)
    capability: int = field(default=90, kw_only=True)
