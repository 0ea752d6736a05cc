"""``calm-kernels bench``: every variant of the operators checked, timed and measured, one table."""

from __future__ import annotations

import argparse
import secrets

from calm_kernels.bench import report, timing
from calm_kernels.bench.conditions import conditions
from calm_kernels.bench.limits import Limits
from calm_kernels.bench.rows import Row, failed, record
from calm_kernels.bench.runner import Plan
from calm_kernels.bench.runner import run as run_workload
from calm_kernels.bench.workload import Workload, workloads
from calm_kernels.cli.console import make_reporter, print_table
from calm_kernels.training.errors import UserError
from calm_kernels.training.files import write_json, write_text

_LARGEST_SEED = 2**30


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; returns 1 if a row failed."""
    registry = workloads()
    if arguments.list:
        lines = [(w.name, w.summary, ", ".join(v.name for v in w.variants))
                 for w in registry.values()]  # fmt: skip
        print_table("workloads", ("name", "what", "variants"), lines, left=3)
        return 0
    chosen = _chosen(arguments, registry)
    plan = _plan(arguments)
    limits = Limits(plan.device, quick=arguments.quick)
    context = conditions(plan.device, plan.seed)
    rows: list[Row] = []
    for workload in chosen:
        for case_rows in run_workload(workload, plan, limits):
            rows = limits.apply([*rows, *case_rows])
            if arguments.json is not None:
                # Case by case, so that what was measured survives an interruption.
                write_json(arguments.json, record(rows, context, limits.as_json()))
    if not rows:
        raise UserError("nothing to measure: no chosen workload has growth sweeps")
    columns, cells = report.table(rows)
    print_table("benchmark", columns, cells, left=2)
    for line in report.remarks(rows):
        print(line)
    print(report.heading(context, limits.as_json()))
    if arguments.markdown is not None:
        write_text(arguments.markdown, report.markdown(rows, context, limits.as_json()))
    if arguments.plot is not None:
        from calm_kernels.bench.plots import plot

        plot(rows, arguments.plot, report.heading(context, limits.as_json()))
    failures = failed(rows)
    for row in failures:
        print(f"FAIL: {row.workload} {row.label} {row.dtype} {row.variant}: {row.note}")
    return 1 if failures else 0


def _chosen(arguments: argparse.Namespace, registry: dict[str, Workload]) -> list[Workload]:
    unknown = [name for name in arguments.workloads if name not in registry]
    if unknown:
        raise UserError(f"no workload {', '.join(unknown)}; there are {', '.join(registry)}")
    found = [registry[name] for name in arguments.workloads or registry]
    known = {name for w in found for v in w.variants for name in (v.name, *v.name.split("/"))}
    for name in (*arguments.variants, *arguments.skip):
        if name not in known:
            raise UserError(f"no variant {name}; there are {', '.join(sorted(known))}")
    return found


def _plan(arguments: argparse.Namespace) -> Plan:
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no GPU; use --device cpu")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UserError(f"threads: expected at least 1; got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = timing.QUICK if arguments.quick else timing.THOROUGH
    if arguments.seconds is not None:
        budget = timing.Budget(
            arguments.seconds, budget.min_rounds, budget.max_rounds, budget.replays
        )
    seed = secrets.randbelow(_LARGEST_SEED) if arguments.seed is None else arguments.seed
    if not 0 <= seed < _LARGEST_SEED:
        raise UserError(f"seed: expected 0 to {_LARGEST_SEED - 1}; got {seed}")
    return Plan(
        device=torch.device(name, 0) if name == "cuda" else torch.device(name),
        size="small" if arguments.quick else arguments.shape,
        variants=arguments.variants,
        skip=arguments.skip,
        budget=budget,
        seed=seed,
        growth=arguments.growth,
        progress=make_reporter().message,
    )
