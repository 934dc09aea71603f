"""`examples/publish_subnet.py`: from a supernet, its search and its results to a repository whose card is true."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import assert_same, randomize, tiny_batch, tiny_config, tiny_model
from conftest import run as outputs_of
from huggingface_hub import ModelCard
from publishing import CODE, FIRST, IGNORE_UPLOADS, contents, files, titles
from search_folders import distance_record, write_search
from tiny_tasks import tune, write_task

import supershaper_hf
from supershaper_hf import (
    LatencyTable,
    SuperShaperForMaskedLM,
    SuperShaperForSequenceClassification,
    SuperShaperModel,
    push_folder,
    save_for_hub,
)
from supershaper_hf.publish.subnet import Source
from supershaper_hf.report.findings import LATENCY_FILE, Findings
from supershaper_hf.search.records import read_records


SCRIPT = Path(__file__).parents[2] / "examples" / "publish_subnet.py"
SHAPE = [20, 0, 36]
NO_EXPORTS = ["--exports", "none"]
pytestmark = [IGNORE_UPLOADS, pytest.mark.filterwarnings("ignore:Shapes left out")]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("publish_subnet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_supernet(folder, tokenizer, model_class=SuperShaperForMaskedLM, **options):
    model = randomize(model_class(tiny_config(vocab_size=len(tokenizer))))
    save_for_hub(model, folder, tokenizer=tokenizer, **options)
    return model


@pytest.fixture
def supernet(tokenizer, tmp_path):
    """A supernet with its search, and a card that says where it comes from."""
    card = {"license": "mit", "language": "en", "datasets": ["user/text"], "base_model": "user/bert"}
    model = write_supernet(tmp_path / "supernet", tokenizer, **card, training="One epoch.\n\n```\nof text")
    write_search(tmp_path / "supernet" / "search", model, latency=True)
    return model


def publish(script, *options):
    assert script.main([*NO_EXPORTS, *map(str, options)]) == 0


@pytest.mark.parametrize("shape", [SHAPE, [20, 36, 20]])
def test_subnet_of_a_supernet_is_written_and_its_card_is_true(shape, script, supernet, tmp_path):
    publish(script, "--model", tmp_path / "supernet", "--shape", *shape, "--output_dir", tmp_path / "small")
    subnet = SuperShaperForMaskedLM.from_pretrained(tmp_path / "small")
    batch = {"input_ids": tiny_batch()["input_ids"] % 20}
    assert_same(outputs_of(subnet, batch), outputs_of(supernet, batch, shape=shape))
    assert {"tokenizer.json", "config.json", "model.safetensors", "README.md"} | CODE <= contents(
        tmp_path / "small"
    ).keys()
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["user/text"])
    assert card.data.base_model == "user/bert"  # the supernet itself is on no Hub
    assert "| cut out of | `supernet` |\n" in card.text
    assert str(tmp_path) not in str(card)  # the path of a folder is private
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert f"| weights on disk | {size / 1e6:.2f} MB, float32 |\n" in card.text
    assert f"Cut out of the supernet `supernet` at the shape {shape}, without further training." in card.text
    assert "> One epoch.\n>\n> ```\n> of text\n" in card.text
    # Values of the search
    findings = Findings.read(tmp_path / "supernet" / "search")
    (row,) = findings.rows(np.array([shape]))
    largest = next(r for r in findings.records if r["shape"] == findings.space.largest)
    values = [row[name] for name in ("measured_perplexity", "predicted_perplexity")]
    assert values[0] is None
    assert (values[1] is None) == (0 in shape)
    measured, predicted = ("" if value is None else f"{value:.2f}" for value in values)
    assert f"| this subnet | {measured} | {predicted} |" in card.text
    assert f"| largest shape | {largest['perplexity']:.2f} |" in card.text


@pytest.mark.parametrize("cost", ["parameters", "flops", "latency"])
def test_shape_for_a_budget_is_that_of_the_front(cost, script, supernet, tmp_path):
    folder = tmp_path / "supernet"
    findings = Findings.read(folder / "search", 12)
    table = LatencyTable.load(folder / "search" / LATENCY_FILE)
    space = findings.space
    middle = [20, 36, 36]
    budget = {"parameters": space.num_parameters, "flops": lambda s: space.flops(s, 8), "latency": table.predict}[cost](
        middle
    )
    publish(
        script,
        "--model",
        folder,
        "--max_cost",
        budget,
        "--cost",
        cost,
        "--max_length",
        12,
        "--output_dir",
        tmp_path / "small",
    )
    found = SuperShaperForMaskedLM.from_pretrained(tmp_path / "small").config.hidden_sizes
    best = findings.front(cost).best(budget)
    assert found == [width for width in best if width]
    assert best != space.smallest


def test_measured_value_is_metadata(script, supernet, tmp_path):
    record = read_records(tmp_path / "supernet" / "search" / "records.jsonl")[3]
    publish(script, "--model", tmp_path / "supernet", "--shape", *record["shape"], "--output_dir", tmp_path / "small")
    (result,) = ModelCard.load(tmp_path / "small" / "README.md").data.eval_results
    assert (result.metric_type, result.dataset_name) == ("perplexity", "Held-out masked text of the search")
    assert result.metric_value == pytest.approx(record["perplexity"], abs=1e-6)


def test_records_of_another_supernet_are_refused(script, supernet, tokenizer, tmp_path):
    other = randomize(SuperShaperForMaskedLM(tiny_config(vocab_size=len(tokenizer))), seed=1)
    save_for_hub(other, tmp_path / "other", tokenizer=tokenizer)
    options = ["--model", tmp_path / "other", "--search", tmp_path / "supernet" / "search", "--shape", *SHAPE]
    with pytest.raises(ValueError, match=r"records\.jsonl holds measurements of another model than .*other"):
        publish(script, *options, "--output_dir", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_sentence_encoder_stays_one(script, tokenizer, tmp_path):
    model = write_supernet(tmp_path / "encoder", tokenizer, SuperShaperModel, pooling="cls", normalize=True)
    write_search(tmp_path / "search", model, distance_record)
    options = ["--model", tmp_path / "encoder", "--search", tmp_path / "search", "--max_cost", 1e9]
    publish(script, *options, "--output_dir", tmp_path / "small")
    options = supershaper_hf.read_sentence_encoder(tmp_path / "small")
    assert (options["pooling"], options["normalize"]) == ("cls", True)
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.pipeline_tag == "sentence-similarity"
    assert "measured distance to the original" in card.text


def test_latency_names_the_device(script, supernet, tmp_path):
    options = ["--latency", "cpu", "--latency_batch_size", 2, "--max_length", 8, "--output_dir", tmp_path / "small"]
    publish(script, "--model", tmp_path / "supernet", "--shape", *SHAPE, *options)
    text = (tmp_path / "small" / "README.md").read_text().split("## Latency\n")[1].split("## ")[0]
    assert f"one batch of 2 x 8 tokens on {supershaper_hf.devices.device_name('cpu')}, in PyTorch, float32" in text
    assert all(float(re.search(rf"\| {name} \| (\S+) \|", text)[1]) > 0 for name in ("this subnet", "largest shape.*"))


# After a fine-tuning


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A subnet that was fine-tuned with two seeds."""
    from conftest import SPECIAL_TOKENS, WORDS
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("tuned")
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    save_for_hub(tiny_model(vocab_size=len(tokenizer)), folder / "supernet", tokenizer=tokenizer)
    results = tune(
        folder / "out",
        str(folder / "supernet"),
        write_task(folder),
        tokenizer,
        shape=[36, 20, 48],
        seeds=[0, 1],
        num_train_epochs=1,
    )
    return folder, results


