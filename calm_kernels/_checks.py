"""Argument checks of the public functions: done once, at the top, with the fix in the message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGER_DTYPES = (torch.int64, torch.int32)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype], shape: Sequence[int | str]
) -> None:
    """Check that ``value`` is a tensor with one of ``dtypes`` and of ``shape``.

    A shape entry is an exact size or a letter that names a free size; a leading ``"*"`` stands for
    any number of dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected dtype {_names(dtypes)}; got {_names([value.dtype])}; "
            "convert it with .to()"
        )
    actual = value.shape
    tail = shape
    fits = len(actual) == len(shape)
    if shape and shape[0] == "*":
        tail = shape[1:]
        fits = len(actual) >= len(tail)
    if fits:
        for expected, size in zip(reversed(tail), reversed(actual), strict=False):
            if not isinstance(expected, str) and size != expected:
                fits = False
    if not fits:
        expected_shape = ", ".join(str(entry) for entry in shape)
        raise ValueError(f"{name}: expected shape [{expected_shape}]; got {list(actual)}")


def same_device(**tensors: Tensor | None) -> torch.device:
    """Check that the tensors lie on one device and return it."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    for name, value in tensors.items():
        if value is not None and value.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device}, that of {first_name}; "
                f"got {value.device}; move it with .to()"
            )
    return first.device


def same_dtype(**tensors: Tensor | None) -> torch.dtype:
    """Check that the tensors share one dtype and return it."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    for name, value in tensors.items():
        if value is not None and value.dtype != first.dtype:
            raise TypeError(
                f"{name}: expected dtype {_names([first.dtype])}, that of {first_name}; "
                f"got {_names([value.dtype])}; convert it with .to()"
            )
    return first.dtype


def at_least(name: str, value: int, minimum: int, why: str = "") -> None:
    """Check an integer against its minimum."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}{why}; got {value}")


def in_range(name: str, value: int, minimum: int, maximum: int) -> None:
    """Check an integer against both of its ends, which are allowed."""
    at_least(name, value, minimum)
    if value > maximum:
        raise ValueError(f"{name}: expected at most {maximum}; got {value}")


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed of an op as an int64 tensor of one element on ``device``.

    ``None`` draws one from torch's generator on that device, so ``torch.manual_seed`` governs it.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected an int64 tensor of one element; got {_names([seed.dtype])} "
                f"of shape {list(seed.shape)}"
            )
        if seed.device != device:
            raise ValueError(f"seed: expected device {device}; got {seed.device}")
        return seed if seed.dim() == 1 else seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected int, int64 tensor or None; got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits; got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)
