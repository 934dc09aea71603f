"""`examples/search_shapes.py` as a user runs it: a real supernet and text on disk, one and two processes."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import randomize, tiny_config
from datasets import Dataset
from hub_server import HubServer
from launching import ENVIRONMENT, launcher
from texts import random_documents

from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperConfig, SuperShaperForMaskedLM
from supershaper_hf.latency.table import LatencyTable
from supershaper_hf.search.records import read_records


pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")  # random weights: no width is better
SCRIPT = Path(__file__).parents[2] / "examples" / "search_shapes.py"
OPTIONS = [
    "--num_shapes=24",
    "--max_length=12",
    "--per_device_eval_batch_size=8",
    "--mlm_probability=0.4",
    "--num_budgets=4",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A supernet whose layers do something, with its tokenizer, and a text."""
    from conftest import SPECIAL_TOKENS, WORDS
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    model = randomize(SuperShaperForMaskedLM(tiny_config(vocab_size=len(tokenizer), num_hidden_layers=6)))
    model.save_pretrained(folder / "supernet")
    tokenizer.save_pretrained(folder / "supernet")
    (folder / "text.txt").write_text("\n".join(random_documents(20)["text"]), encoding="utf-8")
    return ["--model", str(folder / "supernet"), "--eval_files", str(folder / "text.txt")]


def search(inputs, output, *options, launcher=(), environment=ENVIRONMENT):
    command = [sys.executable, *launcher, str(SCRIPT), *inputs, "--output_dir", str(output), *OPTIONS, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def first_run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "search"
    return search(inputs, folder, "--latency=cpu", "--insensitivity", "--max_cost=90000"), folder


def test_everything_is_written_and_the_page_is_printed(first_run):
    done, folder = first_run
    assert done.returncode == 0, done.stderr
    names = {file.name for file in folder.iterdir()}
    files = (
        "config.json records.jsonl records.parquet predictor.json latency.json insensitivity.json front.csv report.md"
    )
    assert set(files.split()) <= names
    assert (folder / "report.md").read_text().strip() in done.stdout
    assert "Predictor: R2" in done.stdout


def check_that_the_front_was_measured(folder):
    """Every row of the page's table names a measured shape and its perplexity."""
    table = (folder / "report.md").read_text().split("| best measured | shape |\n")[1].split("\n\n")[0].splitlines()[1:]
    measured = {tuple(record["shape"]): record["perplexity"] for record in read_records(folder / "records.jsonl")}
    for line in table:
        *_, perplexity, lowest, shape = line.strip("| ").split(" | ")
        assert float(perplexity) == round(measured[tuple(json.loads(shape))], 2)
        assert float(lowest) <= float(perplexity)


def test_shapes_of_the_front_are_measured_after_the_fit(first_run):
    _, folder = first_run
    records, fitted = read_records(folder / "records.jsonl"), ShapePredictor.load(folder / "predictor.json").evidence
    assert fitted.shapes.tolist() == [record["shape"] for record in records[: len(fitted.shapes)]]
    assert 8 <= len(fitted.shapes) <= 24  # fewer where all drawn predictors agree
    check_that_the_front_was_measured(folder)


def test_flops_are_those_of_the_measured_length(inputs, tmp_path):
    done = search(inputs, tmp_path / "search", "--cost=flops")
    assert done.returncode == 0, done.stderr
    assert "GFLOPs (12 tokens)" in done.stdout
    check_that_the_front_was_measured(tmp_path / "search")


def test_space_without_shapes_of_equal_size_has_no_insensitivity_report(inputs, tmp_path):
    vocab_size = SuperShaperConfig.from_pretrained(inputs[1]).vocab_size
    supernet = SuperShaperForMaskedLM(tiny_config(vocab_size=vocab_size, width_choices=[8, 48]))
    supernet.save_pretrained(tmp_path / "supernet")
    inputs = ["--model", str(tmp_path / "supernet"), "--tokenizer", *inputs[1:]]
    done = search(inputs, tmp_path / "search", "--num_shapes=8", "--rounds=1", "--latency=cpu", "--insensitivity")
    assert done.returncode == 0, done.stderr
    assert "No insensitivity report: Only 0 shapes are within" in done.stdout
    assert not (tmp_path / "search" / "insensitivity.json").exists()


def test_records_are_a_data_set_with_parameters(first_run):
    _, folder = first_run
    stored = Dataset.from_parquet(str(folder / "records.parquet"), cache_dir=str(folder / "cache")).to_list()
    space = SearchSpace(SuperShaperConfig.from_pretrained(folder))
    assert [row["shape"] for row in stored] == [r["shape"] for r in read_records(folder / "records.jsonl")]
    assert all(row["parameters"] == space.num_parameters(row["shape"]) for row in stored)


def test_same_command_again_measures_nothing_and_makes_the_same_page(first_run, inputs):
    _, folder = first_run
    before = {
        name: (folder / name).read_bytes() for name in ("records.jsonl", "report.md", "front.csv", "latency.json")
    }
    done = search(inputs, folder, "--latency=cpu", "--insensitivity", "--max_cost=90000")
    assert done.returncode == 0, done.stderr
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_killed_run_goes_on_and_ends_with_the_same_records(first_run, inputs, tmp_path):
    _, folder = first_run
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "records.jsonl").write_bytes(b"".join(lines[:13]) + lines[13][:20])  # as a kill leaves it
    done = search(inputs, tmp_path / "search", "--max_cost=90000")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "search" / "records.jsonl").read_bytes() == b"".join(lines)


