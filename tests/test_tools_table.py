"""One table for terminals and for Markdown."""

from tools.table import table


def test_columns_line_up_and_numbers_are_on_the_right_in_markdown_too() -> None:
    text = table(("card", "GiB"), [("V100", "32.0"), ("H200-SXM", "139.0")], align="<>")
    assert text.splitlines() == [
        "| card     |   GiB |",
        "| -------- | ----: |",
        "| V100     |  32.0 |",
        "| H200-SXM | 139.0 |",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("a",), [], align="<").splitlines() == ["| a |", "| - |"]
