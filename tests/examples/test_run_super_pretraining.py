"""examples/run_super_pretraining.py: options from flags and YAML, where models come from, how runs continue."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_same, randomize, tiny_bert_config, tiny_model
from hub_server import HubServer
from texts import random_documents
from transformers import AutoModelForMaskedLM, BertForMaskedLM, BertModel

from supershaper_hf import SuperShaperForMaskedLM


SCRIPT = Path(__file__).parents[2] / "examples" / "run_super_pretraining.py"
STEPS = ["--max_steps=2", "--per_device_train_batch_size=4", "--max_length=12", "--logging_steps=1"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_super_pretraining", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bert(tokenizer, tmp_path):
    folder = tmp_path / "bert"
    randomize(BertForMaskedLM(tiny_bert_config(vocab_size=len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "documents.txt"
    file.write_text("\n".join(random_documents(40, words=20)["text"]))
    return file


@pytest.fixture
def run(script, text, tmp_path, monkeypatch, capsys):
    """Run the script in this process; return what it prints and its output folder."""

    def run(*arguments, output="output"):
        folder = tmp_path / output
        flags = [*map(str, arguments), *STEPS, f"--train_files={text}", f"--output_dir={folder}"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
        assert script.main() == 0
        return capsys.readouterr().out, folder

    return run


def summary(folder):
    return json.loads((folder / "training_summary.json").read_text())


def weights(folder):
    return SuperShaperForMaskedLM.from_pretrained(folder / "last").state_dict()


# Options


def parse(script, *argv):
    return script.parse_arguments(["--bert=b", "--train_files", "a.txt", "c.txt", "--output_dir=o", *argv])


def test_flags_reach_both_sets_of_options(script):
    options, args = parse(script, "--reorder", "--shape", "8", "0", "36", "--sampling=fixed")
    assert (options.bert, options.train_files, options.reorder) == ("b", ["a.txt", "c.txt"], True)
    assert (args.output_dir, args.shape, args.sampling) == ("o", [8, 0, 36], "fixed")


def test_yaml_holds_the_same_options_and_flags_change_them(script, tmp_path):
    file = tmp_path / "run.yaml"
    options = {"bert": "b", "train_files": ["a.txt"], "output_dir": "o", "learning_rate": 1e-3, "reorder": True}
    file.write_text(yaml.safe_dump(options | {"width_choices": [8, 48], "max_steps": 7}))
    options, args = script.parse_arguments([str(file), "--max_steps=9"])
    assert (options.bert, options.train_files, options.width_choices, options.reorder) == (
        "b",
        ["a.txt"],
        [8, 48],
        True,
    )
    assert (args.output_dir, args.learning_rate, args.max_steps) == ("o", 1e-3, 9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model=m"], "Give exactly one of --bert and --model."),
        (["--streaming", "--reorder"], "--reorder measures importance on stored text"),
        (["--unknown=1"], "unknown"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(script, capsys, argv, message):
    with pytest.raises((SystemExit, ValueError)) as refusal:
        parse(script, *argv)
    assert message in capsys.readouterr().err + str(refusal.value)


@pytest.mark.parametrize("missing", ["train_files", "output_dir"])
def test_missing_option_is_named(script, capsys, missing):
    given = [f"--{name}=x" for name in ("bert", "train_files", "output_dir") if name != missing]
    with pytest.raises(SystemExit):
        script.parse_arguments(given)
    assert f"--{missing} is missing" in capsys.readouterr().err


def test_unknown_option_in_yaml_is_named(script, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("learning_rte: 1")
    with pytest.raises(SystemExit):
        script.parse_arguments([str(tmp_path / "run.yaml")])
    assert re.search(r"unknown option\(s\) learning_rte. Allowed: .*learning_rate", capsys.readouterr().err)


# Runs


def test_supernet_of_a_bert_is_trained_and_saved(run, bert):
    printed, folder = run("--bert", bert, "--width_choices", "8", "48", "--head_slicing=per_head")
    assert printed.endswith(f"finished after step 2: {folder}\n")
    supernet = AutoModelForMaskedLM.from_pretrained(folder / "last")
    assert supernet.config.width_choices == [8, 48]
    assert supernet.config.head_slicing == "per_head"
    assert summary(folder)["evaluation"].keys() >= {"largest", "smallest"}


def test_finished_run_is_not_trained_again(run, bert):
    _, folder = run("--bert", bert)
    before, records = weights(folder), (folder / "metrics.jsonl").read_text()
    run("--bert", bert)
    assert_same(weights(folder), before, atol=0)
    assert (folder / "metrics.jsonl").read_text() == records


def test_supernet_goes_on_with_its_bottlenecks(run, bert):
    _, first = run("--bert", bert)
    _, second = run("--model", first / "last", "--learning_rate=1e-12", output="second")
    assert_same(weights(second), weights(first), atol=1e-6)
    bottleneck = weights(second)["bert.encoder.input_bottleneck.0.weight"]
    assert not torch.equal(bottleneck, torch.eye(len(bottleneck)))


@pytest.fixture
def subnet(tokenizer, tmp_path):
    folder = tmp_path / "subnet"
    tiny_model(vocab_size=len(tokenizer)).extract_subnet([8, 0, 36]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_subnet_goes_on_with_its_shape(run, subnet):
    _, folder = run("--model", subnet, "--sampling=fixed")
    assert AutoModelForMaskedLM.from_pretrained(folder / "last").config.hidden_sizes == [8, 36]
    assert list(summary(folder)["evaluation"]) == ["model"]


def test_subnet_needs_fixed_sampling(run, subnet):
    with pytest.raises(ValueError, match="is a subnet, which has one shape only: add --sampling fixed"):
        run("--model", subnet)


def test_bert_given_as_model_is_refused(run, bert):
    with pytest.raises(ValueError, match=f"is a bert model. For a BERT, use --bert {bert}"):
        run("--model", bert)


def test_baseline_of_equal_compute(run, bert):
    _, first = run("--bert", bert)
    arguments = ("--bert", bert, "--sampling=fixed", "--shape", "8", "8", "8", "--match_compute")
    _, second = run(*arguments, first / "training_summary.json", output="second")
    assert summary(second)["step"] > 2
    assert summary(second)["flops"] == pytest.approx(summary(first)["flops"], rel=0.15)


def test_streaming_trains_without_storing_the_text(run, bert, text):
    _, folder = run("--bert", bert, "--streaming", f"--validation_files={text}", "--max_eval_sequences=5")
    assert summary(folder)["sequences"] == 8
    assert "largest" in summary(folder)["evaluation"]


def test_outside_teacher_and_ordered_channels(run, bert):
    _, folder = run("--bert", bert, "--teacher", bert, "--teacher_weight=1", "--reorder")
    assert summary(folder)["arguments"]["teacher_weight"] == 1.0


def test_missing_head_is_trained_first_with_the_encoder_frozen(script, run, tokenizer, tmp_path, monkeypatch):
    randomize(BertModel(tiny_bert_config(vocab_size=len(tokenizer)))).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    runs = []

    def record(model, *args, description="", **kwargs):
        runs.append((description, {name for name, p in model.named_parameters() if p.requires_grad}))
        return super_pretrain(model, *args, **kwargs)

    super_pretrain = script.super_pretrain
    monkeypatch.setattr(script, "super_pretrain", record)
    run("--bert", tmp_path / "bare", "--head_steps=1")
    (first, trained), (_, all_of_it) = runs
    assert first == "Head only"
    assert trained == {name for name in all_of_it if name.startswith("cls.") and "decoder.weight" not in name}


def test_last_model_is_published(script, bert, text, tmp_path):
    """In a fresh process: the client of the Hub reads its address when it is imported."""
    with HubServer() as server:
        server.tokens |= {"hf_writer": "lab"}
        flags = ["--bert", bert, *STEPS, "--train_files", text, "--output_dir", tmp_path / "output"]
        command = [sys.executable, SCRIPT, *flags, "--push_to_hub=lab/supernet"]
        environment = os.environ | server.environment(tmp_path / "cache") | {"HF_TOKEN": "hf_writer"}
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        card = server.repos["lab/supernet"].files()["README.md"].decode()
    assert 'from_pretrained("lab/supernet"' in card
    assert "Masked language modelling, the largest shape, the smallest and 1 random one(s) per step." in card


def test_accelerate_launches_it(bert, text, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", SCRIPT]
    flags = ["--bert", bert, *STEPS, "--train_files", text, "--output_dir", tmp_path / "output"]
    done = subprocess.run([*map(str, [*launcher, *flags])], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "finished after step 2" in done.stdout