def test_two_processes_write_what_one_does(first_run, inputs, tmp_path):
    _, folder = first_run
    done = search(inputs, tmp_path / "search", "--max_cost=90000", launcher=launcher())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "search" / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()
    assert done.stdout.count("Written: ") == 1


def test_results_are_published_beside_the_supernet(first_run, inputs, tmp_path):
    folder = shutil.copytree(first_run[1], tmp_path / "search")
    with HubServer() as server:
        environment = ENVIRONMENT | server.environment(tmp_path / "cache")
        done = search(inputs, folder, "--max_cost=90000", "--push_to_hub=user/supernet", environment=environment)
        assert done.returncode == 0, done.stderr
        published = server.repos["user/supernet"].files()
    assert {"search/records.jsonl", "search/records.parquet", "search/report.md"} <= published.keys()
    assert published["search/records.jsonl"] == (folder / "records.jsonl").read_bytes()
    assert "user/supernet/commit/" in done.stdout


def test_records_of_another_model_are_refused(first_run, inputs, tmp_path):
    _, folder = first_run
    (tmp_path / "search").mkdir()
    first, *rest = (folder / "records.jsonl").read_text().splitlines()
    header = json.loads(first) | {"model": "0" * 64}
    (tmp_path / "search" / "records.jsonl").write_text("\n".join([json.dumps(header), *rest]) + "\n")
    done = search(inputs, tmp_path / "search")
    assert done.returncode == 1
    assert "holds records of another model" in done.stderr


def test_budget_in_seconds_is_searched_for_and_answered(inputs, tmp_path):
    folder = tmp_path / "search"
    folder.mkdir()
    config = SuperShaperConfig.from_pretrained(inputs[1])
    table = LatencyTable.measure(config, sequence_length=12, repeats=3)
    table.save(folder / "latency.json")
    least, most = table.predict([[8] * 6, [48] * 6])
    budget = (least + most) / 2
    done = search(inputs, folder, "--latency=cpu", "--cost=latency", f"--max_cost={budget}")
    assert done.returncode == 0, done.stderr
    assert "The exact Pareto front of latency" in done.stdout
    answer = done.stdout.split("The best measured shape for each budget:")[1].split("\n\n")[1].splitlines()[2]
    cells = answer.strip("| ").split(" | ")
    assert cells[0] == f"{budget * 1e3:.2f} ms"
    shape = json.loads(cells[-1])
    records = read_records(folder / "records.jsonl")
    within = [record for record in records if table.predict([record["shape"]])[0] <= budget]
    assert shape == min(within, key=lambda record: record["loss"])["shape"]
    assert sum(table.predict([r["shape"]])[0] > 0.8 * budget for r in within) >= 6  # the rounds looked there


def test_latency_of_other_conditions_is_not_taken_for_this_one(first_run, inputs, tmp_path):
    folder = shutil.copytree(first_run[1], tmp_path / "search")
    done = search(inputs, folder, "--latency=cpu", "--latency_batch_size=4", "--max_cost=90000")
    assert done.returncode == 1
    assert "latency.json was measured with {'batch_size': 1}, asked for is {'device': " in done.stderr
    assert "Delete it and insensitivity.json to measure anew" in done.stderr


def test_layers_that_were_dropped_in_an_earlier_search_do_not_harm(inputs, tmp_path):
    for options in (["--drop_rate=0.3"], ["--num_shapes=30"]):
        done = search(inputs, tmp_path / "search", *options)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cost=watts"], "--cost watts is unknown. Allowed: parameters, flops, latency."),
        (["--cost=latency"], "--cost latency and --insensitivity need --latency DEVICE."),
        (["--latency=gpu"], "device='gpu' is not available on this machine. Allowed: ['cpu'"),
        (["--max_cost=100"], "max_cost=100 cannot be met: the cheapest shape has parameters"),
        (["--num_shapes=5"], "num_shapes=5 and rounds=4"),
    ],
)
def test_options_that_make_no_sense_are_refused(inputs, tmp_path, options, message):
    done = search(inputs, tmp_path / "search", *options)
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stderr)


def test_missing_options_are_named():
    done = subprocess.run([sys.executable, str(SCRIPT)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--model is missing." in done.stderr


def test_script_can_be_imported_without_running():
    spec = importlib.util.spec_from_file_location("search_shapes", SCRIPT)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
