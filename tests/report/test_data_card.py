"""The folder of a search loads with one plain `load_dataset` call, here and from the Hub."""

import datasets
import pytest
from conftest import tiny_model
from datasets import load_dataset
from publishing import contents, files
from search_folders import write_search

from supershaper_hf import SearchSpace, push_folder
from supershaper_hf.report.data_card import MARK, write_data_card
from supershaper_hf.report.findings import RECORDS_FILE
from supershaper_hf.search.records import read_records


pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return write_search(tmp_path_factory.mktemp("parent") / "search")


def check_loaded(name, searched):
    """Load a folder or a data set of the Hub in one plain call, and compare it with the records and the front."""
    loaded = load_dataset(name)
    assert list(loaded) == ["train"]
    assert loaded["train"].column_names == ["shape", "loss", "perplexity", "accuracy", "parameters"]
    space = SearchSpace.from_config(tiny_model().config)
    assert loaded["train"].to_list() == [
        record | {"parameters": space.num_parameters(record["shape"])}
        for record in read_records(searched / RECORDS_FILE)
    ]
    front = load_dataset(name, "front", split="train")
    assert [space.num_parameters(row["shape"]) for row in front] == front["parameters"]
    assert front["predicted_loss"] == sorted(front["predicted_loss"], reverse=True)
    assert set(front["latency"]) == {None}


def test_folder_of_a_search_loads(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert {file.suffix for file in searched.iterdir()} >= {".png", ".jsonl", ".csv", ".json"}  # none is in the way
    check_loaded(str(searched), searched)


def test_published_search_loads(searched, server, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    push_folder(searched, "user/name-search", repo_type="dataset")
    assert files(server, "datasets/user/name-search") == contents(searched)
    check_loaded("user/name-search", searched)


def test_code_in_the_card_loads_the_named_data_set(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    card = write_data_card(searched, 'a"b\n', supernet="user/net: {{ x }}").read_text()
    assert 'load_dataset("a\\"b\\n", split="train")' in card
    monkeypatch.chdir(searched.parent)
    data = write_data_card(searched)
    code = data.read_text().split("```python\n")[1].split("```")[0]
    variables = {}
    exec(code, variables)
    assert len(variables["records"]) == 24


def test_a_readme_of_somebody_else_stays(searched):
    card = searched / "README.md"
    mine = "# Mine\n"
    before = card.read_text()
    assert MARK in before
    card.write_text(mine)
    write_data_card(searched)
    assert card.read_text() == mine
    card.write_text(before.replace("24", "23"))
    write_data_card(searched)
    assert card.read_text() == before
