"""Messages, progress and tables: drawn on a terminal, plain lines elsewhere.

Progress and messages go to standard error, results to standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calm_kernels.training.processes import is_main_process
from calm_kernels.training.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PLAIN_LINES = 10
"""Lines of progress a stretch, where nothing can be redrawn."""


def make_reporter() -> Reporter:
    """The reporter for this process: a bar on a terminal, lines elsewhere, silence off rank 0."""
    if not is_main_process():
        return SilentReporter()
    if sys.stderr.isatty():
        try:
            import rich.progress  # noqa: F401
        except ImportError:
            return LineReporter()
        return BarReporter()
    return LineReporter()


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


class LineReporter:
    """About ten lines a stretch, for logs."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._told = title, max(1, total), done
        self._values = {}
        self._started = time.perf_counter()

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        self._values.update(values or {})
        last = done >= self._total
        if (done - self._told) * _PLAIN_LINES < self._total and not (last and done > self._told):
            return
        self._told = done
        seconds = time.perf_counter() - self._started
        line = f"{self._title}: {done}/{self._total}  {seconds:.0f} s  {_figures(self._values)}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    def end(self) -> None:
        pass


class BarReporter:
    """One progress bar a stretch, redrawn in place."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._values: dict[str, float] = {}

    def message(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def begin(self, title: str, total: int, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.end()
        self._values = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, figures="")
        self._progress.start()

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        if self._progress is None or self._task is None:
            return
        if values:
            self._values.update(values)
        self._progress.update(self._task, completed=done, figures=_figures(self._values))

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    ruled: bool = True,
) -> None:
    """Print a table to standard output.

    Args:
        title: above the table.
        columns: headings.
        rows: cells, as many a row as there are columns.
        left: so many leading columns are aligned left, the others right.
        ruled: draw lines between columns; without them a table is narrower.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain_table(title, columns, rows)
        return
    style: dict[str, Any] = {} if ruled else {"box": box.SIMPLE_HEAD, "pad_edge": False}
    table = Table(title=title, title_justify="left", padding=(0, int(ruled)), **style)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table, highlight=False, markup=False)


def _print_plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(title)
    lines = [[column.replace("\n", " ") for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def count(number: int) -> str:
    """A number of parameters or operations, short: 4.8 M."""
    units = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    for unit, size in units:
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
