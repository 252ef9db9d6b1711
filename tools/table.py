"""The one way in which tools and benchmarks print a table."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Markdown whose columns line up in a terminal too. `align` has "<" or ">" for each column."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * (width - 1) + ("-" if side == "<" else ":")
        for width, side in zip(widths, align, strict=True)
    ]
    padded = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])