def test_results_of_a_fine_tuning_are_those_of_the_model(script, tuned, server):
    folder, results = tuned
    model, file = folder / "out" / "model", folder / "out" / "results.json"
    publish(script, "--model", model, "--results", file, "--dataset", "nyu-mll/glue", "--repo_id", "user/sst2")
    published = files(server, "user/sst2")
    assert titles(server, "user/sst2") == [FIRST, "Upload model with supershaper-hf"]
    assert published["model.safetensors"] == (model / "model.safetensors").read_bytes()
    card = ModelCard(published["README.md"].decode())
    best = next(each for each in results["seeds"] if each["seed"] == results["best_seed"])["scores"]["validation"]
    mean, spread = results["mean"]["validation"]["accuracy"], results["spread"]["validation"]["accuracy"]
    assert f"| sst2 | validation | accuracy | {best['accuracy']:.4f} | {mean:.4f} ± {spread:.4f} |" in card.text
    assert f"Computed with supershaper-hf {supershaper_hf.__version__}, transformers" in card.text
    assert card.text.count("Fine-tuned on the task sst2 (48 examples)") == 1
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_config, result.metric_type) == ("nyu-mll/glue", "sst2", "accuracy")
    assert result.metric_value == best["accuracy"]
    (entry,) = yaml.safe_load(published[".eval_results/nyu-mll_glue_sst2.yaml"])
    assert entry["value"] == best["accuracy"]
    assert entry["dataset"] == {"id": "nyu-mll/glue", "task_id": "sst2"}


