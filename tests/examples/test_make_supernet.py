"""The script that makes a supernet of any BERT, in this process, on tiny models."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same, randomize, tiny_bert_config
from safetensors.torch import load_file
from texts import random_documents
from transformers import AutoConfig, AutoModel, BertForMaskedLM, BertModel

from supershaper_hf import SuperShaperForMaskedLM, SuperShaperModel, read_records, read_sentence_encoder
from supershaper_hf.files import read_json


SCRIPT = Path(__file__).parents[2] / "examples" / "make_supernet.py"
SMALL = ["--max_length=12", "--per_device_train_batch_size=4", "--calibration_tokens=100", "--learning_rate=1e-3"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_supernet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[BertModel, BertForMaskedLM], ids=["encoder", "with a head"])
def bert(request, tokenizer, tmp_path):
    folder = tmp_path / "bert"
    randomize(request.param(tiny_bert_config(vocab_size=len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(script, tmp_path, monkeypatch, capsys):
    file = tmp_path / "documents.txt"
    file.write_text("\n".join(random_documents(40, words=20)["text"]))

    def run(bert, *arguments, output="output"):
        folder = tmp_path / output
        flags = [f"--bert={bert}", f"--text={file}", f"--output_dir={folder}", *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
        assert script.main() == 0
        return capsys.readouterr().out, folder

    return run


def distances(printed):
    """The distances in the printed table, by the name of the shape."""
    lines = re.findall(r"^(every layer \d+|mean of 20 random) +[\d,]+ +([\d.]+)", printed, flags=re.MULTILINE)
    return {name: float(distance) for name, distance in lines}


def test_any_bert_becomes_a_trained_supernet(run, bert):
    printed, folder = run(bert, "--max_steps=3")
    assert re.search(r"Calibrated on 1\d\d tokens in \d+ seconds", printed)
    found = distances(printed)
    assert next(iter(found)) == "every layer 48"
    assert list(found)[-1] == "mean of 20 random"
    assert found["every layer 48"] < 0.1 < found["every layer 8"]
    has_head = AutoConfig.from_pretrained(bert).architectures == ["BertForMaskedLM"]
    config = AutoConfig.from_pretrained(folder / "last")
    assert config.architectures == ["SuperShaperForMaskedLM" if has_head else "SuperShaperModel"]
    assert (config.bottlenecks, config.head_slicing, config.full_head_scale) == ("by_width", "per_head", True)
    assert (folder / "quality.png").stat().st_size > 1000
    assert {tuple(record["shape"]) for record in read_records(folder / "records.jsonl")} >= {(8,) * 3, (48,) * 3}
    subnet = SuperShaperModel.from_pretrained(folder / "last").extract_subnet([8, 20, 36])
    assert subnet(torch.tensor([[2, 5, 3]])).last_hidden_state.isfinite().all()


def test_without_hours_the_supernet_is_only_calibrated(run, bert):
    printed, folder = run(bert, "--hours=0", "--pooling=cls")
    assert distances(printed)["every layer 48"] == 0
    assert not (folder / "last").exists()
    start, original = SuperShaperModel.from_pretrained(folder / "start"), AutoModel.from_pretrained(bert).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    assert_same(start(ids).last_hidden_state, original(ids).last_hidden_state, atol=1e-4)


def test_hours_become_steps_once(run, bert, monkeypatch, script):
    """The plan of the first start holds for the next ones, so that learning rates do not change."""
    monkeypatch.setattr(script, "TIMED_STEPS", 2)
    printed, folder = run(bert, "--hours=1e-9", "--pooling=cls")
    assert "1e-09 hours are 1 steps." in printed
    assert read_json(folder / "plan.json", script.PLAN_FORMAT) == {"max_steps": 1, "hours": 1e-9}
    assert read_sentence_encoder(folder / "last")["pooling"] == "cls"
    printed, _ = run(bert, "--hours=5")
    assert "hours are" not in printed
    assert "Calibrated" not in printed


def test_shared_weights_at_rate_0_leave_the_largest_shape_as_it_is(run, bert):
    _, folder = run(bert, "--max_steps=2", "--shared_learning_rate_scale=0")
    [start, last] = (load_file(folder / name / "model.safetensors") for name in ("start", "last"))
    moved = {name for name in start if not torch.equal(start[name], last[name])}
    assert moved
    assert all("by_width" in name for name in moved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=t", "--output_dir=o"], "--bert is missing"),
        (["--bert=b", "--output_dir=o"], "--text is missing"),
        (["--bert=b", "--text=t"], "--output_dir is missing"),
        (["--hours=-1"], "hours=-1.0 must be a finite number at least 0"),
        (["--max_steps=0"], "max_steps=0 must be an integer of at least 1"),
        (["--pooling=max"], "pooling='max' is unknown. Allowed: 'mean', 'cls'."),
        (["--learning_rate=0"], "learning_rate=0.0 must be a finite number above 0."),
    ],
)
def test_wrong_options_are_refused(script, flags, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(flags)
    assert message in capsys.readouterr().err


def test_head_of_the_bert_stays(run, tokenizer, tmp_path):
    folder = tmp_path / "bert"
    original = randomize(BertForMaskedLM(tiny_bert_config(vocab_size=len(tokenizer))))
    original.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _, output = run(folder, "--max_steps=1")
    trained = SuperShaperForMaskedLM.from_pretrained(output / "last")
    for name, tensor in original.cls.predictions.transform.state_dict().items():
        assert torch.equal(trained.cls["predictions"].transform.state_dict()[name], tensor)


def test_weights_of_the_losses_reach_the_training(script):
    required = ["--bert=b", "--text=t", "--output_dir=o"]
    assert script.parse_arguments(required).training(1).first_token_weight == 0
    chosen = script.parse_arguments([*required, "--first_token_weight=0.5"]).training(1)
    assert (chosen.state_weight, chosen.pooled_weight, chosen.first_token_weight) == (1.0, 1.0, 0.5)
