"""Measure a workload: check every variant, then time those that are right, then their memory."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_kernels import _dispatch
from calm_kernels.bench import timing
from calm_kernels.bench.limits import Limits
from calm_kernels.bench.memory import peak_bytes
from calm_kernels.bench.rows import Row, Status, with_ratios
from calm_kernels.bench.timing import Budget, Runnable
from calm_kernels.bench.workload import (
    PEERS,
    Case,
    Check,
    CheckFunction,
    ExactFunction,
    Inputs,
    Outputs,
    Variant,
    Workload,
)

_CACHE_BYTES = 32 << 20
"""Of a CPU's last cache where the system does not tell."""
_CACHES_TO_FILL = 3
_MAX_INPUT_SETS = 64
_MAX_INPUT_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class Plan:
    """What to measure and how thoroughly.

    Attributes:
        device: where.
        size: ``official`` or ``small``.
        variants: names or parts of names; empty for all.
        skip: names or parts of names to leave out.
        budget: time a case.
        seed: of the inputs, and of torch's generator; below 2^30.
        growth: the sweeps instead of the cases.
        progress: told what happens, a line at a time.
    """

    device: torch.device
    size: str = "official"
    variants: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    budget: Budget = timing.THOROUGH
    seed: int = 0
    growth: bool = False
    progress: Callable[[str], None] = lambda text: None

    def includes(self, variant: Variant) -> bool:
        """Whether a variant is asked for."""
        wanted = not self.variants or any(variant.answers_to(name) for name in self.variants)
        return wanted and not any(variant.answers_to(name) for name in self.skip)


def run(workload: Workload, plan: Plan, limits: Limits) -> Iterator[list[Row]]:
    """The rows of a workload, one list a case.

    ``limits`` may still rise: apply them once more when all is measured.
    """
    if plan.growth:
        for axis, case in workload.growth_cases(plan.device, plan.size):
            assert workload.growth is not None
            chosen = plan.variants or workload.growth.variants
            rows = run_case(workload, case, replace(plan, variants=chosen), limits)
            yield [replace(row, sweep=axis) for row in rows]
        return
    for case in workload.cases(plan.device, plan.size):
        yield run_case(workload, case, plan, limits)


def run_case(workload: Workload, case: Case, plan: Plan, limits: Limits) -> list[Row]:
    """The rows of one case."""
    prepared = prepare_case(workload, case, plan)
    plan.progress(f"{workload.name} {case.label} {case.dtype_name}: timing")
    times = timing.time_interleaved(
        prepared.runnables, prepared.input_sets, case.device, plan.budget
    )
    gc.collect()
    for variant in prepared.variants:
        if variant.name not in times:
            continue
        time, runnable = times[variant.name], prepared.runnables[variant.name]
        row = replace(
            prepared.rows[variant.name],
            median=time.median, p20=time.p20, p80=time.p80, count=time.count,
            memory=peak_bytes(runnable, prepared.input_sets[0], case.device),
        )  # fmt: skip
        if case.device.type == "cuda" and time.median < timing.GRAPH_BELOW:
            row = _with_graph(row, workload, variant, prepared, plan.budget)
        prepared.rows[variant.name] = _with_rates(row)
    for unit in {prepared.rows[name].unit for name in times}:
        limits.measure(unit)
    return limits.apply(with_ratios(list(prepared.rows.values())))


@dataclass(frozen=True)
class Prepared:
    """A case whose variants have been checked.

    Attributes:
        variants: those asked for.
        input_sets: to take in turn; the first is the one that was checked.
        rows: by variant, without times.
        runnables: the variants that run and are right, ready to be timed.
    """

    case: Case
    variants: tuple[Variant, ...]
    input_sets: list[Inputs]
    rows: dict[str, Row]
    runnables: dict[str, Runnable]
    exacts: _Exacts


def prepare_case(workload: Workload, case: Case, plan: Plan) -> Prepared:
    """Make inputs, prepare every variant and check its result."""
    told = f"{workload.name} {case.label} {case.dtype_name}"
    plan.progress(f"{told}: inputs")
    if "torch._dynamo" in sys.modules:
        # Each case compiles afresh; torch gives up on a function after eight recompilations.
        torch.compiler.reset()
    # Two seeds: variants that draw from torch's own generator must not meet the inputs' numbers.
    generator = torch.Generator(case.device).manual_seed(2 * plan.seed)
    torch.manual_seed(2 * plan.seed + 1)
    state = workload.make_state(case, generator)
    input_sets: list[Inputs] = [{**state, **workload.make_inputs(case, state, generator)}]
    for _ in range(_num_input_sets(input_sets[0], state, case.device) - 1):
        input_sets.append({**state, **workload.make_inputs(case, state, generator)})

    variants = tuple(v for v in workload.variants if plan.includes(v))
    prepared = Prepared(case, variants, input_sets, {}, {}, _Exacts(case, input_sets[0]))
    for variant in variants:
        plan.progress(f"{told}: {variant.name}")
        row, runnable = _prepare_and_check(workload, variant, prepared)
        prepared.rows[variant.name] = row
        if runnable is not None:
            prepared.runnables[variant.name] = runnable
    return prepared


