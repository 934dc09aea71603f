"""MODEL_CARD.md is what `make model-card` writes, and the command writes the card that it promises."""

import re
import sys
from pathlib import Path

import pytest
from conftest import randomize, tiny_config, tiny_model
from search_folders import write_search

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM, save_for_hub
from supershaper_hf.publish.__main__ import main
from supershaper_hf.publish.card import megabytes, model_card
from supershaper_hf.publish.subnet import Source


ROOT = Path(__file__).parents[2]
CARD = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings("ignore:Shapes left out")


def section(text, title):
    return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def fact(name):
    return re.search(rf"^\| {name} \| (.+) \|$", CARD, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def supernet():
    """A supernet of the sizes of the quickstart's, with other weights."""
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_bert import make_bert

    sys.path.pop(0)
    return SuperShaperForMaskedLM.from_bert(
        make_bert(range(int(fact("vocabulary").replace(",", "")))), head_slicing="per_head"
    )


def test_card_of_the_project_is_in_step_with_its_template(supernet):
    """All of it but what was measured, and the versions of the libraries, is made again here."""
    note = re.search(r"NOTE := (.+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    assert "No supernet has been released yet" in note
    card = str(
        model_card(
            supernet,
            "outputs/quickstart/supernet",
            language="en",
            note=note,
            weight_bytes=round(float(fact("weights on disk").split()[0]) * 1e6),
            training=section(CARD, "Training"),
            evaluation=section(CARD, "Evaluation"),
        )
    )
    made = re.compile(r"^\| made with .*$", re.MULTILINE)
    assert made.sub("", card).rstrip() == made.sub("", CARD).rstrip()


def test_numbers_of_the_card_belong_to_its_supernet(supernet):
    space = SearchSpace.from_model(supernet)
    rows = re.findall(r"^\| ([\d,]+) \| .+ \| (\[[\d, ]+\]) \|$", section(CARD, "Evaluation"), re.MULTILINE)
    assert len(rows) >= 4
    for parameters, shape in rows:
        assert space.num_parameters([int(width) for width in shape.strip("[]").split(",")]) == int(
            parameters.replace(",", "")
        )
    stored = 4 * sum(parameter.numel() for parameter in supernet.parameters())
    assert float(fact("weights on disk").split()[0]) * 1e6 == pytest.approx(stored, rel=0.03)


def test_command_writes_the_card_of_a_supernet(tokenizer, tmp_path, capsys):
    model = randomize(SuperShaperForMaskedLM(tiny_config(vocab_size=len(tokenizer))))
    save_for_hub(model, tmp_path / "net", tokenizer=tokenizer, license="mit", training="One epoch.", limits="None.")
    search = write_search(tmp_path / "search", model)
    main([str(tmp_path / "net"), "--search", str(search), "--repo_id", "user/net", "--note", "Not yet.\n\n# Really"])
    printed = capsys.readouterr().out
    assert "license: mit\n" in printed
    assert "# net\n\n> Not yet.\n>\n> # Really\n\nA SuperShaper **supernet**" in printed
    assert section(printed, "Training") == "One epoch."
    assert section(printed, "Limits") == "None."
    assert "| parameters | measured perplexity | predicted perplexity | shape |" in section(printed, "Evaluation")
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
