import numpy as np
import pytest
from conftest import tiny_config
from matplotlib.image import imread

from supershaper_hf import SearchSpace
from supershaper_hf.report import markdown_table, plot_pareto, text_table
from supershaper_hf.search import ParetoFront


ROWS = [
    {"name": "rectangle", "parameters": 1234567, "perplexity": 7.125, "shape": [8, 20]},
    {"name": "bottle", "parameters": np.int64(9), "perplexity": 10.0, "shape": [36, 48]},
]
SPACE = SearchSpace(tiny_config())
FRONT = ParetoFront(
    cost_name="parameters",
    shapes=np.array([[8, 8, 8], [8, 20, 36], [48, 48, 48]]),
    costs=SPACE.num_parameters(np.array([[8, 8, 8], [8, 20, 36], [48, 48, 48]])),
    losses=np.array([2.5, 2.2, 2.1]),
)


# Tables


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


# Plot


def draw(file, **changes):
    named = [(f"shape {i}", 21_000 + 1_000 * i, 10.0) for i in range(11)]
    drawn = {
        "space": SPACE,
        "front": FRONT,
        "measured": [{"shape": [8, 8, 36], "perplexity": 13.0}, {"shape": [48, 48, 8], "perplexity": 9.0}],
        "compared": [{"name": name, "parameters": size, "perplexity": value} for name, size, value in named],
    }
    plot_pareto(file, **{**drawn, **changes})
    return imread(file)


def test_plot_is_a_png_that_is_not_blank(tmp_path):
    pixels = draw(tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_plot_shows_every_measured_shape(tmp_path):
    measured = [{"shape": [8, 8, 36], "perplexity": 13.0}, {"shape": [48, 48, 8], "perplexity": 12.0}]
    assert not np.array_equal(draw(tmp_path / "first.png"), draw(tmp_path / "second.png", measured=measured))


def test_plot_shows_the_front(tmp_path):
    front = ParetoFront("parameters", FRONT.shapes[:2], FRONT.costs[:2], FRONT.losses[:2])
    assert not np.array_equal(draw(tmp_path / "first.png"), draw(tmp_path / "second.png", front=front))


@pytest.mark.parametrize("place", [0, 1, 10], ids=["searched", "first", "after the last marker"])
def test_plot_shows_every_compared_shape(place, tmp_path):
    compared = [{"name": f"shape {i}", "parameters": 21_000 + 1_000 * i, "perplexity": 10.0} for i in range(11)]
    compared[place]["perplexity"] = 11.0
    assert not np.array_equal(draw(tmp_path / "first.png"), draw(tmp_path / "second.png", compared=compared))
