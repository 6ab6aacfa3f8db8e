"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 12  # characters that a shortened column keeps


def shorten(text: str, width: int) -> str:
    """Return `text` in at most `width` printable characters; of a long one the end, which tells files apart."""
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"


def format_table(
    rows: Sequence[Sequence[str]], align: str, width: int | None = None, shrink: Sequence[int] = ()
) -> list[str]:
    """Return one line per row, columns two spaces apart.

    align: `<` or `>` for each column
    width: of the terminal; where the lines would be longer, the columns `shrink` are shortened, the widest first
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(align))]
    excess = 0 if width is None else sum(widths) + 2 * (len(widths) - 1) - width
    for _ in range(excess):
        widest = max(shrink, key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= SHORTEST:
            break
        widths[widest] -= 1
    return [
        "  ".join(
            f"{shorten(cell, w):{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
