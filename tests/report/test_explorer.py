"""The numbers, words and code of `explorer.html`. `test_explorer_in_a_browser` moves the budget."""

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from searches import made_up_search

from supershaper_hf import SuperShaperForMaskedLM, save_for_hub
from supershaper_hf.model.shapes import SHAPE_NAMES
from supershaper_hf.report.explorer import EXPLORER_FILE, explorer_data, explorer_page, write_explorer
from supershaper_hf.report.findings import LATENCY_FILE, Findings
from supershaper_hf.report.page import write_report


class Page(HTMLParser):
    """The attributes of all elements by name, and the text of the scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def embedded(page):
    """The numbers in a page, with a dictionary for every row of a shape."""
    data = json.loads(Page(page).scripts[0])

    def read(rows):
        return [dict(zip(data["fields"], row, strict=True)) for row in rows]

    for part in ("fronts", "hand_crafted"):
        data[part] = {name: read(rows) for name, rows in data[part].items()}
    return {**data, "measured": read(data["measured"])}


@pytest.fixture(scope="module", params=["loss", "distance", "task_loss"])
def searched(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer") / "search"
    return made_up_search(folder, request.param, latency=request.param == "loss")


@pytest.fixture(scope="module")
def findings(searched):
    return Findings.read(searched)


@pytest.fixture(scope="module")
def page(findings):
    return explorer_page(findings)


def test_report_writes_the_page_and_names_it(searched):
    report = write_report(searched, "flops", supernet="user/supernet").read_text()
    written = (searched / EXPLORER_FILE).read_text()
    assert EXPLORER_FILE in report
    assert embedded(written)["start"]["cost"] == "flops"
    assert written == write_explorer(searched, "flops", supernet="user/supernet").read_text()


def test_every_front_is_that_of_the_search(findings, page):
    fronts = embedded(page)["fronts"]
    assert set(fronts) == {"parameters", "flops", *(["latency"] if findings.table else [])}
    for cost, rows in fronts.items():
        front = findings.front(cost)
        assert [row["shape"] for row in rows] == front.shapes.tolist()
        assert [row[cost] for row in rows] == front.costs[cost].tolist()  # to the last bit: budgets are compared to it
        shown = findings.measure.show(front.losses)
        assert [row["predicted"] for row in rows] == pytest.approx(shown.tolist())


def test_deviations_and_measurements_are_those_of_the_search(findings, page):
    measured = {tuple(record["shape"]): record for record in findings.records}
    score = {"loss": "accuracy", "distance": "cosine", "task_loss": "score"}[findings.measure.name]
    rows = embedded(page)["fronts"]["parameters"]
    assert any(row["measured"] is not None for row in rows)
    assert any(row["measured"] is None for row in rows)
    for row in rows:
        record = measured.get(tuple(row["shape"]), {})
        assert row["measured"] == record.get(findings.measure.shown)
        assert row["score"] == record.get(score)
        slope = row["predicted"] if findings.measure.name == "loss" else 1
        assert row["deviation"] == pytest.approx(slope * findings.predictor.uncertainty(row["shape"]))


def test_all_measured_shapes_are_there(findings, page):
    found = {tuple(row["shape"]): row["measured"] for row in embedded(page)["measured"]}
    assert found == {tuple(record["shape"]): record[findings.measure.shown] for record in findings.records}


def test_page_speaks_of_what_was_measured(findings, page):
    words = {
        "loss": ("perplexity", "accuracy", True),
        "distance": ("distance to the original", "cosine", False),
        "task_loss": ("loss on the task", "f1", False),
    }
    title, score, logarithmic = words[findings.measure.name]
    data = embedded(page)
    assert (data["measure"]["title"], data["score"], data["measure"]["logarithmic"]) == (title, score, logarithmic)
    assert f"lowest\n    predicted {title} of all" in page
    assert ("perplexity" in page) == (title == "perplexity")
    assert str(findings.predictor.quality) in page


def test_hand_crafted_shapes_of_a_budget_are_the_named_ones(findings, page):
    """The page takes the largest one within the budget."""
    data, space = embedded(page), findings.space
    assert [*data["hand_crafted"]] == [name for name in SHAPE_NAMES if name != "first_layers"]
    for budget in np.linspace(space.num_parameters(space.smallest), space.num_parameters(space.largest), 9):
        for name, rows in data["hand_crafted"].items():
            within = [row for row in rows if row["parameters"] <= budget]
            assert within[-1]["shape"] == space.named_shape(name, int(budget))
            assert within[-1] == max(within, key=lambda row: row["parameters"])


def test_dropped_layers_are_hand_crafted_only_where_they_can_be_predicted(tmp_path):
    for name, drop_rate in (("kept", 0.0), ("dropped", 0.2)):
        folder = made_up_search(tmp_path / name, drop_rate=drop_rate)
        assert ("first_layers" in explorer_data(Findings.read(folder))["hand_crafted"]) == (name == "dropped")


def test_costs_are_described_with_what_they_depend_on(findings, page):
    costs = embedded(page)["costs"]
    assert costs["flops"]["title"] == f"operations ({findings.sequence_length} tokens)"
    if findings.table:
        assert costs["latency"]["title"] == f"latency (batch of {findings.table.batch_size} x 8 tokens)"
        assert findings.table.device in page
    else:
        assert "milliseconds are" not in page


@pytest.mark.parametrize(
    ("cost", "max_cost", "budget"),
    [("parameters", [60_000, 50_000], 60_000), ("parameters", [10], "cheapest"), ("flops", [], "middle")],
)
def test_page_starts_at_the_budget_that_matters(findings, cost, max_cost, budget):
    costs = findings.front(cost).costs[cost]
    expected = {"cheapest": costs.min(), "middle": (costs.min() + costs.max()) / 2}.get(budget, budget)
    start = embedded(explorer_page(findings, cost, max_cost))["start"]
    assert start == {"cost": cost, "budget": pytest.approx(float(expected))}


def test_shape_that_diverged_is_told_from_one_that_was_not_measured(tmp_path):
    diverged = {(8, 8, 8, 8, 8, 20): math.nan, (20, 8, 8, 8, 8, 8): math.inf}
    folder = made_up_search(tmp_path / "search", layers=6, more=[([*shape], loss) for shape, loss in diverged.items()])
    page = explorer_page(Findings.read(folder))
    rows = {tuple(row["shape"]): row["measured"] for row in embedded(page)["measured"]}
    assert {shape: rows[shape] for shape in diverged} == {shape: str(loss) for shape, loss in diverged.items()}


@pytest.mark.parametrize(
    "name", ['</script><script>alert("1")</script>', "<!--<script>", "{{ 7 * 7 }}", "a\u202eb\n'\"\\"]
)
def test_no_name_leaves_its_place(findings, name):
    """A name is text in the heading, and a string in the data; its code is a Python literal of it."""
    html = explorer_page(findings, supernet=name)
    page, plain = Page(html), Page(explorer_page(findings, supernet="user/name"))
    assert [element for element in page.elements if element[0] != "title"] == [
        element for element in plain.elements if element[0] != "title"
    ]
    code = "".join(json.loads(page.scripts[0])["code"])
    (literal,) = re.findall(r"^supernet = snapshot_download\((.*)\)$", code, re.MULTILINE)
    assert eval(literal) == name
    assert literal.isprintable()


def test_page_loads_nothing(page):
    parsed = Page(page)
    policy = next(attributes["content"] for _, attributes in parsed.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';")
    assert "connect-src" not in policy
    addresses = [a[key] for _, a in parsed.elements for key in ("src", "href") if key in a]
    assert addresses == ["data:,"]  # no icon
    assert re.findall(r"\w+://[^\"'\s]+", page) == ["http://www.w3.org/2000/svg"]  # a name, which is not fetched


def test_code_cuts_the_shape_out_of_a_folder_and_loads_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up_search(tmp_path / "search")
    supernet = tiny_model(vocab_size=len(tokenizer))
    save_for_hub(supernet, "supernet", tokenizer=tokenizer)
    code = embedded(write_explorer("search", supernet="supernet").read_text())["code"]
    names = {}
    exec("[8, 20, 48]".join(code), names)
    assert type(names["model"]) is SuperShaperForMaskedLM
    assert names["model"].config.hidden_sizes == [8, 20, 48]
    assert names["tokenizer"].get_vocab() == tokenizer.get_vocab()
    assert not {"snapshot_download"} & set(names)


@pytest.mark.parametrize(
    ("supernet", "line"),
    [
        ("user/supernet", 'supernet = snapshot_download("user/supernet")'),
        (os.curdir, 'supernet = "."'),
        (Path("not yet there"), 'supernet = "not yet there"'),
        (None, 'supernet = "FOLDER-OF-THE-SUPERNET"'),
    ],
)
def test_code_fetches_what_is_no_folder_here(findings, supernet, line):
    code = "".join(embedded(explorer_page(findings, supernet=supernet))["code"])
    assert line in code.splitlines()
    assert ("from huggingface_hub import snapshot_download" in code) == ("snapshot_download(" in line)
    head = {"loss": "AutoModelForMaskedLM", "distance": "AutoModel", "task_loss": "AutoModelForSequenceClassification"}
    assert f"model = {head[findings.measure.name]}.from_pretrained(folder)" in code.splitlines()


def test_cost_or_budget_that_makes_no_sense_is_refused(searched):
    with pytest.raises(ValueError, match="max_cost=nan must be a finite number above 0"):
        write_explorer(searched, max_cost=[math.nan])
    with pytest.raises(ValueError, match="Unknown cost 'size'"):
        write_explorer(searched, cost="size")
    if not (searched / LATENCY_FILE).exists():
        with pytest.raises(ValueError, match=r"cost='latency' needs latency\.json"):
            write_explorer(searched, cost="latency")
