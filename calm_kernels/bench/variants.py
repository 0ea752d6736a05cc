"""Makers of the variants that most workloads have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from calm_kernels.bench.workload import Call, Case, Inputs, Outputs, Role, Variant

Names = Callable[[Case], tuple[str, ...]]


def nothing(case: Case) -> tuple[str, ...]:
    """No input's gradient is wanted."""
    return ()


def call_of(forward: Call, names: tuple[str, ...]) -> Call:
    """The function to time: forward alone, or forward and the gradients of some inputs.

    With gradients, the result is (output, one gradient a name). The gradient that comes in is the
    input ``cotangent``; without such an input the output is summed.
    """

    def without_gradients(inputs: Inputs) -> Outputs:
        with torch.no_grad():
            return forward(inputs)

    def with_gradients(inputs: Inputs) -> Outputs:
        output = forward(inputs)
        scalar = output.sum() if "cotangent" not in inputs else output
        gradients = torch.autograd.grad(
            scalar, [inputs[name] for name in names], inputs.get("cotangent")
        )
        return (output.detach(), *gradients)

    return with_gradients if names else without_gradients


def eager(forward: Call, gradients: Names = nothing, **fields: Any) -> Variant:
    """The plain PyTorch formulation: what is in use without this package."""
    return Variant("eager", "eager", lambda case: call_of(forward, gradients(case)), **fields)


def compiled(forward: Call, gradients: Names = nothing, **fields: Any) -> Variant:
    """``torch.compile`` of it, tuned as far as torch will on a GPU."""

    def prepare(case: Case) -> Call:
        # CUDA graphs are left to the measurement, which replays every variant in one.
        mode = "max-autotune-no-cudagraphs" if case.device.type == "cuda" else None
        return call_of(torch.compile(forward, dynamic=False, mode=mode), gradients(case))

    return Variant("compiled", "compiled", prepare, **fields)


def package(
    forward: Call,
    operators: tuple[str, ...],
    gradients: Names = nothing,
    label: str = "",
    **fields: Any,
) -> tuple[Variant, ...]:
    """An operator of this package on each of its backends.

    Args:
        forward: calls the public function.
        operators: names of the operators that it runs.
        gradients: inputs whose gradients belong to the workload.
        label: tells several uses of an operator apart: ``native/label``.
        fields: further fields of :class:`Variant`.
    """
    roles: tuple[Role, ...] = ("native", "triton", "reference")
    return tuple(
        Variant(
            f"{role}/{label}" if label else role,
            role,
            lambda case: call_of(forward, gradients(case)),
            backend=role,
            operators=operators,
            **fields,
        )
        for role in roles
    )


def ours(forward: Call, gradients: Names = nothing, name: str = "ours", **fields: Any) -> Variant:
    """A composition of operators, each on the backend that serves it best."""
    return Variant(name, "ours", lambda case: call_of(forward, gradients(case)), **fields)


def needs_package(module: str, device_type: str | None = None) -> Callable[[Case], str | None]:
    """For ``Variant.missing``: a package that may not be installed, or not serve a device."""

    def missing(case: Case) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install 'calm_kernels[peers]'"
        if device_type is not None and case.device.type != device_type:
            return f"{module} needs a {device_type} device"
        return None

    return missing
