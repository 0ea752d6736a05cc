"""What a workload is: inputs, variants, an exact check, a count of bytes and operations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from calm_kernels import _dispatch

Size = int | float | str
Inputs = Mapping[str, Any]
Outputs = Any
"""A tensor, or a tuple of tensors."""
Call = Callable[[Inputs], Outputs]
Role = Literal["eager", "compiled", "peer", "ceiling", "native", "triton", "reference", "ours"]

PEERS: tuple[Role, ...] = ("eager", "compiled", "peer", "ceiling")
"""Roles that are not this package's."""


@dataclass(frozen=True)
class Setting:
    """Sizes and a dtype to measure at."""

    shape: Mapping[str, Size]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Case:
    """A workload at one setting on one device."""

    workload: str
    shape: Mapping[str, Size]
    dtype: torch.dtype
    device: torch.device

    def size(self, name: str) -> int:
        """A size that is a whole number."""
        value = self.shape[name]
        assert isinstance(value, int), (name, value)
        return value

    @property
    def label(self) -> str:
        """The sizes in one line: ``P=512 N=8``."""
        return " ".join(f"{name}={value}" for name, value in self.shape.items())

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Cost:
    """The least that any implementation must do.

    ``unit`` is the dtype whose matmul rate bounds the operations: that of the tensors where
    a matrix unit can do the work, float32 where plain lanes must.
    """

    bytes: int
    operations: int
    unit: torch.dtype = torch.float32


@dataclass(frozen=True)
class Check:
    """How far a result is from the exact one, in the sense of ``measure``."""

    error: float
    bound: float
    measure: str

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.bound


ExactFunction = Callable[[Case, Inputs], Any]
CheckFunction = Callable[[Case, Inputs, Outputs, Any], Check]
CostFunction = Callable[[Case], Cost]


@dataclass(frozen=True)
class Variant:
    """One way to compute a workload.

    Attributes:
        name: as shown; a part after ``/`` tells variants of a backend apart.
        role: what it is; ratios are quoted against ``eager`` and ``compiled``.
        prepare: makes the function to time, outside the timing.
        backend: forced while it runs, see :func:`calm_kernels.backend`.
        operators: operators of the package that this backend has to serve.
        missing: why it cannot run here, or None.
        exact, check, cost: in place of the workload's own.
        note: a line about the inputs of a call, to stand beside the time.
    """

    name: str
    role: Role
    prepare: Callable[[Case], Call]
    backend: str = "auto"
    operators: tuple[str, ...] = ()
    missing: Callable[[Case], str | None] | None = None
    exact: ExactFunction | None = None
    check: CheckFunction | None = None
    cost: CostFunction | None = None
    note: Callable[[Case, Inputs], str] | None = None

    def why_not(self, case: Case) -> str | None:
        """Why this variant cannot run a case; None if it can."""
        for name in self.operators:
            problem = _dispatch.operators()[name].why_not(self.backend, case.device.type)
            if problem is not None:
                return f"{name}: {problem}"
        return self.missing(case) if self.missing is not None else None

    def answers_to(self, wanted: str) -> bool:
        """Whether a name on the command line means this variant: whole, or either part of it."""
        return wanted in (self.name, *self.name.split("/"))


@dataclass(frozen=True)
class Growth:
    """Sweeps of one size at a time around a base, for plots of time and memory.

    ``base`` has the keys ``small``, ``cpu`` and ``cuda``. Every axis takes its base times each of
    the factors, at least ``smallest``.
    """

    base: Mapping[str, Setting]
    axes: tuple[str, ...]
    variants: tuple[str, ...]
    factors: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)
    smallest: int = 2


@dataclass(frozen=True)
class Workload:
    """An operation to measure.

    Attributes:
        name: on the command line.
        summary: one line.
        settings: keys ``small`` (seconds, for tests), ``cpu`` and ``cuda`` (official).
        make_inputs: fresh random inputs of a call, made on the generator's device.
        variants: in the order of the table.
        exact: the answer in float64 or integers.
        check: the error of outputs against it, with its bound.
        cost: bytes and operations.
        make_state: what all input sets share: weights, numbers. Its entries join the inputs.
        growth: sweeps, if any.
    """

    name: str
    summary: str
    settings: Mapping[str, tuple[Setting, ...]]
    make_inputs: Callable[[Case, Inputs, torch.Generator], dict[str, Any]]
    variants: tuple[Variant, ...]
    exact: ExactFunction
    check: CheckFunction
    cost: CostFunction
    make_state: Callable[[Case, torch.Generator], dict[str, Any]] = field(
        default=lambda case, generator: {}
    )
    growth: Growth | None = None

    def cases(self, device: torch.device, size: str) -> list[Case]:
        """The cases of a size, ``small`` or ``official``, on a device."""
        settings = self.settings["small" if size == "small" else device.type]
        return [self._case(setting, device) for setting in settings]

    def growth_cases(self, device: torch.device, size: str) -> list[tuple[str, Case]]:
        """(axis, case) of every sweep."""
        if self.growth is None:
            return []
        base = self.growth.base["small" if size == "small" else device.type]
        found = []
        for axis in self.growth.axes:
            middle = base.shape[axis]
            assert isinstance(middle, int)
            values = {max(self.growth.smallest, int(middle * f)) for f in self.growth.factors}
            for value in sorted(values):
                setting = Setting({**base.shape, axis: value}, base.dtype)
                found.append((axis, self._case(setting, device)))
        return found

    def _case(self, setting: Setting, device: torch.device) -> Case:
        return Case(self.name, setting.shape, setting.dtype, device)


_registry: dict[str, Workload] = {}


def register(workload: Workload) -> Workload:
    """Add a workload under its name.

    Raises:
        ValueError: the name is taken, or a variant's name is.
    """
    if workload.name in _registry:
        raise ValueError(f"workload: the name {workload.name!r} is taken")
    names = [variant.name for variant in workload.variants]
    if len(set(names)) != len(names):
        raise ValueError(f"workload {workload.name!r}: two variants share a name: {names}")
    _registry[workload.name] = workload
    return workload


def workloads() -> dict[str, Workload]:
    """All workloads by name, in the order of the documentation."""
    importlib.import_module("calm_kernels.bench.workloads")
    return dict(_registry)
