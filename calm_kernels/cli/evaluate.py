"""``calm-kernels evaluate``: trained models, scored on held-out text, in one table."""

from __future__ import annotations

import argparse
import json

from calm_kernels.cli import results
from calm_kernels.cli.console import make_reporter
from calm_kernels.training.comparison import Scoring, compare
from calm_kernels.training.comparison_plot import check_plot, plot_comparison
from calm_kernels.training.files import make_folder, write_text
from calm_kernels.training.processes import is_main_process, join_processes


def run(arguments: argparse.Namespace) -> None:
    """Score every model of every run, print one table, write what else is asked for."""
    if arguments.plot is not None:
        check_plot(arguments.plot)
    names = ("blocks", "samples", "seed", "candidates", "data", "cpu")
    given = {name: getattr(arguments, name) for name in names}
    scoring = Scoring(**{name: value for name, value in given.items() if value is not None})
    join_processes(arguments.cpu)
    rows = compare(arguments.runs, scoring, make_reporter())
    if not is_main_process():
        return
    title = f"held-out text, {scoring.blocks} blocks, {scoring.samples} draws a position"
    notes = results.comparison_notes(rows)
    if arguments.markdown is not None:
        table = results.markdown(*results.comparison_table(rows))
        make_folder(arguments.markdown.parent)
        write_text(arguments.markdown, f"{table}\n{title}. {notes}\n")
    if arguments.plot is not None:
        plot_comparison(rows, arguments.plot, title)
    if arguments.json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        results.show_comparison(title, rows, notes)
