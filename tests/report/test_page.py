"""The page of a search, made of the files that a real search wrote."""

import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_model
from matplotlib.image import imread
from texts import random_documents

from supershaper_hf import LatencyTable, SearchSpace, ShapePredictor, evaluate_shapes
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.latency.insensitivity import insensitivity, insensitivity_rows
from supershaper_hf.model.costs import chain_cost
from supershaper_hf.report.page import (
    FRONT_FILE,
    INSENSITIVITY_FILE,
    LATENCY_FILE,
    PREDICTOR_FILE,
    RECORDS_FILE,
    Findings,
    write_csv,
    write_report,
)
from supershaper_hf.search.records import append_record


pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")  # random weights: no width is better


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with 30 measured shapes, of which a predictor has seen 26, and a latency table."""
    from conftest import SPECIAL_TOKENS, WORDS
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    folder, model = tmp_path_factory.mktemp("search"), tiny_model()
    batches = fixed_masks(tokenize(random_documents(4), tokenizer, max_length=12), tokenizer, 8, mlm_probability=0.4)
    space = SearchSpace(model.config)
    shapes = np.unique(np.vstack([space.sample(40, seed=0), [[8] * 3], [[48] * 3]]), axis=0)[:30].tolist()
    records = evaluate_shapes(model, batches, shapes, records_file=folder / RECORDS_FILE)
    seen = records[:13] + records[17:]
    predictor = ShapePredictor.fit([record["shape"] for record in seen], [record["loss"] for record in seen])
    predictor.save(folder / PREDICTOR_FILE)
    model.config.to_json_file(folder / "config.json")
    LatencyTable.measure(model.config, sequence_length=8, repeats=2, warmup=1).save(folder / LATENCY_FILE)
    budget = space.num_parameters([36, 36, 36])
    rows = insensitivity_rows(insensitivity(model.config, [budget], 2, 0.2, sequence_length=8, repeats=2))
    (folder / INSENSITIVITY_FILE).write_text(json.dumps(rows))
    return folder


@pytest.fixture
def folder(searched, tmp_path):
    return shutil.copytree(searched, tmp_path / "search")


def plots(folder):
    return {file.name for file in folder.glob("*.png")}


def test_page_table_and_plots_are_written(folder):
    page = write_report(folder)
    text = page.read_text()
    assert page == folder / "report.md"
    assert plots(folder) == {"front_parameters.png", "front_latency.png", "agreement.png", "profile.png"}
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == plots(folder)  # every plot is shown, none is missing
    for name in plots(folder):
        assert imread(folder / name).std() > 0
    assert "30 of 64 shapes were measured" in text
    assert "4 shapes were measured that the predictor was not fitted on" in text
    assert "Good shapes have" in text
    assert f"Latency on {LatencyTable.load(folder / LATENCY_FILE).device}" in text
    assert "verdict" in text


def test_page_without_latency_has_no_word_of_it(folder):
    (folder / LATENCY_FILE).unlink()
    (folder / INSENSITIVITY_FILE).unlink()
    text = write_report(folder).read_text()
    assert "atency" not in text
    assert plots(folder) == {"front_parameters.png", "agreement.png", "profile.png"}


@pytest.mark.parametrize("length", [16, 128])
def test_flops_are_counted_for_the_length_named_in_the_heading(folder, length):
    (folder / LATENCY_FILE).unlink()
    page = write_report(folder, "flops", sequence_length=length).read_text()
    space = Findings.read(folder).space
    length = min(length, space.config.max_position_embeddings)
    assert f"| GFLOPs ({length} tokens) |" in page
    with (folder / FRONT_FILE).open() as stream:
        row = next(csv.DictReader(stream))
    assert int(row["flops"]) == space.flops([int(width) for width in row["shape"].split()], length)


def test_page_of_a_predictor_that_has_seen_every_shape_makes_no_claim_of_trust(folder):
    records = Findings.read(folder).records
    fitted = ShapePredictor.fit([record["shape"] for record in records], [record["loss"] for record in records])
    fitted.save(folder / PREDICTOR_FILE)
    assert "trusted" not in write_report(folder).read_text()
    assert "agreement.png" not in plots(folder)


def column(text, heading):
    """The cells below a heading of the first table that has it."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if f"| {heading} |" in line)
    place = lines[start].split("|").index(f" {heading} ")
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [row.split("|")[place].strip() for row in rows]


def test_budgets_that_matter_are_answered_by_the_best_measured_shape(folder):
    findings = Findings.read(folder)
    budgets = [findings.space.num_parameters(shape) for shape in ([20, 20, 20], [36, 36, 36])]
    text = write_report(folder, max_cost=budgets).read_text()
    assert column(text, "budget") == [f"{budget:,}" for budget in budgets]
    shapes = [json.loads(cell) for cell in column(text, "shape")]
    for budget, shape, perplexity in zip(budgets, shapes, column(text, "measured perplexity")):
        within = [r for r in findings.records if findings.space.num_parameters(r["shape"]) <= budget]
        best = min(within, key=lambda record: record["loss"])
        assert shape == best["shape"]
        assert perplexity == f"{best['perplexity']:.2f}"
    assert "The best measured shape" not in write_report(folder).read_text()


