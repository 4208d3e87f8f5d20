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
class TableGroup:
    """Names the rows that follow it, up to the next group."""

    name: str


@final
@dataclass(frozen=True)
class Table:
    """A table with a title; every row has a cell for each column. `note` is printed under it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow | TableGroup, ...]
    note: str = ""

    def __post_init__(self):
        for row in self.rows:
            if isinstance(row, TableRow) and len(row.cells) != len(self.columns):
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


def change(value: float | None, digits: int, unit: str = "") -> str:
    """A difference as per cent, or points, with its sign; a dash for what does not apply."""
    if value is None:
        return "-"
    text = f"{100 * value:+.{digits}f}"
    # Nothing is nothing, from whichever side it was rounded.
    return ("0" if float(text) == 0 else text) + unit


def times(value: float | None) -> str:
    """A ratio, `12x` or `1.4x`; a dash for what does not apply."""
    return "-" if value is None else f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([first, *others]).rstrip()


def format_table(table: Table) -> str:
    """The table as aligned plain text, baselines and groups under a rule of their own."""
    lines = [table.columns, *(row.cells for row in table.rows if isinstance(row, TableRow))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [table.title, _line(table.columns, widths), rule]
    rivals = False
    for row in table.rows:
        if isinstance(row, TableGroup):
            text += [row.name] if text[-1] == rule else [rule, row.name]
            rivals = False
            continue
        if row.rival and not rivals:
            text.append(rule)
        rivals = row.rival
        text.append(_line(row.cells, widths))
    note = textwrap.wrap(table.note, width=max(len(rule), 72))
    return "\n".join([*text, *note])
