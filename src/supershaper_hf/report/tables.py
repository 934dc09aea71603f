"""Records as tables: plain text for a terminal, Markdown for a model card."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out records as a plain-text table, numbers to the right; the first record's keys are the columns.

    Example:
        >>> print(text_table([{"shape": "rectangle", "parameters": 1234567}, {"shape": "bottle", "parameters": 9}]))
        shape      parameters
        ---------  ----------
        rectangle   1,234,567
        bottle              9
    """
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    numeric = [not isinstance(rows[0][column], (str, list)) for column in columns]

    def align(line: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric)).rstrip()

    return "\n".join([align(columns), "  ".join("-" * width for width in widths), *map(align, cells)])


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out records as a Markdown table; the first record's keys are the columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
