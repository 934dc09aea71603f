"""`examples/polish_subnet.py` on a tiny supernet on disk: extract, refit, train, save."""

import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import assert_same, randomize, tiny_bert_config
from safetensors.torch import load_file
from texts import random_documents
from transformers import BertModel

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperModel, read_sentence_encoder, save_for_hub
from supershaper_hf.training import loop


SCRIPT = Path(__file__).parents[2] / "examples" / "polish_subnet.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("polish_subnet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tokenizer, tmp_path, monkeypatch, capsys, no_measured_peak):
    """Run the script in this process on a supernet of a sentence encoder; return what it prints and its folder."""
    bert = randomize(BertModel(tiny_bert_config(vocab_size=len(tokenizer))))
    bert.save_pretrained(tmp_path / "bert")
    supernet = SuperShaperModel.from_bert(bert, width_choices=[8, 20, 36, 48], head_slicing="per_head")
    save_for_hub(supernet, tmp_path / "supernet", tokenizer=tokenizer, pooling="cls", normalize=True)
    (tmp_path / "text.txt").write_text("\n".join(random_documents(60, words=20)["text"]))

    def run(*options, output="output"):
        folder = tmp_path / output
        files = {"supernet": "supernet", "original": "bert", "text": "text.txt", "output_dir": output}
        given = [f"--{name}={tmp_path / file}" for name, file in files.items()]
        small = ["--max_length=12", "--per_device_train_batch_size=8", "--validation_split_percentage=20"]
        monkeypatch.setattr(sys, "argv", ["polish_subnet.py", *given, *small, *options])
        assert script.main() == 0
        return capsys.readouterr().out, folder

    return run


def distances(printed):
    """The distances in the table, by stage."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: float(row[1]) for row in rows if row and row[0] in ("extracted", "refitted", "trained")}


def test_every_stage_is_nearer_to_the_original_and_the_last_is_saved(run):
    printed, folder = run("--shape", "36", "0", "20", "--max_steps=20", "--learning_rate=1e-3")
    assert "[36, 0, 20]: " in printed
    found = distances(printed)
    assert found["trained"] < found["refitted"] < found["extracted"]
    assert SuperShaperModel.from_pretrained(folder / "last").config.hidden_sizes == [36, 20]
    assert read_sentence_encoder(folder / "last") == {"pooling": "cls", "normalize": True, "max_seq_length": 24}


def test_without_steps_the_refitted_subnet_is_saved(run, tmp_path):
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(tmp_path / "supernet"))
    printed, folder = run(f"--max_parameters={space.num_parameters([20, 20, 20])}", "--max_steps=0")
    assert distances(printed).keys() == {"extracted", "refitted"}
    assert SuperShaperModel.from_pretrained(folder / "last").config.hidden_sizes == [20, 20, 20]
    assert read_sentence_encoder(folder / "last")["pooling"] == "cls"


def test_run_that_was_killed_continues(run, monkeypatch):
    options = ["--shape", "36", "0", "20", "--max_steps=4", "--save_steps=1"]
    _, whole = run(*options)
    step, count = loop.sandwich_step, iter(range(9))

    def fail(*arguments):
        if next(count) == 2:
            raise RuntimeError("the power went out")
        return step(*arguments)

    monkeypatch.setattr(loop, "sandwich_step", fail)
    with pytest.raises(RuntimeError, match="the power went out"):
        run(*options, output="second")
    printed, resumed = run(*options, output="second")
    assert next(count) == 5  # two steps before, one that failed, and two after
    assert distances(printed).keys() == {"extracted", "refitted", "trained"}
    assert_same(*(load_file(folder / "last" / "model.safetensors") for folder in (whole, resumed)), atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give either --shape or --max_parameters."),
        (["--shape", "8", "8", "8", "--max_parameters=9"], "Give either --shape or --max_parameters."),
        (["--shape", "8", "8", "8", "--max_steps=-1"], "max_steps=-1"),
        (["--shape", "8", "8", "8", "--output_dir="], "--output_dir is missing"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(run, capsys, options, message):
    with pytest.raises(SystemExit):
        run(*options)
    assert message in capsys.readouterr().err


def test_model_that_is_no_supernet_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="bert is not a supernet"):
        run("--shape", "8", "8", "8", f"--supernet={tmp_path / 'bert'}")
