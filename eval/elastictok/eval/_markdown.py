"""Tables for pages in Markdown."""

from ._tables import Table, TableGroup


def format_markdown(table: Table) -> str:
    """The table in Markdown: its title as a heading, its note under it, names of groups in bold."""
    lines = [
        f"## {table.title}",
        "",
        _line(table.columns),
        _line(["---", *["---:"] * (len(table.columns) - 1)]),
    ]
    for row in table.rows:
        if isinstance(row, TableGroup):
            lines.append(_line([f"**{_escaped(row.name)}**", *[""] * (len(table.columns) - 1)]))
        else:
            lines.append(_line([_escaped(cell) for cell in row.cells]))
    return "\n".join([*lines, *(["", table.note] if table.note else [])]) + "\n"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
