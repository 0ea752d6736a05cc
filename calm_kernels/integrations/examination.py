"""Looking at a module from outside: its children, and what it computes.

Names alone do not say what a module computes, so whatever is recognised by name is confirmed by
values: a copy with random weights is run beside what would replace it.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels.integrations.patching import is_hooked

TOLERANCE = 1e-4
"""Largest difference between float32 results that are the same function, relative to the largest
value."""

_SEED = 20251027


def child_names(module: nn.Module) -> set[str]:
    """Names of the direct submodules."""
    return {name for name, _ in module.named_children()}


def parameter_names(module: nn.Module) -> set[str]:
    """Names of the module's own parameters."""
    return {name for name, _ in module.named_parameters(recurse=False)}


def is_plain_linear(module: object, bias: bool | None = None) -> bool:
    """Whether a module is a torch.nn.Linear and no subclass, with or without bias if that is said.

    Subclasses compute something else: adapters, quantized weights, parametrizations.
    """
    if type(module) is not nn.Linear:
        return False
    return bias is None or (module.bias is not None) == bias


def is_from_here(module: nn.Module) -> bool:
    """Whether a module is one of this package's layers, which need no replacement."""
    return type(module).__module__.split(".")[0] == "calm_kernels"


def why_not_examined(module: nn.Module) -> str | None:
    """Why a module cannot be examined or replaced; None if it can."""
    if any(is_hooked(child) for child in module.modules() if child is not module):
        return "a module inside has hooks, which would not run"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            return f"{name} is on the meta device; load the weights first"
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}, not a plain parameter"
        if not parameter.is_floating_point():
            return f"{name} is {parameter.dtype}"
    return None


def generator() -> torch.Generator:
    """Random numbers of the examination, the same every time."""
    return torch.Generator().manual_seed(_SEED)


def skeleton(module: nn.Module, stubs: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy on the CPU in float32 with random weights in place of the module's own.

    Args:
        module: is left alone; its weights are not read.
        stubs: what stands in the copy for some submodules, by ``id``.
    """
    drawn = generator()
    memo: dict[int, Any] = dict(stubs or {})
    stubbed = set(memo)
    for child in module.modules():
        if id(child) in stubbed:
            continue
        for parameter in child.parameters(recurse=False):
            if id(parameter) not in memo:
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                values = torch.randn(parameter.shape, generator=drawn) * scale
                memo[id(parameter)] = nn.Parameter(values + (parameter.dim() == 1))
        for buffer in child.buffers(recurse=False):
            memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    copied = copy.deepcopy(module, memo).requires_grad_(False)
    for child in copied.modules():
        if getattr(child, "gradient_checkpointing", False):
            child.gradient_checkpointing = False  # type: ignore[assignment]
    return copied


def agree(actual: object, expected: object, tolerance: float = TOLERANCE) -> bool:
    """Whether two results are the same structure of the same values."""
    if isinstance(expected, Tensor):
        return (
            isinstance(actual, Tensor)
            and actual.shape == expected.shape
            and actual.dtype == expected.dtype
            and bool(expected.isfinite().all())
            and float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())
        )
    if isinstance(expected, (tuple, list)):
        return (
            type(actual) is type(expected)
            and len(actual) == len(expected)
            and all(agree(a, e, tolerance) for a, e in zip(actual, expected, strict=True))
        )
    return actual is expected


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, no autocast, and random states as they were afterwards."""
    python_state = random.getstate()
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)


def modules_with(model: nn.Module, children: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have at least these children, this package's own left out."""
    wanted = set(children)
    for path, module in model.named_modules():
        if wanted <= child_names(module) and not is_from_here(module):
            yield path, module