def test_every_row_names_the_best_measured_perplexity_at_its_cost(folder):
    findings = Findings.read(folder)
    text = write_report(folder, num_budgets=6).read_text()
    for shape, lowest in zip(column(text, "shape"), column(text, "best measured")):
        cost = findings.space.num_parameters(json.loads(shape))
        within = [r["perplexity"] for r in findings.records if findings.space.num_parameters(r["shape"]) <= cost]
        assert lowest == f"{min(within):.2f}"


@pytest.mark.parametrize(("rmse", "expected"), [(1e-9, "Cross-validation promised 0.000"), (9.0, "That is about what")])
def test_page_says_whether_new_shapes_are_predicted_as_well_as_promised(folder, rmse, expected):
    predictor = ShapePredictor.load(folder / PREDICTOR_FILE)
    predictor.quality = replace(predictor.quality, rmse=rmse)
    predictor.save(folder / PREDICTOR_FILE)
    assert expected in write_report(folder).read_text()


def test_dropped_layers_that_the_predictor_does_not_know_are_no_test_of_it(folder):
    dropping = {"shape": [0, 48, 48], "loss": 1.0, "perplexity": 2.718281828459045, "accuracy": 0.5}
    append_record(folder / RECORDS_FILE, dropping)
    assert "4 shapes were measured that the predictor was not fitted on" in write_report(folder).read_text()


def test_only_the_front_in_the_table_has_stars(folder, monkeypatch):
    starred = {}
    monkeypatch.setattr(
        "supershaper_hf.search.pareto.plot_front",
        lambda file, *_, chosen, **__: starred.update({file.stem: len(chosen)}),
    )
    monkeypatch.setattr("supershaper_hf.report.page._profile_section", lambda *_: "")
    write_report(folder, "latency")
    assert starred["front_latency"] > 0
    assert starred["front_parameters"] == 0


def test_same_files_make_the_same_page(folder):
    first = write_report(folder).read_bytes(), (folder / FRONT_FILE).read_bytes()
    assert (write_report(folder).read_bytes(), (folder / FRONT_FILE).read_bytes()) == first


@pytest.mark.parametrize("cost", ["parameters", "flops", "latency"])
def test_csv_is_the_front(folder, cost):
    write_report(folder, cost)
    findings = Findings.read(folder)
    front = findings.front(cost)
    with (folder / FRONT_FILE).open() as stream:
        rows = list(csv.DictReader(stream))
    shapes = [[int(width) for width in row["shape"].split()] for row in rows]
    assert shapes == front.shapes.tolist()
    assert [float(row[cost]) for row in rows] == pytest.approx(front.costs[cost].tolist())
    assert [float(row["predicted_loss"]) for row in rows] == pytest.approx(front.losses.tolist())
    deviations = findings.predictor.uncertainty(front.shapes)
    assert [float(row["predicted_deviation"]) for row in rows] == pytest.approx(deviations.tolist())
    measured = {tuple(record["shape"]): record["perplexity"] for record in findings.records}
    for row, shape in zip(rows, shapes):
        assert int(row["parameters"]) == findings.space.num_parameters(shape)
        assert int(row["flops"]) == findings.space.flops(shape, 8)  # of the sequences that were timed
        assert float(row["latency"]) == pytest.approx(findings.table.predict([shape])[0])
        expected = measured.get(tuple(shape))
        assert row["measured_perplexity"] == ("" if expected is None else str(expected))


def test_rows_of_the_table_grow_and_are_shapes_of_the_front(folder):
    text = write_report(folder, num_budgets=4).read_text()
    table = text.split("| parameters | GFLOPs")[1].split("\n\n")[0].splitlines()[2:]
    sizes = [int(line.split("|")[1].replace(",", "")) for line in table]
    shapes = [json.loads(line.split("|")[-2]) for line in table]
    front = Findings.read(folder).front("parameters").shapes.tolist()
    assert sizes == sorted(sizes)
    assert 1 <= len(table) <= 4
    assert all(shape in front for shape in shapes)


def test_costs_of_latency_are_the_seconds_of_the_table(folder):
    findings = Findings.read(folder)
    shapes = findings.space.sample(20, seed=1)
    assert findings.costs(shapes, "latency") == pytest.approx(findings.table.predict(shapes))
    expected = chain_cost(findings.table.chain_cost(findings.space.config), 48, shapes)
    assert findings.costs(shapes, "latency").tolist() == expected.tolist()


def test_latency_front_without_a_table_is_refused(folder):
    (folder / LATENCY_FILE).unlink()
    with pytest.raises(ValueError, match=r"cost='latency' needs latency\.json: measure it with search_shapes\.py"):
        write_report(folder, "latency")


@pytest.mark.parametrize("missing", [RECORDS_FILE, PREDICTOR_FILE, "config.json"])
def test_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(OSError, match=missing):
        write_report(folder)


def test_damaged_record_does_not_count(folder):
    lines = (folder / RECORDS_FILE).read_text().splitlines()
    lines[5] = lines[5][:30]
    (folder / RECORDS_FILE).write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match=r"1 damaged line\(s\) do not count"):
        text = write_report(folder).read_text()
    assert "29 of 64 shapes were measured" in text


def test_lists_in_a_csv_are_separated_by_blanks_and_nothing_is_empty(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"shape": [8, 20], "loss": 0.5, "latency": None}])
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["shape,loss,latency", "8 20,0.5,"]


def test_command_prints_the_page_it_wrote(folder):
    command = [sys.executable, "-m", "supershaper_hf.report.page", str(folder), "--num_budgets", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder / "report.md")
