"""MODEL_CARD.md tells what the released supernet is, and the command writes the card that it promises."""

import json
import re
from pathlib import Path

import pytest
from conftest import randomize, tiny_config, tiny_model
from search_folders import write_search

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM, SuperShaperModel, save_for_hub
from supershaper_hf.publish.__main__ import main
from supershaper_hf.publish.card import megabytes
from supershaper_hf.publish.subnet import Source


ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "checkpoints" / "supershaper-minilm-l6"
CARD = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")


def section(text, title):
    return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def fact(name):
    return re.search(rf"^\| {name} \| (.+) \|$", CARD, re.MULTILINE)[1]


def test_numbers_of_the_card_belong_to_the_released_supernet():
    supernet = SuperShaperModel.from_pretrained(RELEASED)
    assert fact("parameters") == f"{supernet.num_parameters():,}"
    size = (RELEASED / "model.safetensors").stat().st_size
    assert fact("weights on disk") == f"{megabytes(size)}, bfloat16"
    space = SearchSpace.from_model(supernet)
    rows = re.findall(r"^\| ([\d,]+) \| .+ \| (\[[\d, ]+\]) \|$", section(CARD, "Evaluation"), re.MULTILINE)
    assert len(rows) >= 4
    for parameters, shape in rows:
        assert f"{space.num_parameters(json.loads(shape)):,}" == parameters


def test_command_writes_the_card_of_a_supernet(tokenizer, tmp_path, capsys):
    model = randomize(SuperShaperForMaskedLM(tiny_config(vocab_size=len(tokenizer))))
    save_for_hub(model, tmp_path / "net", tokenizer=tokenizer, license="mit", training="One epoch.", limits="None.")
    search = write_search(tmp_path / "search", model)
    main([str(tmp_path / "net"), "--search", str(search), "--repo_id", "user/net"])
    printed = capsys.readouterr().out
    assert "license: mit\n" in printed
    assert "# net\n\nA SuperShaper **supernet**" in printed
    assert section(printed, "Training") == "One epoch."
    assert section(printed, "Limits") == "None."
    assert "| parameters | measured perplexity | predicted perplexity | shape |" in section(printed, "Evaluation")
    (best,) = re.findall(
        r"^subnet = model\.extract_subnet\((\[[\d, ]+\])\)  # the best of its search for", printed, re.MULTILINE
    )
    assert model.extract_subnet(json.loads(best)).num_parameters() < model.num_parameters()
    size = (tmp_path / "net" / "model.safetensors").stat().st_size
    assert f"| weights on disk | {megabytes(size)}, float32 |" in printed
    (tmp_path / "scores.md").write_text("| task | score |\n\n", encoding="utf-8")
    options = ["--search", str(search), "--evaluation", str(tmp_path / "scores.md")]
    main([str(tmp_path / "net"), *options, "--output", str(tmp_path / "CARD.md")])
    assert capsys.readouterr().out == f"{tmp_path / 'CARD.md'}\n"
    card = (tmp_path / "CARD.md").read_text()
    assert card.startswith("---\n")
    assert section(card, "Evaluation") == f"| task | score |\n\n{section(printed, 'Evaluation')}"


def test_what_the_template_says_in_place_of_an_author_is_not_taken_for_the_author(tmp_path):
    model = randomize(SuperShaperForMaskedLM(tiny_config()))
    for limits in (None, "A language model repeats the statistics of its training text. It is weak."):
        folder = save_for_hub(model, tmp_path / str(limits is None), limits=limits)
        assert Source.load(str(folder)).limits == limits
        assert Source.load(str(folder)).training is None


def test_command_says_what_is_wrong(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "net")
    for folder, options, message in (
        ("nothing", [], "nothing is not a folder"),
        ("net", ["--search", str(tmp_path)], "is neither a folder nor a data set"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path / folder), *options])
        assert message in capsys.readouterr().err
