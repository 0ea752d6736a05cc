"""What ``apply_calm_kernels`` did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One part of a model.

    Attributes:
        part: keyword of ``apply_calm_kernels`` that it belongs to.
        path: of its module in the model; empty for the model itself.
        module: name of the module's class.
        note: what serves now, or why nothing was replaced.
    """

    part: str
    path: str
    module: str
    note: str


@dataclass(frozen=True)
class Report:
    """The parts of a model that were recognised; ``print`` shows a table.

    Attributes:
        replaced: parts that this package serves now.
        kept: parts that were left as they are, with the reason.
    """

    replaced: tuple[Entry, ...]
    kept: tuple[Entry, ...]

    def __str__(self) -> str:
        lines: list[str] = []
        for title, entries in (("replaced", self.replaced), ("kept", self.kept)):
            lines += [f"{title}: {len(entries)}"]
            lines += [
                f"  {entry.part:13} {entry.path or '(model)'} ({entry.module}): {entry.note}"
                for entry in entries
            ]
        return "\n".join(lines)
