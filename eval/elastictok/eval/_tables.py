"""Tables as data, so that the terminal and the report print the same one."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class TableRow:
    """A row: its cells as text, the first one its name; `rival` sets baselines apart."""

    cells: tuple[str, ...]
    rival: bool = False


@final
@dataclass(frozen=True)
class Table:
    """A table with a title; every row has a cell for each column. `note` is printed under it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(
                    f"row {row.cells} has {len(row.cells)} cells, the table {len(self.columns)} "
                    f"columns: {self.columns}"
                )


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals; a dash for what does not apply."""
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A share as whole per cent; a dash for what does not apply."""
    return "-" if value is None else f"{100 * value:.0f} %"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others]).rstrip()


def format_table(table: Table) -> str:
    """The table as aligned plain text, baselines under a rule of their own."""
    lines = [table.columns, *(row.cells for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [table.title, _line(table.columns, widths), rule]
    rivals = False
    for row in table.rows:
        if row.rival and not rivals:
            text.append(rule)
        rivals = row.rival
        text.append(_line(row.cells, widths))
    note = textwrap.wrap(table.note, width=max(len(rule), 72))
    return "\n".join([*text, *note])
