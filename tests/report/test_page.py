"""The page of a search, made of the files that a real search wrote."""

import csv
import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from matplotlib.image import imread
from texts import random_documents

from supershaper_hf import LatencyTable, SearchSpace, ShapePredictor, SuperShaperModel, evaluate_shapes
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.latency.insensitivity import Insensitivity, compare_equal_sizes, save_comparisons
from supershaper_hf.model.costs import chain_cost
from supershaper_hf.report.__main__ import main
from supershaper_hf.report.findings import (
    INSENSITIVITY_FILE,
    LATENCY_FILE,
    PREDICTOR_FILE,
    RECORDS_FILE,
    Findings,
    write_config,
)
from supershaper_hf.report.page import FRONT_FILE, write_csv, write_report
from supershaper_hf.search.records import read_records


pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")  # random weights: no width is better


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def measure(model):
    """Measure shapes of the model on a small text, and add them to the records of a folder."""
    from conftest import SPECIAL_TOKENS, WORDS
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    batches = fixed_masks(tokenize(random_documents(4), tokenizer, max_length=12), tokenizer, 8, mlm_probability=0.4)
    return lambda folder, shapes: evaluate_shapes(model, batches, shapes, records_file=folder / RECORDS_FILE)


@pytest.fixture(scope="module")
def searched(model, measure, tmp_path_factory):
    """A folder with 30 measured shapes, of which a predictor has seen 26, and a latency table."""
    folder = tmp_path_factory.mktemp("search")
    space = SearchSpace.from_config(model.config)
    shapes = np.unique(np.vstack([space.sample(40, seed=0), [[8] * 3], [[48] * 3]]), axis=0)[:30].tolist()
    records = measure(folder, shapes)
    ShapePredictor.fit_records(records[:13] + records[17:]).save(folder / PREDICTOR_FILE)
    model.config.to_json_file(folder / "config.json")
    LatencyTable.measure(space, sequence_length=8, repeats=2, warmup=1).save(folder / LATENCY_FILE)
    sizes = [space.num_parameters([36, 36, 36])]
    comparisons = compare_equal_sizes(space, sizes, 2, 0.2, sequence_length=8, repeats=2)
    save_comparisons(folder / INSENSITIVITY_FILE, comparisons)
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


