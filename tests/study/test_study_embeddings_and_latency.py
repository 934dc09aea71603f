"""Questions 7 and 8: STS and seconds of the compared models, measured once, and the tables made of them."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bert_config
from studies import write_study
from transformers import AutoTokenizer, BertModel

from supershaper_hf.latency.insensitivity import summarize


ROOT = Path(__file__).parents[2]
NAMES = ("compared", "study", "sentence_embeddings", "latency_of_shapes", "latency_answer")


@pytest.fixture
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        found = {name: importlib.import_module(f"benchmarks.study.{name}") for name in NAMES}
    found["compared"].load_original.cache_clear()
    found["compared"].load_supernet.cache_clear()
    return found


def cells(text, first):
    """The cells of the first line of a table that begins with a cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def refuse(*args, **kwargs):
    raise AssertionError("measured again")


def only(kind, module, monkeypatch):
    """Measure one model: every export takes seconds."""
    every = module.compared_models
    monkeypatch.setattr(module, "compared_models", lambda *args: [each for each in every(*args) if each.kind == kind])


def test_embeddings_are_scored_once(modules, tokenizer, tmp_path, monkeypatch, capsys):
    script = modules["sentence_embeddings"]
    options = [*write_study(tmp_path, tokenizer, ("stsb",)), "--shares", "0.6", "--num_pairs", "12"]
    only("searched", script, monkeypatch)
    script.main(options)
    rows = modules["study"].read_rows(tmp_path / "results", "sentence_embeddings")
    assert [row["model"] for row in rows] == ["searched 60%"]
    pairs, labels = script.load_pairs(tmp_path / "data" / "tasks" / "stsb" / "validation.csv")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "bert")
    supernet = modules["compared"].load_supernet(str(tmp_path / "supernet"))
    subnet = supernet.extract_subnet(rows[0]["shape"])
    expected = script.similarity_score(subnet, tokens, pairs[:12], labels[:12], "mean")
    assert rows[0]["pytorch"] == pytest.approx(100 * expected, abs=1e-3)
    assert rows[0]["int8"] == pytest.approx(100 * expected, abs=15)
    assert rows[0]["int8"] != rows[0]["pytorch"]
    monkeypatch.setattr(script, "measure", refuse)
    script.main(options)
    assert modules["study"].read_rows(tmp_path / "results", "sentence_embeddings") == rows
    assert cells(capsys.readouterr().out, "searched 60%")[3] == f"{rows[0]['pytorch']:.2f}"
    with pytest.raises(ValueError, match="other settings: pairs"):
        script.main([*options[:-1], "11"])


def test_the_exported_encoder_has_no_pooler_and_the_compared_one_keeps_it(modules):
    encoder = BertModel(tiny_bert_config())
    exported = modules["sentence_embeddings"].without_pooler(encoder)
    assert exported.pooler is None
    assert encoder.pooler is not None


@pytest.mark.parametrize(("score", "verdict"), [(78.4, "98.0%; met"), (78.3, "97.9%; missed")])
def test_the_target_of_embeddings_is_computed(modules, tmp_path, score, verdict):
    script = modules["sentence_embeddings"]
    assert script.answer(tmp_path, tmp_path) == ""
    results = modules["study"].Results(tmp_path, "sentence_embeddings", {})
    for kind, share, value in (("searched", 0.6, score), ("original", None, 80.0), ("first_layers", 0.6, 40.0)):
        row = {"model": f"{kind} {share}", "kind": kind, "share": share, "shape": [8], "encoder": share or 1.0}
        results.add({**row, "pytorch": value, "int8": value - 8, "pairs": 750})
    text = script.answer(tmp_path, tmp_path / "pictures")
    assert verdict in text
    assert cells(text, "first_layers 0.6")[3:] == ["40.00", "50.0%", "32.00", "40.0%"]
    assert "(pictures/sentence_embeddings.png)" in text
    assert (tmp_path / "pictures" / "sentence_embeddings.png").stat().st_size > 5000


