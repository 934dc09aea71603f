import numpy as np
import pytest

from supershaper_hf.report.tables import markdown_table, text_table


ROWS = [
    {"name": "rectangle", "parameters": 1234567, "perplexity": 7.125, "shape": [8, 20]},
    {"name": "bottle", "parameters": np.int64(9), "perplexity": np.float64(10.0), "shape": [36, 48]},
]


def test_text_table_aligns_words_left_and_numbers_right():
    assert text_table(ROWS).splitlines() == [
        "name       parameters  perplexity  shape",
        "---------  ----------  ----------  --------",
        "rectangle   1,234,567        7.12  [8, 20]",
        "bottle              9       10.00  [36, 48]",
    ]


def test_text_table_is_as_wide_as_its_widest_cell():
    assert text_table([{"n": 1_000_000}, {"n": 2}]).splitlines() == ["        n", "---------", "1,000,000", "        2"]


def test_text_table_has_no_trailing_blanks():
    assert all(line == line.rstrip() for line in text_table(ROWS).splitlines())


def test_text_table_takes_the_columns_of_the_first_record_in_its_order():
    table = text_table([{"b": 1, "a": 2}, {"a": 4, "b": 3, "c": 5}])
    assert table.splitlines() == ["b  a", "-  -", "1  2", "3  4"]


def test_markdown_table_has_a_header_a_rule_and_the_same_cells():
    assert markdown_table(ROWS).splitlines() == [
        "| name | parameters | perplexity | shape |",
        "| --- | --- | --- | --- |",
        "| rectangle | 1,234,567 | 7.12 | [8, 20] |",
        "| bottle | 9 | 10.00 | [36, 48] |",
    ]


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_yes_and_no_are_not_counted(table):
    assert "True" in table([{"holds": True}])


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", "a\\|b"),
        ("a\\|b", "a\\\\\\|b"),
        ("a\n\n| b", "a \\| b"),
        ("a\r\nb\u2028c", "a b c"),
        ("<b>a</b>", "&lt;b>a&lt;/b>"),
        ("C:\\a", "C:\\a"),
    ],
)
def test_markdown_table_is_not_broken_by_a_cell_or_a_column(text, cell):
    assert markdown_table([{"a": text, text: 1}]) == f"| a | {cell} |\n| --- | --- |\n| {cell} | 1 |"


def test_text_table_is_not_broken_by_a_line_break():
    assert text_table([{"a": "b\nc", "d": 1}]).splitlines() == ["a    d", "---  -", "b c  1"]


def test_markdown_table_takes_the_columns_of_the_first_record_in_its_order():
    table = markdown_table([{"b": 1, "a": 2}, {"a": 4, "b": 3, "c": 5}])
    assert table.splitlines() == ["| b | a |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |"]
