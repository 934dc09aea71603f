"""`examples/publish_family.py`: every repository complete or absent, also after an interruption at any request."""

import importlib.util
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import SPECIAL_TOKENS, WORDS, randomize, tiny_config
from datasets import load_dataset
from forking import fork
from hub_server import SPACE_CARD, HubServer
from huggingface_hub import HfApi, ModelCard, SpaceCard
from publishing import IGNORE_UPLOADS, contents, files, point_client_at, titles
from safetensors.torch import load_file
from search_folders import distance_record, write_search
from transformers import AutoModelForMaskedLM, BertTokenizer

from supershaper_hf import (
    SearchSpace,
    SuperShaperForMaskedLM,
    extract_from_folder,
    read_sentence_encoder,
    save_for_hub,
)
from supershaper_hf.report.explorer import explorer_page
from supershaper_hf.report.findings import Findings
from supershaper_hf.search.records import read_records


SCRIPT = Path(__file__).parents[2] / "examples" / "publish_family.py"
pytestmark = [IGNORE_UPLOADS, pytest.mark.filterwarnings("ignore:Shapes left out")]


def load_script():
    spec = importlib.util.spec_from_file_location("publish_family", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A supernet with its search, two budgets, and the options of the script."""
    folder = tmp_path_factory.mktemp("supernet")
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    model = randomize(SuperShaperForMaskedLM(tiny_config(vocab_size=len(tokenizer))))
    card = {"license": "mit", "training": "One epoch.", "limits": "Made-up words only."}
    save_for_hub(model, folder / "net", tokenizer=tokenizer, **card)
    write_search(folder / "net" / "search", model)
    space = SearchSpace.from_model(model)
    budgets = [space.num_parameters([20, 36, 36]), space.num_parameters([36, 36, 48])]
    options = [
        "--model",
        folder / "net",
        "--max_cost",
        *budgets,
        budgets[0] + 1,
        "--name",
        "user/net",
        "--exports",
        "none",
    ]
    return SimpleNamespace(folder=folder, budgets=budgets, options=[str(option) for option in options])


@pytest.fixture(scope="module")
def family(script, written, tmp_path_factory):
    """The folder of a family that was not published yet."""
    folder = tmp_path_factory.mktemp("written") / "family"
    assert script.main([*written.options, "--output_dir", str(folder), "--dry_run"]) == 0
    return folder


def test_limits_of_the_supernet_hold_for_every_model_of_the_family(family):
    models = [path for path in family.iterdir() if (path / "model.safetensors").exists()]
    assert len(models) == 3
    for model in models:
        assert "## Limits\n\nMade-up words only.\n" in (model / "README.md").read_text(encoding="utf-8")


def test_supernet_of_a_sentence_encoder_keeps_its_masked_lm_head_and_subnets_have_none(script, written, tmp_path):
    net = tmp_path / "net"
    model = SuperShaperForMaskedLM.from_pretrained(written.folder / "net")
    tokenizer = BertTokenizer.from_pretrained(written.folder / "net")
    save_for_hub(model, net, tokenizer=tokenizer, pooling="mean")
    write_search(net / "search", model, distance_record)
    options = [
        "--model",
        net,
        "--max_cost",
        model.config.hidden_size * 10**6,
        "--name",
        "user/net",
        "--exports",
        "none",
    ]
    output = tmp_path / "family"
    assert script.main([*map(str, options), "--output_dir", str(output), "--dry_run"]) == 0
    published = SuperShaperForMaskedLM.from_pretrained(output / "net")
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in published.state_dict().items())
    (subnet,) = (path.parent for path in output.glob("net-*/model.safetensors"))
    assert any(name.startswith("cls.") for name in load_file(output / "net" / "model.safetensors"))
    assert not any(name.startswith("cls.") for name in load_file(subnet / "model.safetensors"))
    assert read_sentence_encoder(str(subnet))["pooling"] == read_sentence_encoder(str(output / "net"))["pooling"]


@pytest.fixture
def copied(family, tmp_path):
    """A copy of this folder, which a test may change."""
    return shutil.copytree(family, tmp_path / "family")


def publish(script, written, folder, *options):
    assert script.main([*written.options, "--output_dir", str(folder), *options]) == 0


def names(folder):
    """The repositories of the family in `folder`, as the server calls them."""
    members = [path.name for path in folder.iterdir() if path.is_dir()]
    prefix = {"net-search": "datasets/", "net-explorer": "spaces/"}
    return {f"{prefix.get(name, '')}user/{name}": name for name in members}


def check_published(server, folder):
    """Every repository is complete and has one commit; the collection names each once."""
    assert server.repos.keys() == names(folder).keys()
    for repo_id, name in names(folder).items():
        assert len(titles(server, repo_id)) == 2
        assert files(server, repo_id) == contents(folder / name)
    (collection,) = server.collections.values()
    found = [(item["type"], item["id"]) for item in collection["items"]]
    assert len(found) == len(set(found)) == len(names(folder)) == 5
    assert found[0] == ("model", "user/net")
    assert found[-2:] == [("dataset", "user/net-search"), ("space", "user/net-explorer")]


def check_nothing_half(server, folder):
    """Every repository is complete or empty, and no collection names one that is empty."""
    for repo_id, repo in server.repos.items():
        published, empty = files(server, repo_id), {"README.md": SPACE_CARD} if repo_id.startswith("spaces/") else {}
        assert published in (empty, contents(folder / names(folder)[repo_id])), repo_id
        assert len(repo.commits) <= 2
    for collection in server.collections.values():
        assert all(len(titles(server, repo_id)) == 2 for repo_id in names(folder))
        assert len({item["id"] for item in collection["items"]}) == len(collection["items"])


def test_family_is_published_and_read_back(script, written, copied, server, tmp_path, monkeypatch, capsys):
    publish(script, written, copied)
    check_published(server, copied)
    collection = HfApi().get_collection(next(iter(server.collections)))
    assert collection.url in capsys.readouterr().out
    assert not collection.private
    # The subnets: those of the front, cut out of the supernet, whose cards name it.
    findings = Findings.read(written.folder / "net" / "search")
    best = [findings.front("parameters").best(budget) for budget in sorted(written.budgets, reverse=True)]
    for item, shape in zip(collection.items[1:3], best, strict=True):
        subnet = AutoModelForMaskedLM.from_pretrained(item.item_id)
        assert subnet.config.hidden_sizes == shape
        assert str(shape) in item.note
        cut = extract_from_folder(written.folder / "net", shape, tmp_path / item.item_id)
        assert (cut / "model.safetensors").read_bytes() == files(server, item.item_id)["model.safetensors"]
        card = ModelCard.load(item.item_id)
        assert (card.data.base_model, card.data.license) == ("user/net", "mit")
        assert "> One epoch." in card.text
        assert "- [`user/net-search`](https://huggingface.co/datasets/user/net-search): 24 measured" in card.text
        assert item.item_id not in card.text.split("## Related repositories")[1]
    # The supernet
    card = ModelCard.load("user/net")
    assert card.text.count("| [") >= 4  # rows of the front
    assert "One epoch." in card.text
    # The page, which begins with the first budget and names the published supernet
    page = files(server, "spaces/user/net-explorer")
    assert page.keys() == {"index.html", "README.md"}
    budget = float(written.budgets[0])
    assert page["index.html"].decode() == explorer_page(findings, "parameters", [budget], "user/net")
    space = SpaceCard(page["README.md"].decode()).data
    assert (space.sdk, space.datasets) == ("static", ["user/net-search"])
    assert space.models == ["user/net", *(item.item_id for item in collection.items[1:3])]
    # The data set
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    card = files(server, "datasets/user/net-search")["README.md"].decode()
    assert 'load_dataset("user/net-search", split="train")' in card
    assert "\nbase_model: user/net\n" in card
    records = read_records(written.folder / "net" / "search" / "records.jsonl")
    assert load_dataset("user/net-search", split="train")["shape"] == [record["shape"] for record in records]


def test_second_run_publishes_nothing_twice(script, written, copied, server):
    publish(script, written, copied)
    before = contents(copied)
    publish(script, written, copied)
    check_published(server, copied)
    assert contents(copied) == before


def test_options_reach_the_hub(script, written, copied, server, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    publish(script, written, copied, "--private", "--token", server.token)
    assert all(repo.private for repo in server.repos.values())
    assert all(collection["private"] for collection in server.collections.values())
    assert server.token not in "".join(capfd.readouterr())
    assert not any(server.token.encode() in content for content in contents(copied).values())


REQUESTS = [
    ("POST", "/api/repos/create"),
    ("POST", "/net/preupload/"),
    ("POST", "/net/commit/"),
    ("PUT", "/lfs/user/net-"),
    ("POST", "/datasets/user/net-search/commit/"),
    ("POST", "/spaces/user/net-explorer/commit/"),
    ("POST", "/api/collections"),
    ("POST", "/items"),
]


@pytest.mark.parametrize(("method", "path"), REQUESTS)
def test_failing_hub_leaves_nothing_half_and_the_same_command_continues(method, path, script, written, copied, server):
    server.fail_next(method, path, status=500)
    with pytest.raises(ConnectionError, match="status 500"):
        publish(script, written, copied)
    check_nothing_half(server, copied)
    publish(script, written, copied)
    check_published(server, copied)


def run_elsewhere(endpoint, token, cache, options):
    with point_client_at(SimpleNamespace(endpoint=endpoint, token=token), cache):
        load_script().main(options)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/lfs/objects/batch"), ("POST", "/net/commit/"), ("POST", "net-search/commit/"), ("POST", "/items")],
)
def test_killed_run_leaves_nothing_half_and_the_same_command_continues(method, path, script, written, copied, tmp_path):
    """It is killed when the Hub has dealt with a request, before it hears of it."""
    with HubServer() as server:
        server.hold_next(method, path)
        options = [*written.options, "--output_dir", str(copied)]
        (process,) = fork(0, run_elsewhere, server.endpoint, server.token, str(tmp_path / "cache"), options)
        assert server.held.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        check_nothing_half(server, copied)
        with point_client_at(server, tmp_path / "cache"):
            publish(script, written, copied)
        check_published(server, copied)


def test_run_that_is_interrupted_while_it_writes_continues(script, written, family, tmp_path, monkeypatch):
    """What is written already is not written again."""
    folder, write = tmp_path / "family", script.write_family.__globals__["write_subnet"]
    calls = []

    def interrupt(source, shape, target, **options):
        calls.append(target.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(source, shape, target, **options)

    monkeypatch.setitem(script.write_family.__globals__, "write_subnet", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(script, written, folder, "--dry_run")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    time.sleep(0.01)
    publish(script, written, folder, "--dry_run")
    assert len(calls) == 3
    assert calls[1] == calls[2]
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert contents(folder) == contents(family)


def test_folder_with_other_files_is_refused(script, written, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="holds other files, and no family"):
        publish(script, written, tmp_path, "--dry_run")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["mine"]


def test_other_options_are_refused_in_the_same_folder(script, written, copied):
    with pytest.raises(ValueError, match=r"holds another family: options differ from those in family\.json"):
        publish(script, written, copied, "--dry_run", "--license", "apache-2.0")
    with pytest.raises(ValueError, match=r"holds another family: members, budgets differ"):
        publish(script, written, copied, "--dry_run", "--max_cost", "1e9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model is missing"),
        (["--model", "a", "--name", "net", "--output_dir", "b", "--max_cost", "9"], "--name net must be user/name"),
        (["--model", "a", "--name", "user/..", "--output_dir", "b", "--max_cost", "9"], "Repo id must"),
        (["--model", "a", "--name", "u/n", "--output_dir", "b", "--max_cost", "0"], "--max_cost"),
    ],
)
def test_wrong_options_are_refused(options, message, script, capsys):
    with pytest.raises(SystemExit):
        script.main(options)
    assert message in capsys.readouterr().err


def test_what_is_no_searched_supernet_is_refused(script, written, tmp_path):
    extract_from_folder(written.folder / "net", [20, 20, 20], tmp_path / "cut")
    options = ["--max_cost", "9", "--name", "user/net", "--output_dir", str(tmp_path / "family")]
    with pytest.raises(SystemExit, match="has no folder search"):
        script.main(["--model", str(tmp_path / "cut"), *options])
    with pytest.raises(ValueError, match="max_cost=9"):
        script.main(["--model", str(written.folder / "net"), *options])


def test_token_is_not_shown_with_the_options(script):
    args = script.FamilyArguments(model="a", name="u/n", output_dir="b", max_cost=[9.0], token="hf_secret")
    assert "hf_secret" not in repr(args)