def test_latency_is_measured_once(modules, tokenizer, tmp_path, monkeypatch, capsys):
    script = modules["latency_of_shapes"]
    options = [*write_study(tmp_path, tokenizer, ("stsb",)), "--shares", "0.6", "--sequence_length", "8"]
    options += ["--repeats", "2", "--batch_sizes", "1", "3", "--equal_repeats", "2", "--num_equal_shapes", "2"]
    options += ["--tolerance", "0.3"]
    only("original", script, monkeypatch)
    made, make = {}, script.make_contenders
    monkeypatch.setattr(script, "make_contenders", lambda *args: made.update(make(*args)) or made)
    monkeypatch.setattr("benchmarks.sweeps.PAUSE", 0)
    script.main(options)
    rows = modules["study"].read_rows(tmp_path / "results", "latency_of_shapes")
    timed = [row for row in rows if row["what"] == "models"]
    assert [(row["batch_size"], row["model"], row["format"]) for row in timed] == [
        (size, "original", kind) for size in (1, 3) for kind in ("pytorch", "onnx", "int8")
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in timed)
    assert [(row["share"], row["batch"], len(row["shapes"])) for row in rows if row["what"] == "equal size"] == [
        (0.6, 1, 2),
        (0.6, 3, 2),
    ]
    sizes = {row["format"]: row["bytes"] for row in timed}
    bert = modules["compared"].load_original(str(tmp_path / "bert"))
    assert sizes["pytorch"] == 4 * bert.num_parameters()
    assert sizes["int8"] < 0.8 * sizes["onnx"]
    batch = script.make_batch(2, 9, len(tokenizer))  # every format runs the same model
    with torch.no_grad():
        states = bert(**{name: torch.from_numpy(array) for name, array in batch.items()}).last_hidden_state.numpy()
    np.testing.assert_allclose(made["original", "pytorch"].run(batch).last_hidden_state.numpy(), states, atol=1e-5)
    np.testing.assert_allclose(made["original", "onnx"].run(batch)["last_hidden_state"], states, atol=1e-4)
    assert 1e-4 < np.abs(made["original", "int8"].run(batch)["last_hidden_state"] - states).max() < 1
    monkeypatch.setattr(script, "time_contenders", refuse)
    monkeypatch.setattr(script, "compare_equal_sizes", refuse)
    script.main(options)
    assert modules["study"].read_rows(tmp_path / "results", "latency_of_shapes") == rows
    assert "| original |" in capsys.readouterr().out


def test_rows_of_an_unfinished_batch_size_are_measured_again(modules, tmp_path, monkeypatch):
    """Times of different sweeps must not be divided by each other."""
    script, compared = modules["latency_of_shapes"], modules["compared"]
    models = [compared.Compared("original", None, None, 10, 1.0), compared.Compared("searched", 0.6, [8], 8, 0.6)]
    results = modules["study"].Results(tmp_path, "latency_of_shapes", {})
    half = {"what": "models", "format": "pytorch", "batch_size": 3, "supernet": "s", "seconds": [9.0]}
    results.add({**models[0].row(), **half})
    results.add({"what": "equal size", "share": 0.6, "batch": 3})
    args = script.argparse.Namespace(batch_sizes=[3], repeats=[2], sequence_length=4, bert="bert")
    contenders = {(model.name, kind): script.Contender(5, repr) for model in models for kind in script.FORMATS}
    monkeypatch.setattr(script, "make_contenders", lambda *args: contenders)
    monkeypatch.setattr(script, "load_original", lambda bert: torch.nn.Module())
    monkeypatch.setattr(torch.nn.Module, "config", script.argparse.Namespace(vocab_size=50), raising=False)
    monkeypatch.setattr("benchmarks.sweeps.PAUSE", 0)
    script.measure_models(args, results, models, "s")
    assert [len(row["seconds"]) for row in results.find(what="models")] == [2] * 6
    assert len(results.find(what="equal size")) == 1
    results.rows = results.find(what="models")[:1]  # what a run with fewer --shares must not throw away
    with pytest.raises(ValueError, match="has rows of original in batches of 3, and all models of a batch size are"):
        script.measure_models(args, results, models[1:], "s")
    assert [row["model"] for row in results.rows] == ["original"]


def test_the_tables_of_latency_are_computed(modules, tmp_path):
    assert modules["latency_of_shapes"].answer(tmp_path, tmp_path) == ""
    settings = {"repeats": {"1": 3}, "sequence_length": 128, "equal_repeats": 5}
    results = modules["study"].Results(tmp_path, "latency_of_shapes", settings)
    times = {
        ("original", None, "pytorch"): [0.010, 0.020, 0.100],
        ("original", None, "int8"): [0.005, 0.005, 0.005],
        ("searched", 0.6, "pytorch"): [0.005, 0.012, 0.020],
    }
    for (kind, share, form), seconds in times.items():
        row = {"model": kind, "kind": kind, "share": share, "shape": [8], "encoder": share or 1.0, "what": "models"}
        results.add({**row, "format": form, "batch_size": 1, "bytes": 1_500_000, "seconds": seconds})
    medians = np.array([[1.0, 1.2], [2.0, 2.2]])
    comparison = summarize(100, np.array([[16], [24]]), np.array([99, 101]), medians)
    row = {"what": "equal size", "share": 0.6, "batch": 1, **vars(comparison)}
    results.add(row)
    text = modules["latency_of_shapes"].answer(tmp_path, tmp_path / "pictures")
    assert cells(text, "searched")[2:] == ["60.0%", "1.5", "12.0 (62%)", "0.50", *["-"] * 6]
    assert cells(text, "original")[3:] == ["1.5", "20.0 (225%)", "1.00", "-", "-", "-", "1.5", "5.0 (0%)", "0.25"]
    assert cells(text, "1")[:2] == ["1", "60%"]
    assert "43.8% above noise" in cells(text, "1")
    words = "In batches of 1 the original in 8 bits takes 0.25, the searched shape for 60% of the encoder 0.50 of the"
    assert f"{words} original's time." in text
    assert "differ by 44.2% to 44.2% (standard deviation; noise 6.3% to 6.3%), by more than noise in 1 of 1" in text
    assert (tmp_path / "pictures" / "latency_of_shapes.png").stat().st_size > 5000