def test_results_without_a_data_set_of_the_hub_claim_none(script, tuned, tmp_path):
    folder, _ = tuned
    options = ["--model", folder / "out" / "model", "--results", folder / "out" / "results.json"]
    publish(script, *options, "--output_dir", tmp_path / "sst2")
    assert not (tmp_path / "sst2" / ".eval_results").exists()
    (result,) = ModelCard.load(tmp_path / "sst2" / "README.md").data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("sst2", None)


def test_results_of_another_model_are_refused(script, tuned, tokenizer, tmp_path):
    folder, _ = tuned
    model = tiny_model(SuperShaperForSequenceClassification, vocab_size=len(tokenizer)).extract_subnet([20, 20, 20])
    save_for_hub(model, tmp_path / "model", tokenizer=tokenizer)
    options = ["--model", tmp_path / "model", "--results", folder / "out" / "results.json"]
    with pytest.raises(
        ValueError, match=r"results\.json has the results of another model: .* \[36, 20, 48\], but this"
    ):
        publish(script, *options, "--output_dir", tmp_path / "small")


# Publishing


@pytest.mark.parametrize("search", ["inside", "beside", "named"])
def test_published_in_one_commit_with_the_options_of_the_hub(search, script, supernet, server, tmp_path):
    if search != "inside":
        shutil.move(tmp_path / "supernet" / "search", tmp_path / "search")
        name = {"beside": "user/net-search", "named": "user/records"}[search]
        push_folder(tmp_path / "search", name, repo_type="dataset")
    push_folder(tmp_path / "supernet", "user/net", private=False)
    titles_before = titles(server, "user/net")
    shutil.rmtree(tmp_path / "supernet")
    where = ["--repo_id", "user/small", "--private", "--revision", "v1", "--token", server.token]
    named = ["--search", "user/records"] if search == "named" else []
    publish(script, "--model", "user/net", *named, "--max_cost", 1e9, *where)
    assert titles(server, "user/net") == titles_before
    assert titles(server, "user/small") == [FIRST, "Upload model with supershaper-hf"]
    assert server.repos["user/small"].private
    published = files(server, "user/small", "v1")
    card = ModelCard(published["README.md"].decode())
    assert card.data.base_model == "user/net"
    assert 'from_pretrained("user/small", trust_remote_code=True)' in card.text
    config = json.loads(published["config.json"])
    assert config["hidden_sizes"] == [48, 48, 48]
    assert not any(server.token.encode() in content for content in published.values())


def test_pull_request_is_named(script, supernet, server, tmp_path, capsys):
    publish(
        script,
        "--model",
        tmp_path / "supernet",
        "--shape",
        *SHAPE,
        "--repo_id",
        "user/small",
        "--create_pr",
        "--token",
        server.token,
    )
    printed = capsys.readouterr()
    assert f"Published: {server.endpoint}/user/small/discussions/1" in printed.out
    assert server.token not in printed.out + printed.err


