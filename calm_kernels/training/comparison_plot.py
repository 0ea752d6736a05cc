"""The picture of a comparison: BrierLM against the operations of training and of a token."""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm_kernels.training.comparison import Compared
from calm_kernels.training.errors import MissingExtraError, UserError
from calm_kernels.training.files import atomic_file, make_folder

_FORMATS = (".png", ".svg", ".pdf")
_SIZE = (11.0, 4.6)
_LABEL_GAP = 0.055
"""Least distance of two labels, as a share of the axis."""
_LEFT_OF_POINTS, _RIGHT_OF_POINTS = 0.12, 0.3
"""Room on either side of the points, as a share of the axis; labels stand on the right."""
_LEAST_RANGE = 2.0
"""Factor between the ends of the axis, at least."""


def plot_comparison(rows: Sequence[Compared], path: Path, caption: str) -> None:
    """Draw BrierLM with standard errors against training and inference operations.

    Args:
        rows: of a comparison; autoencoders are left out.
        path: ``.png``, ``.svg`` or ``.pdf``.
        caption: the conditions, under the plot.

    Raises:
        MissingExtraError: matplotlib is not installed. UserError: an unknown suffix, or no language
            model among the rows.
    """
    check_plot(path)
    models = [row for row in rows if row.kind != "autoencoder"]
    if not models:
        raise UserError("plot: there is no language model among these runs")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    labels = labels_of(models)
    _panel(left, models, labels, [
        (row.cost.training, _sum(row.cost.training, row.cost.autoencoder_training))
        for row in models
    ])  # fmt: skip
    left.set_title("Training")
    left.set_xlabel("FLOPs: the language model (●), with its autoencoder (○)")
    left.set_ylabel("BrierLM, held out (0 to 100), ± standard error")
    candidates = models[0].cost.candidates
    _panel(right, models, labels, [
        (row.cost.per_token, row.cost.per_token_with_candidates) for row in models
    ])  # fmt: skip
    right.set_title("Inference")
    right.set_xlabel(f"FLOPs a token: one draw, T = 1 (●), {candidates} candidates, T < 1 (○)")
    figure.supxlabel(caption, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=120)
    make_folder(path.parent)
    with atomic_file(path, path.name) as handle:
        handle.write(buffer.getvalue())


def check_plot(path: Path) -> None:
    """Raise, before anything is computed, what would keep :func:`plot_comparison` from drawing.

    Raises:
        MissingExtraError: matplotlib is not installed. UserError: an unknown suffix.
    """
    if path.suffix not in _FORMATS:
        raise UserError(f"plot: expected a name that ends in {', '.join(_FORMATS)}; got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plots need matplotlib: pip install 'calm_kernels[demo]'")


def labels_of(rows: Sequence[Compared]) -> list[str]:
    """What each point is called: the kind and K, and the run where that is not enough."""
    names = ["baseline" if row.patch_size is None else f"CALM K={row.patch_size}" for row in rows]
    often = Counter(names)
    return [
        f"{name} ({row.run})" if often[name] > 1 else name
        for name, row in zip(names, rows, strict=True)
    ]


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved up as little as it takes to lie ``gap`` apart, in their order."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=placed.__getitem__)
    for lower, upper in itertools.pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    return placed


def _sum(own: int | None, other: int | None) -> int | None:
    return None if own is None or other is None else own + other


def _set_range(axes: Any, lowest: float, highest: float) -> None:
    """Room for points and labels; ticks as 2 M, 5 M, 10 M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    points = 1 - _LEFT_OF_POINTS - _RIGHT_OF_POINTS
    whole = max(math.log(highest / lowest) / points, math.log(_LEAST_RANGE))
    left = lowest * math.exp(-_LEFT_OF_POINTS * whole)
    axes.set_xlim(left, left * math.exp(whole))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if whole < math.log(1e3) else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _panel(
    axes: Any,
    models: Sequence[Compared],
    labels: Sequence[str],
    costs: Sequence[tuple[float | None, float | None]],
) -> None:
    """A filled point at each model's first cost, and an open one at the second if it differs."""
    shown = [index for index, (own, _) in enumerate(costs) if own is not None]
    scores = [row.metrics["brier_lm"] for row in models]
    errors = [row.metrics["brier_lm_standard_error"] for row in models]
    highest = 1.12 * max(s + e for s, e in zip(scores, errors, strict=True)) or 1.0
    axes.set_xscale("log")
    axes.set_ylim(0, highest)
    heights = dict(
        zip(shown, spread_out([scores[i] for i in shown], _LABEL_GAP * highest), strict=True)
    )
    everything = [cost for pair in costs for cost in pair if cost is not None]
    if everything:
        _set_range(axes, min(everything), max(everything))
    for index in shown:
        own, more = costs[index]
        color = f"C{index % 10}"
        axes.errorbar(own, scores[index], yerr=errors[index], fmt="o", capsize=3, color=color)
        rightmost = own
        if more is not None and more != own:
            axes.plot([own, more], [scores[index]] * 2, ":", color=color)
            axes.plot(more, scores[index], "o", color=color, markerfacecolor="white")
            rightmost = more
        axes.annotate(
            labels[index], (rightmost, heights[index]), xytext=(8, 0), color=color,
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axes.grid(alpha=0.3)