def test_page_of_distances_speaks_of_distances_only(model, tmp_path):
    """A model without a masked-LM head has no perplexity, and no exponential of a distance is shown."""
    encoder = tiny_model(SuperShaperModel)
    space = SearchSpace.from_model(encoder)
    ids = torch.randint(5, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    shapes = np.unique(np.vstack([space.sample(40, seed=0), [[8] * 3], [[48] * 3]]), axis=0)[:30].tolist()
    records = evaluate_shapes(encoder, batches, shapes, records_file=tmp_path / RECORDS_FILE, measure="distance")
    predictor = ShapePredictor.fit_records(records[:13] + records[17:])
    predictor.save(tmp_path / PREDICTOR_FILE)
    write_config(tmp_path, space)
    budget = space.num_parameters([36, 36, 36])
    text = write_report(tmp_path, max_cost=[budget]).read_text()
    assert "perplexity" not in text
    assert "nats" not in text
    assert "loss" not in text
    assert "front of parameters against predicted distance to the original" in text
    (shown,) = column(text, "measured distance to the original")
    within = [record["distance"] for record in records if space.num_parameters(record["shape"]) <= budget]
    assert shown == f"{min(within):.3f}"
    with (tmp_path / FRONT_FILE).open() as stream:
        row = next(csv.DictReader(stream))
    shape = [int(width) for width in row["shape"].split()]
    assert int(row["parameters"]) == encoder.extract_subnet(shape).num_parameters()
    assert float(row["predicted_distance"]) == pytest.approx(predictor.predict(shape))
    assert not {"predicted_loss", "predicted_perplexity", "measured_perplexity"} & set(row)


def test_predictor_of_another_measure_is_refused(folder):
    findings = Findings.read(folder)
    fitted = ShapePredictor.fit(
        findings.predictor.evidence.shapes, findings.predictor.evidence.losses, measure="distance"
    )
    fitted.save(folder / PREDICTOR_FILE)
    with pytest.raises(ValueError, match=r"predictor\.json predicts distances, but .*records\.jsonl holds losses"):
        write_report(folder)


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
    ShapePredictor.fit_records(records).save(folder / PREDICTOR_FILE)
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


@pytest.mark.parametrize(
    ("rmse", "expected"), [(1e-9, "In cross-validation the error was only 0.000"), (9.0, "This agrees with")]
)
def test_page_says_whether_new_shapes_are_predicted_as_well_as_promised(folder, rmse, expected):
    predictor = ShapePredictor.load(folder / PREDICTOR_FILE)
    predictor.quality = replace(predictor.quality, rmse=rmse)
    predictor.save(folder / PREDICTOR_FILE)
    assert expected in write_report(folder).read_text()


def test_dropped_layers_that_the_predictor_does_not_know_are_no_test_of_it(folder, measure):
    measure(folder, [[0, 48, 48]])
    page = write_report(folder).read_text()
    assert "4 shapes were measured that the predictor was not fitted on" in page
    assert f"31 of {5**3 - 1} shapes were measured" in page  # a layer has four widths, or is dropped


def test_only_the_front_in_the_table_has_stars(folder, measure, monkeypatch):
    starred = {}
    measure(folder, Findings.read(folder).front("latency").shapes.tolist())
    monkeypatch.setattr(
        "supershaper_hf.report.page.plot_front",
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
    costs = [float(row[cost]) for row in rows]
    assert costs == front.costs[cost].tolist() == findings.costs(shapes, cost).tolist()
    assert [front.best(budget) for budget in costs] == shapes  # also to the last bit
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
    with pytest.raises(ValueError, match=r"cost='latency' needs latency\.json\. Measure it with search_shapes\.py"):
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


def test_command_prints_the_page_it_wrote(folder, capsys):
    main([str(folder), "--num_budgets", "3"])
    assert capsys.readouterr().out.strip() == str(folder / "report.md")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_budgets=0"], "num_budgets=0 must be an integer of at least 1."),
        (["--max_cost=nan"], "max_cost=nan must be a finite number above 0."),
        (["--max_cost=10"], "No measured shape with a loss costs at most 10 parameters"),
        (["--sequence_length=0"], "sequence_length=0 must be an integer of at least 1."),
    ],
    ids=str,
)
def test_command_refuses_options_that_make_no_sense(folder, options, message, capsys):
    with pytest.raises(SystemExit):
        main([str(folder), *options])
    assert message in capsys.readouterr().err


