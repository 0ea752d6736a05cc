"""The picture of a run: losses, reconstruction and BrierLM against steps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from calm_kernels.training.errors import MissingExtraError
from calm_kernels.training.files import atomic_file, read_json
from calm_kernels.training.runs import HISTORY, KINDS, STAGE
from calm_kernels.training.trainer import read_history

_LOSS_LABELS = {
    "autoencoder": "loss (nats per patch, with 0.001 KL)",
    "energy": "energy loss (distance in latent space)",
    "baseline": "cross entropy (nats per token)",
}
_TITLES = {
    "autoencoder": "Autoencoder",
    "energy": "CALM language model",
    "baseline": "Autoregressive baseline",
}
_COLORS = {"autoencoder": "tab:green", "energy": "tab:blue", "baseline": "tab:orange"}
_WIDTH, _HEIGHT = 5.2, 3.6


def plot_run(run: Path, caption: str) -> Path:
    """Draw ``training.png`` from the histories in a run folder.

    Args:
        run: run folder; panels are drawn for the models that are there.
        caption: one line under the plots: the conditions.

    Raises:
        MissingExtraError: matplotlib is not installed. DiskFullError: no space.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib: pip install 'calm_kernels[demo]'"
        ) from error
    histories = {kind: read_history(run / kind / HISTORY) for kind in KINDS}
    histories = {kind: entries for kind, entries in histories.items() if entries}
    panels: list[Any] = [lambda axes, kind=kind: _loss(axes, kind, histories[kind])
                         for kind in histories]  # fmt: skip
    if "autoencoder" in histories:
        panels.insert(1, lambda axes: _accuracy(axes, histories["autoencoder"]))
    language_models = {kind: h for kind, h in histories.items() if kind != "autoencoder"}
    if language_models:
        panels.append(lambda axes: _brier(axes, run, language_models))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        panel(axes)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    figure.supxlabel(caption, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    path = run / "training.png"
    with atomic_file(path, path.name) as handle:
        handle.write(buffer.getvalue())
    return path


def _series(history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _loss(axes: Any, kind: str, history: list[dict[str, float]]) -> None:
    steps, values = _series(history, "loss")
    axes.plot(steps, values, color=_COLORS[kind])
    if kind == "autoencoder" and values and min(values) > 0:
        axes.set_yscale("log")
    axes.set_title(f"{_TITLES[kind]}: training loss")
    axes.set_ylabel(_LOSS_LABELS[kind])


def _accuracy(axes: Any, history: list[dict[str, float]]) -> None:
    steps, values = _series(history, "eval_token_accuracy")
    axes.plot(steps, [100 * value for value in values], "o-", color=_COLORS["autoencoder"])
    axes.set_title("Autoencoder: held-out reconstruction")
    axes.set_ylabel("token accuracy (%)")


def _brier(axes: Any, run: Path, histories: dict[str, list[dict[str, float]]]) -> None:
    unigram = None
    for kind, history in histories.items():
        steps, values = _series(history, "eval_brier_lm")
        _, errors = _series(history, "eval_brier_lm_standard_error")
        axes.errorbar(
            steps, values, yerr=errors, fmt="o-", capsize=2, color=_COLORS[kind],
            label=_TITLES[kind],
        )  # fmt: skip
        metrics = (read_json(run / kind / STAGE) or {}).get("metrics", {})
        unigram = metrics.get("unigram_brier_lm", unigram)
    if unigram is not None:
        axes.axhline(unigram, linestyle="--", color="tab:gray", label="unigram model (exact)")
    axes.set_ylim(bottom=0)
    axes.set_title("Held-out BrierLM while training")
    axes.set_ylabel("BrierLM (0 to 100), ± standard error")
    axes.legend(fontsize=8)
