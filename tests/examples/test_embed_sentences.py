"""The example that cuts a sentence encoder for a budget out of a supernet which has its search beside it."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_config
from search_folders import distance_record, write_search
from sentence_transformers import SentenceTransformer

from supershaper_hf import SearchSpace, SuperShaperModel, save_for_hub
from supershaper_hf.publish.subnet import Source, read_search


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RELEASED = ROOT / "checkpoints" / "supershaper-minilm-l6"
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


# The released supernet


def test_released_supernet_gives_what_the_readme_shows(script, tmp_path, capsys):
    """Cosines may differ in the last digit on another processor."""
    assert script.main(["--output_dir", str(tmp_path / "encoder")]) == 0
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(1  A man is playing.*?)```", README, re.DOTALL)
    number = re.compile(r"(?<= )-?0\.\d+")
    assert number.sub("", printed).split("\n")[:-2] == number.sub("", shown).split("\n")[:-1]
    cosines = [[float(value) for value in number.findall(text)] for text in (printed, shown)]
    assert len(cosines[0]) == 30
    assert cosines[0] == pytest.approx(cosines[1], abs=0.011)
    library, own = (
        SentenceTransformer(str(tmp_path / "encoder")),
        SuperShaperModel.from_pretrained(tmp_path / "encoder"),
    )
    assert sum(parameter.numel() for parameter in library.parameters()) == own.num_parameters()


def test_released_folder_is_small_and_its_search_is_that_of_its_weights():
    assert sum(file.stat().st_size for file in RELEASED.rglob("*") if file.is_file()) <= 60e6
    source = Source.load(str(RELEASED))
    assert source.model.dtype == torch.bfloat16
    findings = read_search(source, RELEASED / "search")  # which refuses a search of other weights
    assert findings is not None
    assert len(findings.records) >= 200
