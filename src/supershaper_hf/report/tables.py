"""Rows as tables: plain text for a terminal, Markdown for a model card.

A row is a mapping from column to value. The columns of a table are those of its first row.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return `rows` as a plain-text table with numbers aligned to the right.

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
    """Return `rows` as a Markdown table.

    Example:
        >>> print(markdown_table([{"shape": "rectangle", "parameters": 1234567}]))
        | shape | parameters |
        | --- | --- |
        | rectangle | 1,234,567 |
    """
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(markdown_cell(cell.replace('<', '&lt;')) for cell in line)} |" for line in lines)


def markdown_cell(text: str) -> str:
    """Return Markdown `text` for a cell of a table, which a `|` or a line break would end too early."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.split()))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split())
