"""Tables for the terminal, and rows and cells of CSV files."""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from zfnet.config.errors import printable

SHORTEST = 12  # a shortened column keeps at least this many characters


def columns(text: str) -> int:
    """Return how many columns of a terminal `text` takes: wide characters, such as Chinese ones, take two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def shorten(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, printable; long text keeps its end, where file names differ."""
    text = printable(text)
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[max(1, (columns(text) - width) // 2) :]
    return f"…{text}"


def cut(text: str, most: int) -> str:
    """Return `text` in at most `most` characters; long text keeps its beginning, as for names of classes."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def format_table(
    rows: Sequence[Sequence[str]], align: str, width: int | None = None, shrink: Sequence[int] = (), gap: int = 2
) -> list[str]:
    """Return one line per row.

    align: `<` or `>` for each column
    width: of the terminal; if lines would be longer, the columns in `shrink` are shortened, starting with the widest
    gap: spaces between columns
    """
    widths = [max(columns(row[k]) for row in rows) for k in range(len(align))]
    while shrink and width is not None and sum(widths) + gap * (len(widths) - 1) > width:
        widest = max(shrink, key=widths.__getitem__)
        if widths[widest] <= SHORTEST:
            break
        widths[widest] -= 1

    def fill(cell: str, side: str, width: int) -> str:
        space = " " * (width - columns(cell))
        return cell + space if side == "<" else space + cell

    return [
        (" " * gap).join(fill(shorten(cell, w), a, w) for cell, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


def to_rows(**columns: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the rows of a table from its columns, which must have equal length."""
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def csv_cell(value: Any) -> Any:
    """Return a value that is safe in a spreadsheet: text that it would evaluate as a formula gets a leading `'`."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}"
