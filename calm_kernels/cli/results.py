"""Tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calm_kernels.cli.console import count, print_table

COLUMNS = (
    "run", "model", "parameters", "token accuracy", "BrierLM", "Brier-1", "Brier-2", "Brier-3",
    "Brier-4", "unigram BrierLM",
)  # fmt: skip


def row(run: str, kind: str, parameters: int, metrics: Mapping[str, Any]) -> list[str]:
    """One model's row; cells that do not apply are empty."""
    cells = [run, kind, count(parameters)]
    if kind == "autoencoder":
        return [*cells, f"{100 * metrics['token_accuracy']:.3f} %", *[""] * 6]
    error = metrics["brier_lm_standard_error"]
    brier = [f"{metrics[f'brier_{n}']:.3g}" for n in range(1, 5)]
    unigram = f"{metrics['unigram_brier_lm']:.3f}"
    return [*cells, "", f"{metrics['brier_lm']:.2f} ± {error:.2f}", *brier, unigram]


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table, without the columns that are empty in all of them."""
    kept = [index for index in range(len(COLUMNS)) if any(cells[index] for cells in rows)]
    columns = [COLUMNS[index] for index in kept]
    print_table(title, columns, [[cells[index] for index in kept] for cells in rows], left=2)
