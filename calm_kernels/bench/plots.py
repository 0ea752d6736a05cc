"""Pictures of a run: a point for every variant, or curves of time and memory against a size."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from calm_kernels.bench.report import duration
from calm_kernels.bench.rows import Row
from calm_kernels.training.errors import MissingExtraError, UserError
from calm_kernels.training.files import atomic_file

_COLORS = {
    "eager": "tab:red",
    "compiled": "tab:orange",
    "peer": "tab:purple",
    "ceiling": "tab:gray",
    "reference": "tab:olive",
    "native": "tab:blue",
    "triton": "tab:cyan",
    "ours": "tab:green",
}
_DASHES = ("-", "--", "-.")
_PANEL = (5.2, 3.4)
_FORMATS = (".png", ".svg", ".pdf")

Panel = Callable[[Any], None]


def plot(rows: Sequence[Row], path: Path, caption: str) -> None:
    """Draw the rows that were timed: curves of those that sweep a size, points of the others.

    Args:
        rows: of one or several workloads.
        path: ``.png``, ``.svg`` or ``.pdf``.
        caption: the conditions, under the plot.

    Raises:
        MissingExtraError: matplotlib is not installed. UserError: an unknown suffix.
    """
    if path.suffix not in _FORMATS:
        raise UserError(f"plot: expected a name that ends in {', '.join(_FORMATS)}; got {path}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib: pip install 'calm_kernels[bench]'"
        ) from error
    timed = [row for row in rows if row.median is not None]
    panels = _growth_panels(timed) + _case_panels(timed)
    columns = min(2, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for index, draw in enumerate(panels):
        draw(figure.add_subplot(lines, columns, index + 1))
    figure.supxlabel(caption, fontsize=7, wrap=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=120)
    with atomic_file(path, path.name) as handle:
        handle.write(buffer.getvalue())


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _case_panels(rows: Sequence[Row]) -> list[Panel]:
    """One panel a case."""
    cases = _grouped(
        [row for row in rows if row.sweep is None],
        lambda row: f"{row.workload}\n{row.label} {row.dtype}",
    )
    return [partial(_points, title, of_case) for title, of_case in cases.items()]


def _points(title: str, rows: Sequence[Row], axes: Any) -> None:
    """A point a variant on a logarithmic axis, with its 20th to 80th percentile."""
    from matplotlib.ticker import NullFormatter

    for place, row in enumerate(rows):
        median, p20, p80 = (1e3 * (value or 0.0) for value in (row.median, row.p20, row.p80))
        axes.errorbar(
            median, place, xerr=([median - p20], [p80 - median]), fmt="o", capsize=3,
            color=_COLORS[row.role],
        )  # fmt: skip
        axes.annotate(
            duration(row.median), (median, place), textcoords="offset points", xytext=(0, 6),
            ha="center", fontsize=7,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ms a call, median (20th to 80th percentile)")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, axis="x")


def _growth_panels(rows: Sequence[Row]) -> list[Panel]:
    """Two panels a size that is swept: time beside memory."""
    sweeps = _grouped([row for row in rows if row.sweep], lambda row: f"{row.workload} {row.sweep}")
    return [
        partial(_growth, of_sweep, curve)
        for of_sweep in sweeps.values()
        for curve in (_time, _memory)
    ]


def _time(row: Row) -> float | None:
    """ms a call (dotted: operations)"""
    return None if row.median is None else 1e3 * row.median


def _memory(row: Row) -> float | None:
    """peak memory of a call, MiB"""
    return row.memory / 2**20 if row.memory else None


def _growth(rows: Sequence[Row], curve: Callable[[Row], float | None], axes: Any) -> None:
    """A curve a variant; variants of one role differ in their dashes."""
    from matplotlib.ticker import NullLocator

    name = str(rows[0].sweep)
    seen: Counter[str] = Counter()
    for variant, points in _grouped(rows, lambda row: row.variant).items():
        color, dashes = _COLORS[points[0].role], _DASHES[seen[points[0].role] % len(_DASHES)]
        seen[points[0].role] += 1
        found = [(float(row.shape[name]), value) for row in points if (value := curve(row))]
        if not found:
            continue
        places, values = zip(*found, strict=True)
        axes.plot(places, values, dashes, marker="o", markersize=3, color=color, label=variant)
        if curve is _time:
            guide = [values[-1] * row.operations / points[-1].operations for row in points]
            axes.plot(places, guide, ":", color=color, linewidth=0.8)
    sizes = sorted({float(row.shape[name]) for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.set_xlabel(name)
    axes.set_ylabel(curve.__doc__)
    fixed = " ".join(f"{key}={value}" for key, value in rows[0].shape.items() if key != name)
    axes.set_title(f"{rows[0].workload} against {name}; {fixed} {rows[0].dtype}", fontsize=9)
    axes.grid(alpha=0.3)
    if seen and curve is _memory:  # one legend for the pair of panels, beside them
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
