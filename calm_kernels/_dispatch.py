"""One dispatch path for every operator.

An operator has one schema and up to three overloads with it, each visible by name in a graph:

``calm_kernels::op``            compiled C++ or CUDA, registered by the native library
``calm_kernels::op.triton``     Triton kernels, registered when first used
``calm_kernels::op.reference``  plain PyTorch, on any device: specification and fallback

All share one fake and one autograd formula, so tracing, ``opcheck`` and ``torch.compile`` work
whatever serves. The automatic choice is native, then Triton, then reference.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calm_kernels import _native

NAMESPACE = "calm_kernels"
BACKENDS = ("auto", "native", "triton", "reference")

_log = logging.getLogger("calm_kernels")
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_operators: dict[str, Operator] = {}
_announced: set[tuple[str, str]] = set()
_choices: dict[tuple[str, str, str], str] = {}
"""What was chosen: libraries come and stay, and a look is 4 microseconds."""


def _checked_backend(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_forced = _checked_backend(os.environ.get("CALM_KERNELS_BACKEND", "auto"), "CALM_KERNELS_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every operator inside the ``with`` block (process-wide).

    Args:
        name: ``"native"``, ``"triton"``, ``"reference"``, or ``"auto"`` for the automatic choice.

    Raises:
        ValueError: unknown name. An operator that the forced backend cannot serve raises
            RuntimeError when called, saying why.
    """
    global _forced
    previous, _forced = _forced, _checked_backend(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def current_backend() -> str:
    """The backend in force: ``"auto"`` unless one was forced."""
    return _forced


@dataclass(frozen=True)
class Operator:
    """An operator of the package; calling it runs the overload that the backend choice names."""

    name: str
    triton_module: str | None = None
    native_dtype: torch.dtype | None = None
    """The one dtype of the first argument that native kernels take; None if they take all."""
    _overloads: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def qualified_name(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    def __call__(self, device: torch.device, *args: Any) -> Any:
        """Run on ``device`` with the schema's arguments in order."""
        chosen = _choose(self.name, device.type, _forced)
        if chosen == "native" and self.native_dtype not in (None, args[0].dtype):
            if _forced == "native":
                raise RuntimeError(
                    f"{self.name}: backend 'native' serves {self.native_dtype} tensors, not "
                    f"{args[0].dtype}; or use backend 'auto'"
                )
            chosen = "reference"
        return self._overloads[chosen](*args)

    def why_not(self, backend_name: str, device_type: str) -> str | None:
        """Why a backend cannot serve this operator on a device; None if it can."""
        return _why_not(self.name, backend_name, device_type)

    def why_not_native_for(self, weights: Iterable[Tensor], dtype: torch.dtype) -> str | None:
        """Why the native kernel for a dtype does not serve weights; None if it does."""
        for found, device_type in {(weight.dtype, weight.device.type) for weight in weights}:
            if found != dtype:
                return f"weights are {found}, not {dtype}"
            if (problem := self.why_not("native", device_type)) is not None:
                return problem
        if _forced not in ("auto", "native"):
            return f"backend {_forced!r} is forced"
        return None

    def _why_not_native(self, device_type: str) -> str | None:
        if device_type not in ("cpu", "cuda"):
            return f"there is no native library for {device_type} tensors"
        if (problem := _native.library(device_type).problem) is not None:
            return problem
        if not _native.serves(self.qualified_name, device_type):
            return f"this operator has no {device_type} kernel in the native library"
        return None

    def _why_not_triton(self, device_type: str) -> str | None:
        if self.triton_module is None:
            return "this operator has no Triton kernel"
        if device_type != "cuda":
            return f"Triton kernels do not run on {device_type} tensors"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        importlib.import_module(self.triton_module)
        return None


def operators() -> dict[str, Operator]:
    """All operators by name."""
    return dict(_operators)


def _why_not(name: str, backend_name: str, device_type: str) -> str | None:
    """Why a backend cannot serve an operator. Under torch.compile this runs once, at trace time."""
    if backend_name == "reference":
        return None
    if backend_name == "native":
        return _operators[name]._why_not_native(device_type)
    return _operators[name]._why_not_triton(device_type)


def _choose(name: str, device_type: str, forced: str) -> str:
    """The overload that serves. Under torch.compile this runs once, at trace time."""
    key = (name, device_type, forced)
    if (known := _choices.get(key)) is None:
        known = _choices[key] = _find(*key)
    return known


def _find(name: str, device_type: str, forced: str) -> str:
    operator = _operators[name]
    if forced != "auto":
        if (problem := operator.why_not(forced, device_type)) is not None:
            raise RuntimeError(
                f"{name}: backend {forced!r} cannot serve {device_type} tensors: {problem}; "
                f"or use backend 'auto'"
            )
        return forced
    for candidate in ("native", "triton"):
        if operator.why_not(candidate, device_type) is None:
            return candidate
    if device_type == "cuda" and (name, device_type) not in _announced:
        _announced.add((name, device_type))
        _log.warning(
            "%s: the PyTorch reference serves %s tensors; `calm-kernels doctor` says why",
            name,
            device_type,
        )
    return "reference"


# What torch.compiler.assume_constant_result does, without importing the compiler (over a second)
# in every program that never compiles.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    triton_module: str | None = None,
    native_dtype: torch.dtype | None = None,
) -> Operator:
    """Define an operator on every floor.

    Args:
        name: operator name without namespace.
        schema: arguments and results in torch.library's language, e.g. ``"(Tensor x) -> Tensor"``.
        reference: the PyTorch implementation, taking the schema's arguments in order.
        fake: shapes and dtypes of the results, for tracing.
        backward, setup_context: the autograd formula, as ``torch.library.register_autograd`` takes
            them; without them, results do not require grad.
        triton_module: module that calls ``register_triton`` when imported.
        native_dtype: the one that native kernels take of the first argument; the reference serves
            the others. None if they take all.
    """
    operator = Operator(name, triton_module, native_dtype)
    _operators[name] = operator
    overloads = {"native": "", "reference": ".reference"}
    if triton_module is not None:
        overloads["triton"] = ".triton"
    for kind, suffix in overloads.items():
        qualified = f"{NAMESPACE}::{name}{suffix}"
        _library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=_library
            )
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        operator._overloads[kind] = getattr(packet, suffix[1:] or "default")
    _library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    return operator


def register_triton(name: str, implementation: Callable[..., Any]) -> None:
    """Give the ``.triton`` overload of an operator its CUDA implementation."""
    _library.impl(f"{name}.triton", implementation, "CUDA")
