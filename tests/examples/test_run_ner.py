"""`examples/run_ner.py` on labelled sentences of the addresses: a supernet with a shape, then the folder it writes."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_tasks import write_supernet
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from supershaper_hf.data.sequences import train_tokenizer


EXAMPLES = Path(__file__).parents[2] / "examples"
NER = EXAMPLES / "run_ner.py"


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks():
    return load(EXAMPLES / "address_tasks.py")


@pytest.fixture(scope="module")
def paragraphs(tasks):
    return tasks.TEXT.read_text(encoding="utf-8").splitlines()[:300]


@pytest.fixture
def supernet(paragraphs, tmp_path):
    tokenizer = train_tokenizer(paragraphs, vocab_size=600, max_length=24)
    return write_supernet(tmp_path / "supernet", tokenizer, hidden_dropout_prob=0.0)


@pytest.fixture
def run(tasks, paragraphs, tmp_path, capsys):
    """Run the script on 40 sentences to train on and 20 to score; return what it prints."""
    for name, part, count in (("train", paragraphs[:200], 40), ("validation", paragraphs[200:], 20)):
        tasks.write_conll(tmp_path / f"{name}.conll", part, count)

    def run(*options):
        files = [f"--{name}_file={tmp_path / name}.conll" for name in ("train", "validation")]
        small = ["--max_length=24", "--num_train_epochs=2", "--learning_rate=5e-3", "--use_cpu", "--disable_tqdm=True"]
        assert load(NER).main([*files, f"--test_file={tmp_path / 'train.conll'}", *small, *options]) == 0
        return capsys.readouterr().out

    return run


def test_supernet_then_subnet(run, supernet, tmp_path):
    """The subnet that the script writes has the names of the labels, is a pipeline, and goes on learning."""
    printed = run(f"--model={supernet}", "--shape", "36", "20", "48", f"--output_dir={tmp_path / 'out'}")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "shape [36, 20, 48], seeds [0], model of seed 0" in printed
    for split in ("validation", "test"):
        scores = results["mean"][split]
        assert scores.keys() >= {"precision", "recall", "f1", "accuracy", "f1_LOC", "f1_ORG"}
        assert f"{scores['f1']:.4f}" in printed
    folder = tmp_path / "out" / "model"
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.hidden_sizes == [36, 20, 48]
    assert model.config.id2label == {0: "B-LOC", 1: "B-ORG", 2: "I-LOC", 3: "I-ORG", 4: "O"}
    find = pipeline("token-classification", model=str(folder), device="cpu")
    assert {found["entity"] for found in find("Congress", ignore_labels=[])} <= set(model.config.label2id)

    run(f"--model={folder}", f"--output_dir={tmp_path / 'second'}", "--task_name=places", "--num_train_epochs=1")
    second = json.loads((tmp_path / "second" / "results.json").read_text())
    assert (second["task"], second["shape"]) == ("places", [36, 20, 48])
    reached = [found["mean"]["test"]["accuracy"] for found in (results, second)]
    assert reached[1] > reached[0] - 0.05  # it began where the first run ended


def test_scores_are_those_of_the_saved_model(run, supernet, tmp_path):
    """Accuracy over the words of the file, computed by one pass over each sentence without padding."""
    run(f"--model={supernet}", "--shape", "36", "20", "48", f"--output_dir={tmp_path / 'out'}", "--max_length=24")
    folder = tmp_path / "out" / "model"
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = total = 0
    for sentence in (tmp_path / "validation.conll").read_text().strip().split("\n\n"):
        pairs = [line.split() for line in sentence.split("\n")]
        encoded = tokenizer([word for word, _ in pairs], is_split_into_words=True, add_special_tokens=False)
        words, ids = encoded.word_ids(), encoded["input_ids"]
        for start in range(0, len(ids), 22):
            part = [tokenizer.cls_token_id, *ids[start : start + 22], tokenizer.sep_token_id]
            with torch.no_grad():
                predicted = model(torch.tensor([part])).logits[0, 1:-1].argmax(-1).tolist()
            for position, label in enumerate(predicted, start):
                if position == 0 or words[position] != words[position - 1]:
                    total += 1
                    right += model.config.id2label[label] == pairs[words[position]][1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["mean"]["validation"]["accuracy"] == pytest.approx(right / total, abs=1e-5)


def test_missing_file_is_named(supernet, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.conll does not exist"):
        load(NER).main(
            [
                *(f"--model={supernet}", f"--output_dir={tmp_path / 'out'}", "--use_cpu", "--max_length=24"),
                *("--train_file=nothing.conll", "--validation_file=nothing.conll"),
            ]
        )


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")  # of a model of a few steps
def test_all_shapes_are_ready_after_a_sandwich(run, supernet, tmp_path):
    printed = run(f"--model={supernet}", "--sandwich", "--num_shapes=8", f"--output_dir={tmp_path / 'out'}")
    scores = re.findall(r"^(?:rectangle|front|random).*?  +[\d,]+  +([\d.]+)  +[\d.]+  +\[", printed, re.MULTILINE)
    assert len(scores) >= 8
    assert len(set(scores)) > 1
