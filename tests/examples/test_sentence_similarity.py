"""The benchmark of sentence encoders: what it reads, the embeddings it makes, and the correlation it prints."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, randomize, tiny_bert_config, tiny_config
from transformers import BertModel

from supershaper_hf import SuperShaperModel, save_for_hub


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SENTENCES = [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + i % 7)) for i in range(45)]
HEADER = "sentence1,sentence2,label\n"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("sentence_similarity")
    sys.modules.pop("sentence_similarity")


@pytest.fixture
def model():
    return randomize(SuperShaperModel(tiny_config()))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_does_not_depend_on_the_other_sentences(script, model, tokenizer, pooling):
    """45 sentences are more than a batch. They come back in their order, without a trace of padding or dropout."""
    model.train()
    embeddings = script.embed(model, tokenizer, SENTENCES, pooling)
    assert model.training
    assert embeddings.dtype == np.float32
    model.eval()
    for sentence, embedding in zip(SENTENCES, embeddings, strict=True):
        with torch.no_grad():
            (states,) = model(**tokenizer([sentence], return_tensors="pt")).last_hidden_state
        expected = states.mean(0) if pooling == "mean" else states[0]
        np.testing.assert_allclose(embedding, expected.numpy(), atol=1e-5)


def test_a_shape_gives_the_embeddings_of_its_subnet(script, model, tokenizer):
    shape = [20, 0, 36]
    expected = script.embed(model.extract_subnet(shape), tokenizer, SENTENCES, "mean")
    np.testing.assert_allclose(script.embed(model, tokenizer, SENTENCES, "mean", shape), expected, atol=1e-5)
    assert np.abs(script.embed(model, tokenizer, SENTENCES, "mean") - expected).max() > 0.1


def test_a_long_sentence_is_cut(script, tokenizer):
    bert = randomize(BertModel(tiny_bert_config()))  # a model that takes no shape; it reads 24 tokens
    long = " ".join(WORDS * 3)
    cut = " ".join((WORDS * 3)[:22])
    np.testing.assert_array_equal(*script.embed(bert, tokenizer, [long, cut], "mean"))


def test_the_score_is_the_rank_correlation_of_cosines(script, model, tokenizer):
    pairs = list(zip(SENTENCES[0::2], SENTENCES[1::2], strict=False))
    first, second = (script.embed(model, tokenizer, sentences, "cls") for sentences in zip(*pairs, strict=True))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    assert script.similarity_score(model, tokenizer, pairs, np.exp(cosines), "cls") == pytest.approx(1)
    assert script.similarity_score(model, tokenizer, pairs, -np.array(cosines), "cls") == pytest.approx(-1)


def test_pairs_are_read(script, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text(HEADER + '"A ""cat"", sat",é,0.5\na,"two\nlines",5\n', encoding="utf-8")
    pairs, labels = script.load_pairs(file)
    assert pairs == [('A "cat", sat', "é"), ("a", "two\nlines")]
    assert labels.tolist() == [0.5, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,label\n1,2,3\n", "no column sentence1, sentence2"),
        (HEADER + "a,b,1\n", "has 1 pairs"),
        (HEADER + "a,b,1\na,b,high\n", "not a number: .*'high'"),
        (HEADER + "a,b,1\na,b\n", "not a number"),
        ("", "no column sentence1, sentence2, label"),
    ],
)
def test_other_files_are_refused(script, tmp_path, content, message):
    file = tmp_path / "pairs.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        script.load_pairs(file)


def test_the_table_compares_shapes_with_the_model_itself(script, tokenizer, tmp_path, monkeypatch, capsys):
    model = randomize(SuperShaperModel(tiny_config()))
    save_for_hub(model, tmp_path / "model", tokenizer=tokenizer, pooling="cls")
    lines = [f"{a},{b},{i}\n" for i, (a, b) in enumerate(zip(SENTENCES[0::2], SENTENCES[1::2], strict=False))]
    (tmp_path / "pairs.csv").write_text(HEADER + "".join(lines), encoding="utf-8")
    command = ["sentence_similarity.py", "--model", str(tmp_path / "model"), "--pairs", str(tmp_path / "pairs.csv")]

    def table(*options):
        monkeypatch.setattr(sys, "argv", [*command, *options])
        script.main()
        return [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]

    rows = table()
    assert [row[0] for row in rows] == ["| the model itself", *(f"| {[w] * 3}" for w in (36, 20, 8))]
    asked = table("--shapes", "20", "36,0,8", "48")
    assert [row[0] for row in asked] == ["| the model itself", "| [20, 20, 20]", "| [36, 0, 8]", "| [48, 48, 48]"]
    assert asked[0][2:] == asked[3][2:]  # the model itself is the largest shape; only its bottlenecks are not merged
    assert asked[1] == rows[2]
    assert table("--pooling", "cls") == rows  # as the model says of itself
    assert table("--pooling", "mean") != rows


def test_exported_files_of_a_subnet_are_scored(script, model, tokenizer, tmp_path):
    subnet, pairs = model.extract_subnet([20, 0, 36]), list(zip(SENTENCES[0::2], SENTENCES[1::2], strict=False))
    save_for_hub(subnet, tmp_path / "subnet", tokenizer=tokenizer, pooling="mean", exports=("onnx", "int8"))
    rows = script.measure(subnet, tokenizer, pairs, np.arange(len(pairs)), "mean", [], tmp_path / "subnet")
    itself, exported, quantized = (float(row["STS"]) for row in rows)
    assert [row["shape"] for row in rows[1:]] == ["onnx/model.onnx", "onnx/model_quantized.onnx"]
    assert exported == pytest.approx(itself, abs=1e-3)
    assert quantized == pytest.approx(itself, abs=0.1)
    assert rows[0]["share"] == "100.0 %"
