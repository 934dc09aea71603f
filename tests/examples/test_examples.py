"""The quickstart as a user runs it, with budgets so small that its models learn next to nothing."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import randomize, tiny_bert_config
from texts import random_documents
from transformers import AutoModelForMaskedLM, BertModel

from supershaper_hf.search.predictor import ShapePredictor


QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"
BUDGET = ["--bert_steps=2", "--super_steps=2", "--subnet_steps=2", "--shapes=30"]
BUILT_IN = ["subnet equals supernet", "counted parameters", "loads without the package"]  # true without training


def quickstart(*arguments):
    command = [sys.executable, str(QUICKSTART), *BUDGET, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def claims(output):
    """The printed claims and whether they hold."""
    return {claim: verdict == "yes" for verdict, claim in re.findall(r"^(yes|NO )  (.+)$", output, re.MULTILINE)}


def table(output):
    """The printed table, from its heading to the empty line after it."""
    return re.search(r"^name  .+?\n\s*\n", output, re.MULTILINE | re.DOTALL).group()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "documents.txt"
    file.write_text("\n".join(random_documents(60)["text"]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def first_run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "output"
    return quickstart("--text", text, "--output_dir", folder), folder


def test_every_file_is_written(first_run):
    _, folder = first_run
    assert {path.name for path in folder.iterdir()} == {"pareto.png", "search", "subnet", "supernet"}
    searched = {path.name for path in (folder / "search").iterdir()}
    assert {"records.jsonl", "predictor.json", "report.md", "front.csv", "front_parameters.png"} <= searched
    for model in ("supernet", "subnet"):
        stored = {path.name for path in (folder / model).iterdir()}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_supershaper.py"} <= stored


def test_saved_subnet_and_predictor_load(first_run):
    _, folder = first_run
    subnet = AutoModelForMaskedLM.from_pretrained(folder / "subnet")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*predicted poorly")  # two steps of training: no shape differs from another
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


def test_same_seed_prints_the_same_table(first_run, text, tmp_path):
    again = quickstart("--text", text, "--output_dir", tmp_path / "output")
    assert table(again.stdout) == table(first_run[0].stdout)


def test_occupied_output_folder_is_refused_and_left_alone(text, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    result = quickstart("--text", text, "--output_dir", tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path} exists and is not an empty folder. Choose another one" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_bert_without_a_head_gets_one(text, tokenizer, tmp_path):
    bert = BertModel(tiny_bert_config(vocab_size=len(tokenizer), max_position_embeddings=64))
    randomize(bert).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    result = quickstart("--bert", tmp_path / "bert", "--text", text, "--output_dir", tmp_path / "output")
    assert "has no masked-LM head: training one first" in result.stdout
    held = [claim for claim, holds in claims(result.stdout).items() if holds]
    assert all(any(claim.startswith(start) for claim in held) for start in BUILT_IN), result.stderr
