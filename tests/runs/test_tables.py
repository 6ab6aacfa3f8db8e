"""Tables for the terminal."""

from __future__ import annotations

from zfnet.runs.tables import SHORTEST, format_table, shorten


def test_format_table_aligns_columns() -> None:
    lines = format_table([("name", "n"), ("a", "1,000"), ("bcdefg", "")], "<>")
    assert lines == ["name        n", "a       1,000", "bcdefg"]


def test_format_table_shortens_the_widest_column_to_the_width() -> None:
    rows = [("p" * 50, "q" * 30, "kept whole")]
    (line,) = format_table(rows, "<<<", 60, shrink=[0, 1])
    first, second, third = line.split("  ")
    assert len(line) == 60
    assert abs(len(first) - len(second)) <= 1
    assert third == "kept whole"
    (line,) = format_table(rows, "<<<", 10, shrink=[0, 1])  # columns get no narrower
    assert [len(cell) for cell in line.split("  ")] == [SHORTEST, SHORTEST, 10]


def test_shorten_keeps_the_end_and_only_printable_characters() -> None:
    assert shorten("photos/cat.png", 8) == "…cat.png"
    assert shorten("a\x1b[31m\n", 20) == r"a\x1b[31m\n"


def test_tables_count_the_columns_of_wide_characters() -> None:
    lines = format_table([("猫と犬.png", "1"), ("cat.png", "23")], "<>")
    assert lines == ["猫と犬.png   1", "cat.png     23"]
    assert shorten("猫と犬と鳥", 6) == "…と鳥"
