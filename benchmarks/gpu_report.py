"""What `gpu_check.py` leaves: one JSON record and one Markdown table, rewritten as it goes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
"""That of a benchmark record: `calm_kernels.bench.rows.load` reads this one too."""

Row = dict[str, Any]


@dataclass
class Phase:
    """What became of one phase: ``ok``, ``failed``, ``time limit`` or ``not available``."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Report:
    """Phases and benchmark rows; every addition rewrites both files."""

    folder: Path
    phases: list[Phase] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    cases: dict[tuple[str, str, str], list[Row]] = field(default_factory=dict)

    def add(self, phase: Phase) -> None:
        """Tell and keep a phase."""
        self.phases.append(phase)
        print(f"{self._line(phase)}  {' '.join(phase.detail.split())[-200:]}")
        sys.stdout.flush()
        self.write()

    def merge(self, path: Path) -> int:
        """Take over the rows of a benchmark record; a case measured again replaces its rows."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
        fresh: dict[tuple[str, str, str], list[Row]] = {}
        for row in record["rows"]:
            case = (row["workload"], json.dumps(row["shape"]), row["dtype"])
            fresh.setdefault(case, []).append(row)
        self.cases.update(fresh)
        self.conditions |= record["conditions"]
        self.limits |= record["limits"]
        return len(record["rows"])

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.cases.values() for row in rows]

    def write(self) -> None:
        """Write both files, each at once."""
        record = {
            "schema": SCHEMA,
            "conditions": self.conditions,
            "limits": self.limits,
            "rows": self.rows,
            "phases": [asdict(phase) for phase in self.phases],
        }
        _replace(self.folder / "gpu-check.json", json.dumps(record, indent=2) + "\n")
        _replace(self.folder / "gpu-check.md", self._markdown())

    def failed(self) -> bool:
        """Whether something is wrong, or was not shown to be right.

        A benchmark that ran out of time is neither: what it measured was checked.
        """
        return any(row["status"] == "FAIL" for row in self.rows) or any(
            phase.status == "failed"
            or (phase.status == "time limit" and not phase.name.startswith("bench"))
            for phase in self.phases
        )

    def summary(self) -> str:
        """The benchmark's table, then the phases, for a terminal."""
        text = "No benchmark was measured."
        if self.rows:
            from calm_kernels.bench import report

            columns, cells = report.table(self._parsed())
            text = "\n".join(_aligned([columns, *cells]))
        return "\n".join([text, "", *(self._line(phase) for phase in self.phases)])

    def _markdown(self) -> str:
        lines = ["# GPU check", "", "| phase | status | seconds | |", "| --- | --- | ---: | --- |"]
        for phase in self.phases:
            detail = " ".join(phase.detail.split())[-300:].replace("|", "\\|")
            lines.append(f"| {phase.name} | {phase.status} | {phase.seconds:.1f} | {detail} |")
        table = "No benchmark was measured.\n"
        if self.rows:
            from calm_kernels.bench import report

            table = report.markdown(self._parsed(), self.conditions, self.limits)
        return "\n".join(lines) + "\n\n" + table

    def _parsed(self) -> list[Any]:
        """The rows as the installed package's own; it is importable once there are any."""
        from calm_kernels.bench import rows

        return rows.parse(self.rows)

    @staticmethod
    def _line(phase: Phase) -> str:
        return f"{phase.name:<24}{phase.status:<14}{phase.seconds:7.1f} s"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