def test_dry_run_writes_the_folder_and_asks_nothing_of_the_network(script, supernet, server, tmp_path, capsys):
    options = ["--model", tmp_path / "supernet", "--shape", *SHAPE, "--output_dir", tmp_path / "small"]
    publish(script, *options, "--repo_id", "user/small", "--dry_run")
    assert server.user_agents == []
    printed = capsys.readouterr().out
    for name, content in contents(tmp_path / "small").items():
        assert re.search(rf"^{re.escape(name)} +{len(content):,}$", printed, re.MULTILINE)
    assert (tmp_path / "small" / "README.md").read_text() in printed
    # What was looked at is what is published.
    publish(script, "--output_dir", tmp_path / "small", "--repo_id", "user/small")
    assert files(server, "user/small") == contents(tmp_path / "small")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "a"], "Give --output_dir, --repo_id or both"),
        (["--output_dir", "a"], "--model is missing"),
        (["--output_dir", "a", "--repo_id", "b", "--dry_run"], "--model is missing"),
        (["--model", "a", "--output_dir", "b", "--shape", "8", "--max_cost", "9"], "--shape or --max_cost, not both"),
        (["--model", "a", "--output_dir", "b", "--cost", "bytes"], "--cost='bytes' is unknown"),
        (["--model", "a", "--repo_id", "b"], "--repo_id b must be user/name"),
        (["--model", "a", "--output_dir", "b", "--exports", "onx"], "formats='onx' is unknown. Allowed: 'onnx'"),
        (["--model", "a", "--output_dir", "b", "--latency", "abacus"], "device='abacus' is not available"),
    ],
)
def test_wrong_options_are_refused(options, message, script, capsys):
    with pytest.raises(SystemExit):
        script.main(options)
    assert message in capsys.readouterr().err


def test_card_that_names_the_folder_is_not_published(script, supernet, server, tmp_path):
    publish(script, "--model", tmp_path / "supernet", "--shape", *SHAPE, "--output_dir", tmp_path / "small")
    with pytest.raises(ValueError, match=r"load 'small', not user/small\. Write the folder again with that"):
        publish(script, "--output_dir", tmp_path / "small", "--repo_id", "user/small")


def test_search_that_is_nowhere_is_named(script, supernet, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--model", tmp_path / "supernet", "--max_cost", 1e6, "--output_dir", tmp_path / "small"]
    with pytest.raises(FileNotFoundError, match=r"^user/search is neither a folder nor a data set on the Hub"):
        publish(script, *options, "--search", "user/search")


def test_what_cannot_be_cut_is_refused(script, supernet, tokenizer, tmp_path):
    small = ["--output_dir", tmp_path / "small"]
    with pytest.raises(ValueError, match="supernet is a supernet: give the shape"):
        publish(script, "--model", tmp_path / "supernet", *small)
    save_for_hub(supernet.extract_subnet(SHAPE), tmp_path / "cut", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="cut is a subnet: leave the shape out"):
        publish(script, "--model", tmp_path / "cut", "--shape", 8, 8, *small)
    shutil.rmtree(tmp_path / "supernet" / "search")
    with pytest.raises(ValueError, match=r"max_cost=1e\+06 needs the measured shapes .* no folder 'search'"):
        publish(script, "--model", tmp_path / "supernet", "--max_cost", 1e6, *small)
    assert not (tmp_path / "small").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is neither a folder nor a data set .* with records\.jsonl"):
        publish(script, "--model", tmp_path / "supernet", "--max_cost", 1e6, "--search", tmp_path / "empty", *small)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").touch()
    with pytest.raises(FileExistsError, match="small exists and is not an empty folder"):
        publish(script, "--model", tmp_path / "supernet", "--shape", *SHAPE, *small)


def test_token_is_not_shown_with_the_options(script):
    args = script.PublishArguments(model="a", output_dir="b", token="hf_secret")
    assert "hf_secret" not in repr(args)


def test_model_of_another_package_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match=r"holds a BertModel\. Allowed: .*SuperShaperForMaskedLM"):
        Source.load(str(tmp_path))


def test_supernet_without_a_tokenizer_or_a_card_is_published_without(script, tmp_path):
    tiny_model().save_pretrained(tmp_path / "bare")
    publish(script, "--model", tmp_path / "bare", "--shape", *SHAPE, "--output_dir", tmp_path / "small")
    assert "okenizer" not in (tmp_path / "small" / "README.md").read_text()
    assert not any("tokenizer" in name for name in contents(tmp_path / "small"))
