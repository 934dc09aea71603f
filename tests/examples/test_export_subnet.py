"""`examples/export_subnet.py` on tiny models on disk: cut, export, compare, time."""

import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import randomize, tiny_bert_config, tiny_model
from transformers import BertModel

from supershaper_hf import SuperShaperForSequenceClassification, SuperShaperModel, read_sentence_encoder, save_for_hub


SCRIPT = Path(__file__).parents[2] / "examples" / "export_subnet.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("export_subnet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, monkeypatch, capsys):
    """Run the script in this process; return what it prints."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["export_subnet.py", "--repeats=1", *map(str, options)])
        assert script.main() == 0
        return capsys.readouterr().out

    return run


def rows(printed):
    """The lines of the printed table as lists of words, by format."""
    return {words[1]: words for words in map(str.split, printed.splitlines()[2:5])}


def test_subnet_of_a_supernet_is_cut_and_exported(run, tokenizer, tmp_path):
    supernet = tiny_model(SuperShaperModel, vocab_size=len(tokenizer))
    save_for_hub(supernet, tmp_path / "supernet", tokenizer=tokenizer, pooling="cls")
    size = ["--batch_size=3", "--sequence_length=7"]
    printed = run("--model", tmp_path / "supernet", "--shape", 0, 20, 0, "--output_dir", tmp_path / "subnet", *size)
    assert {path.name for path in (tmp_path / "subnet" / "onnx").iterdir()} == {"model.onnx", "model_quantized.onnx"}
    assert SuperShaperModel.from_pretrained(tmp_path / "subnet").config.hidden_sizes == [20]
    assert read_sentence_encoder(tmp_path / "subnet")["pooling"] == "cls"
    table = rows(printed)
    assert list(table) == ["pytorch", "onnx", "int8"]
    assert float(table["onnx"][3]) < 1e-5 < float(table["int8"][3])
    assert 0.99 < float(table["int8"][4]) < 1
    assert all(float(words[-1]) > 0 for words in table.values())
    assert "ms: batch 3 x 7 tokens" in printed
    assert "onnx/model_quantized.onnx: weights=" in printed


def test_folder_of_a_subnet_gets_the_files(script, run, tmp_path, monkeypatch):
    folder = save_for_hub(tiny_model(SuperShaperForSequenceClassification).extract_subnet([0, 20, 0]), tmp_path / "m")
    calls = []
    monkeypatch.setattr(script, "add_exports", lambda *arguments: calls.append(arguments) or [])
    printed = run("--model", folder, "--formats", "onnx")
    assert calls == [(folder, ["onnx"])]
    assert "ms: batch 1 x 24 tokens" in printed  # the longest that the model can read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model is missing"),
        (["--model=m", "--shape", "8", "8", "8"], "--shape and --output_dir go together"),
        (["--model=m", "--repeats=0"], "repeats=0 must be an integer of at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(run, capsys, options, message):
    with pytest.raises(SystemExit):
        run(*options)
    assert message in capsys.readouterr().err


def test_models_of_the_other_kind_are_refused(run, tmp_path):
    save_for_hub(tiny_model(), tmp_path / "supernet")
    with pytest.raises(ValueError, match="supernet is a supernet: give --shape and --output_dir"):
        run("--model", tmp_path / "supernet")
    randomize(BertModel(tiny_bert_config())).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert is not a supernet: leave out --shape and --output_dir"):
        run("--model", tmp_path / "bert", "--shape", 8, 8, 8, "--output_dir", tmp_path / "new")
