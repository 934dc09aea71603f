"""`examples/search_shapes.py` on a real supernet and text on disk.

Most tests call `main` in this process, because a new one takes seconds to import the libraries.
"""

import contextlib
import importlib.util
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import randomize, tiny_config
from datasets import Dataset
from hub_server import HubServer
from launching import launch
from publishing import point_client_at
from texts import random_documents
from transformers import BertTokenizer

from supershaper_hf import (
    LatencyTable,
    SearchSpace,
    ShapePredictor,
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperModel,
    save_for_hub,
)
from supershaper_hf.files import lock
from supershaper_hf.publish.subnet import Source, read_search
from supershaper_hf.search.records import read_records


pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")  # random weights: no width is better
SCRIPT = Path(__file__).parents[2] / "examples" / "search_shapes.py"
OPTIONS = [
    "--num_shapes=24",
    "--max_length=12",
    "--max_eval_samples=24",
    "--per_device_eval_batch_size=8",
    "--mlm_probability=0.4",
    "--num_budgets=4",
]


def load_script():
    spec = importlib.util.spec_from_file_location("search_shapes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    module = load_script()
    # Two shapes of each size and two runs of each: what they tell is tested in tests/latency.
    module.compare_equal_sizes = partial(module.compare_equal_sizes, num_shapes=2, repeats=2)
    return module


def save_supernet(folder, seed=0, **changes):
    """Save a supernet whose layers do something, with its tokenizer; return it."""
    from conftest import SPECIAL_TOKENS, WORDS
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    config = tiny_config(**{"vocab_size": len(tokenizer), "num_hidden_layers": 6, **changes})
    model = randomize(SuperShaperForMaskedLM(config), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options that name a supernet and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    save_supernet(folder / "supernet")
    (folder / "text.txt").write_text("\n".join(random_documents(20)["text"]), encoding="utf-8")
    return ["--model_name_or_path", str(folder / "supernet"), "--eval_files", str(folder / "text.txt")]


@pytest.fixture(scope="module")
def search(script, inputs):
    """Run the script in this process, and return what it prints. Later options win."""

    def run(output, *options):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert script.main([*inputs, "--output_dir", str(output), *OPTIONS, *options]) == 0
        return text.getvalue()

    return run


@pytest.fixture(scope="module")
def first_run(search, tmp_path_factory):
    """What the script has printed, and its folder."""
    folder = tmp_path_factory.mktemp("run") / "search"
    return search(folder, "--latency=cpu", "--insensitivity", "--max_cost=90000"), folder


def test_everything_is_written_and_the_page_is_printed(first_run):
    printed, folder = first_run
    names = {file.name for file in folder.iterdir()}
    files = (
        "config.json records.jsonl records.parquet predictor.json latency.json insensitivity.json front.csv report.md "
        "explorer.html"
    )
    assert set(files.split()) <= names
    assert (folder / "report.md").read_text().strip() in printed
    assert "Predictor: R2" in printed


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Options that name an encoder without a masked-LM head; its BERT; a tokenizer without a mask token."""
    folder = tmp_path_factory.mktemp("encoder")
    from conftest import BERT_SIZES
    from transformers import BertConfig, BertModel, BertTokenizer

    save_supernet(folder / "other", num_hidden_layers=3)
    tokenizer = BertTokenizer.from_pretrained(folder / "other")
    bert = randomize(BertModel(BertConfig(**{**BERT_SIZES, "vocab_size": len(tokenizer)})))
    bert.save_pretrained(folder / "bert")
    supernet = SuperShaperModel.from_bert(bert, width_choices=[8, 20, 36, 48])
    supernet.save_pretrained(folder / "supernet")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder / "supernet")
    return ["--model_name_or_path", str(folder / "supernet")], folder / "bert"


def test_an_encoder_without_a_masked_lm_head_is_searched_by_distance(search, encoder, tmp_path):
    folder, (options, bert) = tmp_path / "search", encoder
    printed = search(folder, *options, "--max_cost=60000")
    assert "measured distance to the original" in printed
    assert not re.search("perplexity|nats|loss", (folder / "report.md").read_text())
    records = read_records(folder / "records.jsonl")
    assert set(records[0]) == {"shape", "distance", "cosine"}
    largest = next(record for record in records if record["shape"] == [48, 48, 48])
    assert largest["distance"] == 0.0
    assert ShapePredictor.load(folder / "predictor.json").measure == "distance"
    stored = Dataset.from_parquet(str(folder / "records.parquet"), cache_dir=str(folder / "cache"))
    assert stored.column_names == ["shape", "distance", "cosine", "parameters"]
    before = (folder / "records.jsonl").read_bytes()
    search(folder, *options, "--max_cost=60000", "--measure=distance")  # the same again, although poolers are random
    assert (folder / "records.jsonl").read_bytes() == before
    # The BERT that the supernet was made of is another original by name, and gives the same distances.
    search(tmp_path / "bert", *options, "--max_cost=60000", "--original", str(bert))
    for found, expected in zip(read_records(tmp_path / "bert" / "records.jsonl"), records, strict=False):
        assert found["distance"] == pytest.approx(expected["distance"], abs=1e-5)


def test_a_sentence_encoder_is_searched_and_counted_without_its_masked_lm_head(search, encoder, tmp_path):
    """The head is there for its training. Only who asks for losses gets it."""
    folder, bare = tmp_path / "sentences", SuperShaperModel.from_pretrained(encoder[0][1])
    whole = SuperShaperForMaskedLM(bare.config)
    whole.bert.load_state_dict({name: value for name, value in bare.state_dict().items() if "pooler" not in name})
    save_for_hub(whole, folder, tokenizer=BertTokenizer.from_pretrained(encoder[0][1]), pooling="mean")
    options = ["--model_name_or_path", str(folder), "--num_shapes=8"]
    search(tmp_path / "search", *options)
    assert json.loads((tmp_path / "search" / "config.json").read_text())["architectures"] == ["SuperShaperModel"]
    assert set(read_records(tmp_path / "search" / "records.jsonl")[0]) == {"shape", "distance", "cosine"}
    source = Source.load(str(folder))
    assert type(source.model) is SuperShaperModel
    assert read_search(source, tmp_path / "search") is not None


def test_a_supernet_with_a_masked_lm_head_can_be_searched_by_distance(search, tmp_path):
    printed = search(tmp_path / "search", "--num_shapes=8", "--measure=distance")
    assert "predicted distance to the original" in printed
    with pytest.raises(ValueError, match="holds records of another measure"):
        search(tmp_path / "search", "--num_shapes=8")


def test_loss_of_an_encoder_is_refused(search, encoder, tmp_path):
    """Its masked-LM head would be a random one."""
    with pytest.raises(ValueError, match=r"has no masked-LM head\. Use --measure distance"):
        search(tmp_path / "search", *encoder[0], "--measure=loss")


def test_original_that_is_not_there_is_named(search, tmp_path):
    with pytest.raises(OSError, match="--original nowhere/at/all: there is no such folder here, and no such model"):
        search(tmp_path / "search", "--original=nowhere/at/all")


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


def test_flops_are_those_of_the_measured_length(search, tmp_path):
    assert "GFLOPs (12 tokens)" in search(tmp_path / "search", "--cost=flops")
    check_that_the_front_was_measured(tmp_path / "search")


def test_space_without_shapes_of_equal_size_has_no_comparison_of_them(search, inputs, tmp_path):
    supernet = SuperShaperForMaskedLM(
        save_supernet(tmp_path / "other", num_hidden_layers=3, width_choices=[8, 48]).config
    )
    supernet.save_pretrained(tmp_path / "supernet")  # without a tokenizer
    options = ["--num_shapes=8", "--rounds=1", "--latency=cpu", "--insensitivity"]
    printed = search(
        tmp_path / "search", "--model_name_or_path", str(tmp_path / "supernet"), "--tokenizer_name", inputs[1], *options
    )
    assert "No comparison of shapes of equal size: 0 shapes have" in printed
    assert not (tmp_path / "search" / "insensitivity.json").exists()


def test_records_are_a_data_set_with_parameters(first_run):
    _, folder = first_run
    stored = Dataset.from_parquet(str(folder / "records.parquet"), cache_dir=str(folder / "cache")).to_list()
    space = SearchSpace(SuperShaperConfig.from_pretrained(folder))
    assert [row["shape"] for row in stored] == [r["shape"] for r in read_records(folder / "records.jsonl")]
    assert all(row["parameters"] == space.num_parameters(row["shape"]) for row in stored)


def test_same_command_again_measures_nothing_and_makes_the_same_page(first_run, search):
    _, folder = first_run
    before = {
        name: (folder / name).read_bytes()
        for name in ("records.jsonl", "report.md", "front.csv", "latency.json", "insensitivity.json")
    }
    search(folder, "--latency=cpu", "--insensitivity", "--max_cost=90000")
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.filterwarnings(r"ignore:.*records\.jsonl")  # it says that half a line does not count
def test_killed_run_goes_on_and_ends_with_the_same_records(first_run, search, tmp_path):
    _, folder = first_run
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "records.jsonl").write_bytes(b"".join(lines[:13]) + lines[13][:20])  # as a kill leaves it
    search(tmp_path / "search", "--max_cost=90000")
    assert (tmp_path / "search" / "records.jsonl").read_bytes() == b"".join(lines)


def test_two_processes_write_what_one_does(first_run, inputs, tmp_path):
    _, folder = first_run
    options = [*inputs, "--output_dir", str(tmp_path / "search"), *OPTIONS, "--max_cost=90000"]
    process = launch(2, run_script, options, log=tmp_path / "log.txt")
    process.join(300)
    printed = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 0, printed
    assert (tmp_path / "search" / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()
    assert printed.count("Written: ") == 1


def run_script(options):
    assert load_script().main(options) == 0


def test_results_are_published_beside_the_supernet(first_run, search, tmp_path):
    folder = shutil.copytree(first_run[1], tmp_path / "search")
    with HubServer() as server, point_client_at(server, tmp_path / "cache"):
        printed = search(folder, "--max_cost=90000", "--push_to_hub=user/supernet")
        assert list(server.repos) == ["datasets/user/supernet-search"]
        published = server.repos["datasets/user/supernet-search"].files()
    assert {"records.jsonl", "records.parquet", "report.md"} <= published.keys()
    assert b'supernet = snapshot_download(\\"user/supernet\\")' in published["explorer.html"]
    assert published["records.jsonl"] == (folder / "records.jsonl").read_bytes()
    assert b'load_dataset("user/supernet-search", split="train")' in published["README.md"]
    assert b"base_model: user/supernet\n" in published["README.md"]
    assert "datasets/user/supernet-search/commit/" in printed


def test_records_of_another_model_are_refused_and_both_names_of_the_file_are_said(first_run, search, tmp_path):
    folder = shutil.copytree(first_run[1], tmp_path / "search")
    save_supernet(tmp_path / "supernet", seed=1)
    with pytest.raises(ValueError, match="another model") as caught:
        search(folder, "--model_name_or_path", str(tmp_path / "supernet"))
    assert f"records.jsonl in the folder that --output_dir names: {folder}" in caught.value.__notes__[0]


def test_budget_in_seconds_is_searched_for_and_answered(search, inputs, tmp_path):
    folder = tmp_path / "search"
    folder.mkdir()
    config = SuperShaperConfig.from_pretrained(inputs[1])
    table = LatencyTable.measure(SearchSpace.from_config(config), sequence_length=12, repeats=3)
    table.save(folder / "latency.json")
    least, most = table.predict([[8] * 6, [48] * 6])
    budget = (least + most) / 2
    printed = search(folder, "--latency=cpu", "--cost=latency", f"--max_cost={budget}")
    assert "The exact Pareto front of latency" in printed
    answer = printed.split("The best measured shape for each budget:")[1].split("\n\n")[1].splitlines()[2]
    cells = answer.strip("| ").split(" | ")
    assert cells[0] == f"{budget * 1e3:.2f} ms"
    shape = json.loads(cells[-1])
    records = read_records(folder / "records.jsonl")
    within = [record for record in records if table.predict([record["shape"]])[0] <= budget]
    assert shape == min(within, key=lambda record: record["loss"])["shape"]
    assert sum(table.predict([r["shape"]])[0] > 0.8 * budget for r in within) >= 6  # the rounds looked there


def test_latency_of_other_conditions_is_not_taken_for_this_one(first_run, search, tmp_path):
    folder = shutil.copytree(first_run[1], tmp_path / "search")
    message = r"latency\.json was measured with {'batch_size': 1}, but this call asks for {'device': .*Remove it to"
    with pytest.raises(ValueError, match=message):
        search(folder, "--latency=cpu", "--latency_batch_size=4", "--max_cost=90000")


def test_comparison_of_other_conditions_is_removed_with_the_latency_table(first_run, search, tmp_path):
    folder = shutil.copytree(first_run[1], tmp_path / "search")
    (folder / "latency.json").unlink()
    search(folder, "--latency=cpu", "--latency_batch_size=4", "--max_cost=90000")
    assert LatencyTable.load(folder / "latency.json").batch_size == 4
    assert not (folder / "insensitivity.json").exists()


def test_layers_that_were_dropped_in_an_earlier_search_do_not_harm(search, tmp_path):
    for options in (["--drop_rate=0.3"], ["--num_shapes=30"]):
        search(tmp_path / "search", *options)


def test_second_search_in_the_same_folder_says_so(search, tmp_path):
    with lock(tmp_path), pytest.raises(RuntimeError, match=f"{tmp_path} is in use by another run"):
        search(tmp_path)
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--cost=watts", "--cost='watts' is unknown. Allowed: 'parameters', 'flops', 'latency'."),
        ("--cost=latency", "--cost latency and --insensitivity need --latency DEVICE."),
        ("--insensitivity", "--cost latency and --insensitivity need --latency DEVICE."),
        ("--latency=gpu", "device='gpu' "),
        ("--latency_batch_size=0", "--latency_batch_size=0 must be an integer of at least 1."),
        ("--max_cost=-1", "--max_cost=-1.0 must be a finite number above 0."),
        ("--max_cost=nan", "--max_cost=nan must be a finite number above 0."),
        ("--num_budgets=0", "--num_budgets=0 must be an integer of at least 1."),
        ("--num_shapes=5", "--num_shapes=5 must be an integer of at least 8."),
        ("--measure=perplexity", "--measure='perplexity' is unknown. Allowed: 'loss', 'distance'."),
        ("--measure=loss --original=bert", "--original is for --measure distance only."),
        ("--rounds=0", "--rounds=0 must be an integer of at least 1."),
        ("--drop_rate=1", "--drop_rate=1.0 must be a finite number at least 0 and below 1."),
        ("--mlm_probability=0", "--mlm_probability=0.0 must be a finite number above 0 and at most 1."),
        ("--max_length=0", "--max_length=0 must be an integer of at least 1."),
        ("--max_eval_samples=0", "--max_eval_samples=0 must be an integer of at least 1."),
        ("--per_device_eval_batch_size=0", "--per_device_eval_batch_size=0 must be an integer of at least 1."),
        ("--seed=-1", "--seed=-1 must be an integer of at least 0."),
        ("--model_name_or_path=", "--model_name_or_path is missing."),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_read(search, tmp_path, option, message, capsys):
    with pytest.raises(SystemExit) as caught:
        search(tmp_path / "search", *option.split())
    assert caught.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "search").exists()


def test_budget_that_no_shape_meets_is_refused_before_the_first_measurement(search, tmp_path):
    with pytest.raises(ValueError, match="max_cost=100 parameters cannot be met: the cheapest shape has"):
        search(tmp_path / "search", "--max_cost=100")
    assert not (tmp_path / "search" / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("nowhere/at/all", "there is no such folder here, and no such model could be loaded from the Hub"),
        ("empty", "this folder holds no model that can be loaded"),
    ],
)
def test_model_that_is_not_there_is_named(search, tmp_path, name, what, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(OSError, match=f"--model_name_or_path {name}: {what}: "):
        search(tmp_path / "search", "--model_name_or_path", name)


def test_missing_options_are_named(script, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main([])
    assert caught.value.code == 2
    assert "--model_name_or_path is missing." in capsys.readouterr().err


def test_help_names_the_cost_before_its_budget(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert text.index("--cost ") < text.index("--max_cost ") < text.index("--num_budgets ")