class _Exacts:
    """Exact answers on the first input set, computed once each."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._answers: dict[ExactFunction, Any] = {}

    def answer(self, exact: ExactFunction) -> Any:
        if exact not in self._answers:
            with torch.enable_grad():
                self._answers[exact] = exact(self._case, self._inputs)
        return self._answers[exact]


def _prepare_and_check(
    workload: Workload, variant: Variant, prepared: Prepared
) -> tuple[Row, Runnable | None]:
    """The row so far, and what to time if the result is right."""
    case = prepared.case
    cost = (variant.cost or workload.cost)(case)
    row = Row(
        case.workload, variant.name, variant.role, dict(case.shape), case.dtype_name,
        case.device.type, torch.get_num_threads(), bytes=cost.bytes, operations=cost.operations,
        unit=str(cost.unit).removeprefix("torch."),
    )  # fmt: skip
    if (problem := variant.why_not(case)) is not None:
        return replace(row, status="skipped", note=problem), None
    try:
        runnable = Runnable(variant.prepare(case), variant.backend)
        with _dispatch.backend(variant.backend):
            outputs = runnable.call(prepared.input_sets[0])
        check = _check(workload, variant, prepared, outputs)
        # Memory that goes back to the allocator must not hold the right answer for the next one.
        poison(outputs)
    except Exception as error:
        status: Status = "error" if variant.role in PEERS else "FAIL"
        return replace(row, status=status, note=_reason(error)), None
    row = replace(row, error=check.error, bound=check.bound, measure=check.measure)
    if not check.passed:
        return replace(row, status="FAIL", note=_excess(check)), None
    note = variant.note(case, prepared.input_sets[0]) if variant.note is not None else ""
    return replace(row, note=note), runnable


def _check(workload: Workload, variant: Variant, prepared: Prepared, outputs: Outputs) -> Check:
    """Outputs on the first input set against the exact answer."""
    exact = prepared.exacts.answer(variant.exact or workload.exact)
    check: CheckFunction = variant.check or workload.check
    return check(prepared.case, prepared.input_sets[0], outputs, exact)


def _excess(check: Check) -> str:
    return f"error {check.error:.2g} past its bound {check.bound:.2g} ({check.measure})"


def _with_graph(
    row: Row, workload: Workload, variant: Variant, prepared: Prepared, budget: Budget
) -> Row:
    """The row with the time inside a CUDA graph, whose own results are checked as well."""
    try:
        replay = timing.capture(prepared.runnables[variant.name], prepared.input_sets)
        for outputs in replay.outputs:
            poison(outputs)
        replay.graph.replay()
        torch.cuda.synchronize()
        check = _check(workload, variant, prepared, replay.outputs[0])
        if not check.passed:
            return replace(row, status="FAIL", note=f"replayed CUDA graph: {_excess(check)}")
        return replace(row, graph=replay.seconds(budget.replays))
    except Exception as error:
        return replace(row, note=f"no CUDA graph: {_reason(error)}")


def _with_rates(row: Row) -> Row:
    seconds = row.graph or row.median
    if seconds is None:
        return row
    return replace(
        row,
        gb_per_s=row.bytes / seconds * 1e-9,
        tflop_per_s=row.operations / seconds * 1e-12,
    )


def poison(outputs: Outputs) -> None:
    """Overwrite results: NaN, the lowest integer, or True."""
    for tensor in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
        if not isinstance(tensor, Tensor):
            continue
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
        else:
            tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


def _num_input_sets(inputs: Inputs, state: Mapping[str, Any], device: torch.device) -> int:
    """So many that a set has left the cache by the time its turn comes again."""
    size = sum(
        value.numel() * value.element_size()
        for name, value in inputs.items()
        if name not in state and isinstance(value, Tensor)
    )
    size = max(size, 1)
    affordable = max(1, _MAX_INPUT_BYTES[device.type] // size)
    wanted = math.ceil(_CACHES_TO_FILL * cache_bytes(device) / size)
    return max(2, min(wanted, affordable, _MAX_INPUT_SETS))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
        return int(caches[-1].read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError, IndexError):
        return _CACHE_BYTES


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
