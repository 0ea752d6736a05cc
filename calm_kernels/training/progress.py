"""What training tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Receives messages and progress; the command line draws them."""

    def message(self, text: str) -> None:
        """One line of information."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """A stretch of ``total`` steps begins, ``done`` of them already behind."""

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """So many steps are done; ``values`` are the latest figures, if there are new ones."""

    def end(self) -> None:
        """The stretch is over, finished or not."""


class SilentReporter:
    """Tells nobody."""

    def message(self, text: str) -> None:
        del text

    def begin(self, title: str, total: int, done: int = 0) -> None:
        del title, total, done

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        del done, values

    def end(self) -> None:
        pass
