"""The example that cuts a sentence encoder for a budget out of a supernet which has its search beside it."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_config
from search_folders import distance_record, write_search

from supershaper_hf import SearchSpace, SuperShaperModel, save_for_hub


EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("embed_sentences")
    sys.modules.pop("embed_sentences")


def test_encoder_within_the_budget_is_compared_with_the_original(script, tokenizer, tmp_path, capsys):
    supernet = randomize(SuperShaperModel(tiny_config(vocab_size=len(tokenizer))))
    folder = save_for_hub(supernet.to(torch.bfloat16), tmp_path / "net", tokenizer=tokenizer, pooling="mean")
    write_search(folder / "search", supernet, distance_record)
    space = SearchSpace.from_model(supernet)
    for budget, equal in ((space.num_parameters(space.largest), True), (space.num_parameters([20, 36, 36]), False)):
        output = tmp_path / str(budget)
        options = {"supernet": folder, "original": folder, "output_dir": output, "max_parameters": budget}
        assert script.main([f"--{name}={value}" for name, value in options.items()]) == 0
        printed = capsys.readouterr().out
        (parameters,) = re.findall(r"subnet: ([\d,]+) parameters", printed)
        subnet = SuperShaperModel.from_pretrained(output)
        assert subnet.dtype == torch.float32
        assert subnet.num_parameters() == int(parameters.replace(",", "")) <= budget
        rows = re.findall(r"^(\d, \d) +(\S+) +(\S+)$", printed, re.MULTILINE)
        assert len(rows) == 15
        assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
        assert all(abs(float(row[1]) - float(row[2])) < 0.02 for row in rows) == equal


def test_folder_without_a_search_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="is no folder of a supernet with its search"):
        script.main(["--supernet", str(tmp_path), "--output_dir", str(tmp_path / "out")])
