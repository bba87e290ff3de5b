"""Tables: lists of text, printed for people or for a Markdown file; and the spread of what several rounds gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


@dataclass
class Table:
    """A table.

    Attributes:
        title: one line above it.
        headings: of the columns; those of ``words`` hold words, the others numbers.
        rows: as many cells each.
        notes: lines below it.
        words: how many columns are aligned to the left.
    """

    title: str
    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    words: int = 1

    def show(self, console: Console) -> None:
        """Print it."""
        table = RichTable(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if i < self.words else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)

    def markdown(self) -> str:
        """It, as Markdown."""
        marks = ["---" if i < self.words else "---:" for i in range(len(self.headings))]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.headings, marks, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {note}" for note in self.notes), ""])


def spread(values: Sequence[float], form: str) -> str:
    """The median, and minimum and maximum in brackets; "-" if there are no values."""
    if not values:
        return "-"
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} - {max(values):{form}})"
