"""The result of one variant at one case: a row of the table and of the JSON record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from calm_kernels.bench.workload import Size

Status = Literal["ok", "FAIL", "skipped", "error"]
"""``FAIL``: past its error bound, or code of this package that raised. ``error``: a peer raised or
ran out of memory. ``skipped``: it cannot run here; the note says why."""

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One variant at one case. Times in seconds, memory in bytes; None is unmeasured."""

    workload: str
    variant: str
    role: str
    shape: Mapping[str, Size]
    dtype: str
    device: str
    threads: int
    sweep: str | None = None
    """the size that a growth sweep varies"""
    status: Status = "ok"
    note: str = ""
    error: float | None = None
    bound: float | None = None
    measure: str | None = None
    """the sense of error and bound"""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    count: int = 0
    """timed calls"""
    graph: float | None = None
    """median inside a replayed CUDA graph: without launches by the host"""
    memory: int | None = None
    """peak growth during a call, results included"""
    bytes: int = 0
    operations: int = 0
    unit: str = "float32"
    """dtype of the matmul that bounds the operations"""
    gb_per_s: float | None = None
    """of ``bytes``, in the time of ``graph`` if there is one, else ``median``; so the next three"""
    tflop_per_s: float | None = None
    limit_percent: float | None = None
    """least time at the measured rates over the time taken"""
    limit_by: str | None = None
    """``copy`` or ``matmul``: what bounds"""
    times_eager: float | None = None
    """eager's median over this one"""
    times_compiled: float | None = None

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.shape.items())


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case with their speed-ups over eager and compiled, where those were timed."""

    def fastest(role: str) -> float | None:
        return min((r.median for r in rows if r.role == role and r.median), default=None)

    eager, compiled = fastest("eager"), fastest("compiled")

    def over(reference: float | None, row: Row) -> float | None:
        return reference / row.median if reference and row.median else None

    return [
        replace(row, times_eager=over(eager, row), times_compiled=over(compiled, row))
        for row in rows
    ]


def failed(rows: Sequence[Row]) -> list[Row]:
    """The rows that make a run fail."""
    return [row for row in rows if row.status == "FAIL"]


def record(
    rows: Sequence[Row], conditions: Mapping[str, Any], limits: Mapping[str, float]
) -> dict[str, Any]:
    """Rows and their conditions as JSON types. Every row repeats versions, commit and date."""
    carried = {k: conditions.get(k) for k in ("torch", "triton", "driver", "commit", "date")}
    return {
        "schema": SCHEMA,
        "conditions": dict(conditions),
        "limits": dict(limits),
        "rows": [_finite({**asdict(row), **carried}) for row in rows],
    }


def load(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """(rows, conditions) of a record.

    Raises:
        ValueError: the file holds no record of this schema.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a benchmark record of schema {SCHEMA}")
    return parse(content["rows"]), content["conditions"]


def parse(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows from their JSON form."""
    fields = Row.__dataclass_fields__
    numbers = {name for name, field in fields.items() if "float" in str(field.type)}

    def value(name: str, content: Any) -> Any:
        return float(content) if name in numbers and isinstance(content, str) else content

    return [Row(**{k: value(k, v) for k, v in row.items() if k in fields}) for row in rows]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither infinity nor NaN: as text."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
