"""The quickstart as a user runs it, with budgets so small that its models learn next to nothing."""

import contextlib
import importlib
import io
import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import randomize, tiny_bert_config
from texts import random_documents
from transformers import AutoModelForMaskedLM, BertModel

from supershaper_hf.search.predictor import ShapePredictor


EXAMPLES = Path(__file__).parents[2] / "examples"
BUDGET = ["--bert_steps=2", "--super_steps=2", "--subnet_steps=2", "--num_shapes=30"]
BUILT_IN = ["subnet equals supernet", "counted parameters", "loads without the package"]  # true without training
# After two steps of training no shape differs from another.
pytestmark = pytest.mark.filterwarnings("ignore:.*predict.*poorly")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # where Python looks when it runs the script
        return importlib.import_module("quickstart")


@pytest.fixture(scope="module")
def quickstart(script):
    """Run the quickstart in this process; return its exit status and what it prints."""

    def run(*arguments):
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", ["quickstart.py", *BUDGET, *map(str, arguments)])
            status = script.main()
        return SimpleNamespace(returncode=status, stdout=printed.getvalue())

    return run


def claims(output):
    """The printed claims and whether they hold."""
    return {claim: verdict == "yes" for verdict, claim in re.findall(r"^(yes|NO )  (.+)$", output, re.MULTILINE)}


def table(output):
    """The printed table, from its heading to the empty line after it."""
    return re.search(r"^name  .+?\n\s*\n", output, re.MULTILINE | re.DOTALL).group().rstrip()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "documents.txt"
    file.write_text("\n".join(random_documents(60)["text"]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def first_run(quickstart, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "output"
    with warnings.catch_warnings():  # the mark above is for tests, not for fixtures of a module
        warnings.filterwarnings("ignore", ".*predict.*poorly")
        return quickstart("--text", text, "--output_dir", folder), folder


def test_every_file_is_written(first_run):
    _, folder = first_run
    assert {path.name for path in folder.iterdir()} == {"pareto.png", "search", "subnet", "supernet"}
    searched = {path.name for path in (folder / "search").iterdir()}
    assert {
        "records.jsonl",
        "predictor.json",
        "report.md",
        "front.csv",
        "front_parameters.png",
        "explorer.html",
    } <= searched
    page = (folder / "search" / "explorer.html").read_text()
    assert json.dumps(f'supernet = "{folder / "supernet"}"')[1:-1] in page
    for model in ("supernet", "subnet"):
        stored = {path.name for path in (folder / model).iterdir()}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_supershaper.py"} <= stored


def test_saved_subnet_and_predictor_load(first_run):
    _, folder = first_run
    subnet = AutoModelForMaskedLM.from_pretrained(folder / "subnet")
    predictor = ShapePredictor.load(folder / "search" / "predictor.json")
    assert set(subnet.config.hidden_sizes) <= set(predictor.width_choices)


def test_claims_that_need_no_training_hold(first_run):
    result, _ = first_run
    held = [claim for claim, holds in claims(result.stdout).items() if holds]
    assert all(any(claim.startswith(start) for claim in held) for start in BUILT_IN), result.stderr


def test_exit_status_tells_whether_every_claim_holds(first_run):
    result, _ = first_run
    verdicts = claims(result.stdout)
    assert len(verdicts) >= len(BUILT_IN) + 2
    assert result.returncode == (0 if all(verdicts.values()) else 1)


def test_same_seed_prints_the_same_table(quickstart, script, first_run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "loads_without_package", lambda *_: True)  # 10 seconds, and not what this is about
    torch.manual_seed(7)
    again = quickstart("--text", text, "--output_dir", tmp_path / "output")
    assert table(again.stdout) == table(first_run[0].stdout)


def test_claim_that_does_not_hold_is_printed_and_changes_the_exit_status(script, capsys):
    assert not script.print_claims({"first": True, "second": False})
    assert claims(capsys.readouterr().out) == {"first": True, "second": False}
    assert script.print_claims({"first": True})


def test_occupied_output_folder_is_refused_and_left_alone(quickstart, text, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        quickstart("--text", text, "--output_dir", tmp_path)
    # Python prints a message to the error stream and exits with status 1.
    assert stop.value.code.startswith(f"{tmp_path} exists and is not an empty folder. Choose another one")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "least"), [("bert_steps", 1), ("super_steps", 1), ("subnet_steps", 1), ("num_shapes", 8)]
)
def test_number_that_is_too_small_is_refused_at_once(quickstart, capsys, tmp_path, name, least):
    with pytest.raises(SystemExit):
        quickstart(f"--{name}={least - 1}", "--output_dir", tmp_path / "output")
    assert f"--{name} {least - 1} is too small: use at least {least}." in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_bert_without_a_head_gets_one(quickstart, text, tokenizer, tmp_path):
    bert = BertModel(tiny_bert_config(vocab_size=len(tokenizer), max_position_embeddings=64))
    randomize(bert).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    result = quickstart("--bert", tmp_path / "bert", "--text", text, "--output_dir", tmp_path / "output")
    assert "has no masked-LM head: training one first" in result.stdout
    held = [claim for claim, holds in claims(result.stdout).items() if holds]
    assert all(any(claim.startswith(start) for claim in held) for start in BUILT_IN), result.stdout


@pytest.mark.parametrize("phase", ["1 BERT", "2 Supernet", "5 Subnet"])
def test_interrupted_phase_ends_the_quickstart(quickstart, script, text, tmp_path, monkeypatch, phase):
    """Ctrl-C in a phase of training ends that phase only, unless its caller looks at the status."""
    phases = []

    def train(*args, description):
        phases.append(description)
        return SimpleNamespace(status="interrupted" if description == phase else "finished")

    monkeypatch.setattr(script, "super_pretrain", train)
    with pytest.raises(SystemExit, match=f"Interrupted during '{phase}'. The quickstart cannot continue from here"):
        quickstart("--text", text, "--output_dir", tmp_path / "output")
    assert phases[-1] == phase
    assert not (tmp_path / "output" / "subnet").exists()


def test_heads_of_the_small_bert_look_at_their_neighbours(script, tokenizer):
    """The first two layers attend mostly to the token 1 or 2 to the left or right of each."""
    bert = script.make_bert(tokenizer).eval()
    bert.set_attn_implementation("eager")
    attentions = bert(torch.arange(20).unsqueeze(0) % len(tokenizer), output_attentions=True).attentions
    inner = range(2, 18)
    for head, offset in enumerate((-1, 1, -2, 2)):
        favourites = attentions[0][0, head].argmax(dim=-1)
        share = sum(favourites[token].item() == token + offset for token in inner) / len(inner)
        assert share > 0.5
