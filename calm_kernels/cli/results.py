"""Tables of results: of one training, and of models set beside each other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calm_kernels.cli.console import count, print_table

if TYPE_CHECKING:
    from calm_kernels.training.comparison import Compared

NOTES_WIDTH = 100
COLUMNS = (
    "run", "model", "parameters", "token accuracy", "BrierLM", "Brier-1", "Brier-2", "Brier-3",
    "Brier-4", "unigram BrierLM",
)  # fmt: skip


def row(run: str, kind: str, parameters: int, metrics: Mapping[str, Any]) -> list[str]:
    """One model's row; cells that do not apply are empty."""
    cells = [run, kind, count(parameters)]
    if kind == "autoencoder":
        return [*cells, f"{100 * metrics['token_accuracy']:.3f} %", *[""] * 6]
    brier = [f"{metrics[f'brier_{n}']:.3g}" for n in range(1, 5)]
    unigram = f"{metrics['unigram_brier_lm']:.3f}"
    return [*cells, "", _brier_lm(metrics), *brier, unigram]


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table, without the columns that are empty in all of them."""
    print_table(title, *_without_empty_columns(COLUMNS, rows), left=2)


def show_comparison(title: str, rows: Sequence[Compared], notes: str) -> None:
    """Print a comparison and what its columns mean."""
    print_table(title, *comparison_table(rows), left=2, ruled=False)
    print(textwrap.fill(notes, NOTES_WIDTH))


def comparison_table(rows: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a comparison, without the columns that are empty in all rows."""
    candidates = next((r.cost.candidates for r in rows if r.cost.candidates), None)
    columns = (
        "run", "model", "K", "params", "training\nFLOPs", "FLOPs\na token",
        f"with {candidates}\ndraws", "BrierLM", "Brier-1..4", "token\naccuracy",
    )  # fmt: skip
    return _without_empty_columns(columns, [_comparison_row(row) for row in rows])


def comparison_notes(rows: Sequence[Compared]) -> str:
    """What was asked of the models, and what the columns mean, in a few sentences."""
    scored = [row for row in rows if row.kind != "autoencoder"]
    if not scored:
        return "Token accuracy: held-out tokens reconstructed."
    sentences = []
    groups = {row.group for row in scored}
    first = scored[0]
    if len(groups) == 1:
        length, stride = first.metrics["block_length"], first.metrics["stride"]
        sentences.append(
            f"BrierLM: the same {first.metrics['positions']} positions, multiples of {stride} in "
            f"held-out blocks of {length} tokens; unigram model "
            f"{first.metrics['unigram_brier_lm']:.3f}."
        )
    else:
        sentences.append(
            f"These models were scored on {len(groups)} different texts or tokenizers: BrierLM can "
            f"be compared within each only."
        )
    candidates = next((row.cost.candidates for row in scored), None)
    sentences.append(
        "FLOPs: matrix products and attention; the language model's training leaves out its "
        "autoencoder's, a row of its own. "
        f"FLOPs a token: one patch drawn and decoded (T = 1), and with {candidates} candidates "
        "drawn and decoded (T < 1); the context is one block. BrierLM is that of T = 1."
    )
    return " ".join(sentences)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 2) -> str:
    """A Markdown table; so many leading columns are aligned left, the others right."""
    headings = [column.replace("\n", " ") for column in columns]
    rule = ["---" if index < left else "---:" for index in range(len(columns))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rule, *rows))


def _without_empty_columns(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    kept = [index for index in range(len(columns)) if any(cells[index] for cells in rows)]
    return [columns[i] for i in kept], [[cells[i] for i in kept] for cells in rows]


def _comparison_row(row: Compared) -> list[str]:
    cost, metrics = row.cost, row.metrics
    patch_size = "" if row.patch_size is None else str(row.patch_size)
    cells = [row.run, row.kind, patch_size, count(row.parameters), _operations(cost.training)]
    if row.kind == "autoencoder":
        return [*cells, *[""] * 4, f"{100 * metrics['token_accuracy']:.2f} %"]
    brier = ", ".join(f"{metrics[f'brier_{n}']:.1f}" for n in range(1, 5))
    token = [_operations(cost.per_token), _operations(cost.per_token_with_candidates)]
    return [*cells, *token, _brier_lm(metrics), brier, ""]


def _brier_lm(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['brier_lm']:.2f} ± {metrics['brier_lm_standard_error']:.2f}"


def _operations(number: float | None) -> str:
    return "" if number is None else count(round(number))