def test_command_names_a_folder_without_a_search(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{tmp_path} has no config.json" in capsys.readouterr().err


# Files that do not belong together


def test_predictor_of_other_measurements_is_refused(folder):
    """One loss differs in its last bit: another supernet, or another text, was measured."""
    records = read_records(folder / RECORDS_FILE)
    records[20]["loss"] = float(np.nextafter(records[20]["loss"], 0))
    ShapePredictor.fit_records(records).save(folder / PREDICTOR_FILE)
    message = f"{folder / PREDICTOR_FILE} was fitted on other measurements than those in {folder / RECORDS_FILE}"
    with pytest.raises(ValueError, match=re.escape(message) + ".*1 of its 30 shapes have another loss"):
        write_report(folder)


def test_predictor_of_other_shapes_is_refused(folder):
    findings = Findings.read(folder)
    known = {tuple(record["shape"]) for record in findings.records}
    others = [shape for shape in itertools.product(findings.space.width_choices, repeat=3) if shape not in known]
    ShapePredictor.fit(others, [4 - sum(shape) / 90 for shape in others]).save(folder / PREDICTOR_FILE)
    with pytest.raises(ValueError, match=r"was fitted on other measurements than those in .*no shape is the same"):
        write_report(folder)


def test_page_says_how_many_records_of_the_fit_are_missing(folder, measure):
    records = read_records(folder / RECORDS_FILE)
    (folder / RECORDS_FILE).unlink()
    measure(folder, [record["shape"] for record in records[:20]])
    page = write_report(folder).read_text()
    assert "The records of 10 shapes that the predictor was fitted on are not in `records.jsonl`." in page
    ShapePredictor.fit_records(records[:20]).save(folder / PREDICTOR_FILE)
    assert "are not in `records.jsonl`" not in write_report(folder).read_text()


def test_predictor_that_was_not_fitted_is_refused(folder):
    widths = Findings.read(folder).space.width_choices
    ShapePredictor(widths, 3.0, np.zeros((3, 4))).save(folder / PREDICTOR_FILE)
    with pytest.raises(ValueError, match=r"predictor\.json was not fitted on measured shapes"):
        write_report(folder)


def test_records_of_another_supernet_are_refused(folder):
    tiny_model(width_choices=[8, 48]).config.to_json_file(folder / "config.json")
    with pytest.raises(ValueError, match=r"records\.jsonl holds shapes of another supernet than .*config\.json"):
        write_report(folder)


def test_comparisons_of_another_supernet_are_refused(folder):
    comparison = Insensitivity(100, [[8, 16], [16, 8]], [0.1, 0.2], [99, 101], noise=0.01, p_value=0.001)
    save_comparisons(folder / INSENSITIVITY_FILE, [comparison])
    with pytest.raises(ValueError, match=r"insensitivity\.json holds shapes of another supernet than .*config\.json"):
        write_report(folder)


@pytest.mark.parametrize("name", [PREDICTOR_FILE, LATENCY_FILE, INSENSITIVITY_FILE])
def test_damaged_file_is_refused_by_name(folder, name):
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("48", "36", 1))
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        write_report(folder)


# Dropped layers


def test_page_of_layers_that_were_dropped_before_the_fit_and_after_it(folder, measure):
    """The second layer is never dropped in a shape of the fit, but in a later one, which is the best measured."""
    space = Findings.read(folder).space
    shapes = space.sample(30, seed=5, drop_rate=0.3)
    shapes[:, 1] = np.maximum(shapes[:, 1], 8)
    records = measure(folder, np.unique(shapes, axis=0).tolist())
    ShapePredictor.fit_records(records).save(folder / PREDICTOR_FILE)
    later = measure(folder, [[48, 0, width] for width in space.width_choices])
    budgets = [space.num_parameters(record["shape"]) for record in later]
    page = write_report(folder, max_cost=budgets).read_text()
    everything = read_records(folder / RECORDS_FILE)
    for budget, shape in zip(budgets, column(page, "shape"), strict=True):
        within = [record for record in everything if space.num_parameters(record["shape"]) <= budget]
        assert shape == str(min(within, key=lambda record: record["loss"])["shape"])
    assert not Findings.read(folder).predictor.knows(later[0]["shape"])
    rows = Findings.read(folder).rows(np.array([[48, 0, 8], [48, 8, 8]]))
    assert [row["predicted_loss"] is None for row in rows] == [True, False]
    assert rows[0]["measured_perplexity"] == later[0]["perplexity"]


def test_row_of_a_budget_below_every_measured_shape_has_no_best_measured(folder, measure):
    """The front begins below the cheapest shape that was measured."""
    findings = Findings.read(folder)
    space = findings.space
    rich = [r["shape"] for r in findings.records if space.num_parameters(r["shape"]) > space.num_parameters([20] * 3)]
    (folder / RECORDS_FILE).unlink()
    measure(folder, rich)
    assert column(write_report(folder, num_budgets=3).read_text(), "best measured")[0] == ""
