"""Rows as a table of text: for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm_kernels.bench.rows import Row

_COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.variant,
    "error": lambda row: _EMPTY if row.error is None else f"{row.error:.1e}",
    "bound": lambda row: _EMPTY if row.bound is None else f"{row.bound:.1e}",
    "median": lambda row: duration(row.median) if row.status == "ok" else row.status,
    "p20 - p80": lambda row: _range(row),
    "graph": lambda row: duration(row.graph),
    "memory": lambda row: size(row.memory),
    "rate": lambda row: _rate(row),
    "% of limit": lambda row: _EMPTY if row.limit_percent is None else f"{row.limit_percent:.3g}",
    "× eager": lambda row: _ratio(row.times_eager),
    "× compiled": lambda row: _ratio(row.times_compiled),
}
_EMPTY = ""


def table(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(headings, cells). A case is named in its first row; columns without any entry are left out.

    Columns: error and its bound in the sense of the workload's check; median time of a call and
    its 20th to 80th percentile, or the status if that is not ok; graph: in a replayed CUDA graph;
    memory: peak growth during a call, results included; the achieved rate, in GB/s or TFLOP/s as
    copy or matmul bounds the work, and its share of that measured limit; speed-ups.
    """
    columns = {name: [cell(row) for row in rows] for name, cell in _COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    cases = [f"{row.workload} {row.label} {row.dtype}" for row in rows]
    first = [case if i == 0 or case != cases[i - 1] else _EMPTY for i, case in enumerate(cases)]
    return ["workload", *columns], list(zip(first, *columns.values(), strict=True))


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for every row that has something to say beside its numbers, equal ones once."""
    lines = {
        f"{row.workload} {row.variant}: {row.status if row.status != 'ok' else ''} {row.note}": None
        for row in rows
        if row.note
    }
    return [" ".join(line.split()) for line in lines]


def duration(seconds: float | None) -> str:
    """Three digits with a unit."""
    if seconds is None:
        return _EMPTY
    scale, unit = _unit(seconds, _SECONDS)
    return f"{_digits(seconds / scale)} {unit}"


def size(count: int | None) -> str:
    """Bytes with a unit."""
    if count is None:
        return _EMPTY
    scale, unit = _unit(count, _BYTES)
    return f"{_digits(count / scale)} {unit}"


_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def _unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return next((u for u in units if value >= 0.9995 * u[0]), units[-1])


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _range(row: Row) -> str:
    """Both ends in the unit of the median."""
    if row.median is None or row.p20 is None or row.p80 is None:
        return _EMPTY
    scale, _ = _unit(row.median, _SECONDS)
    return f"{_digits(row.p20 / scale)} - {_digits(row.p80 / scale)}"


def _rate(row: Row) -> str:
    if row.gb_per_s is None or row.tflop_per_s is None:
        return _EMPTY
    if row.limit_by == "copy":
        return f"{row.gb_per_s:.3g} GB/s"
    return f"{row.tflop_per_s:.3g} TFLOP/s"


def _ratio(value: float | None) -> str:
    return _EMPTY if value is None else f"{value:.3g}"


def heading(conditions: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """The conditions in a line or two."""
    device = f"{conditions['device_name']}"
    device += (
        f", {conditions['threads']} threads" if conditions["device"] == "cpu"
        else f", driver {conditions['driver']}"
    )  # fmt: skip
    versions = f"torch {conditions['torch']}, triton {conditions['triton']}"
    measured = ", ".join(
        f"{name.removesuffix('_gb_per_s').removesuffix('_tflop_per_s').replace('_', ' ')} "
        f"{value:.4g} {'GB/s' if name.endswith('gb_per_s') else 'TFLOP/s'}"
        for name, value in limits.items()
    )
    return (
        f"{device}; {versions}; commit {conditions['commit']}; {conditions['date']}; "
        f"load average {conditions['load_average']}\nlimits measured: {measured or 'none'}"
    )


def markdown(
    rows: Sequence[Row], conditions: Mapping[str, Any], limits: Mapping[str, float]
) -> str:
    """A Markdown document with one table."""
    columns, cells = table(rows)
    lines = [
        *(line + "  " for line in heading(conditions, limits).splitlines()),
        "",
        "Error: in the sense of each workload's check, beside its bound. Median and 20th to 80th "
        "percentile of a call; memory: peak growth during it, results included; % limit: of the "
        "rate of the named measured limit.",
        "",
        _markdown_row(columns),
        _markdown_row(["---", "---", *["---:"] * (len(columns) - 2)]),
        *(_markdown_row(line) for line in cells),
        "",
        *(f"- {line}" for line in remarks(rows)),
    ]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
