"""`examples/run_sts.py`: a subnet of a tiny sentence encoder, trained on rated pairs by sentence-transformers."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, randomize, tiny_config
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from tiny_tasks import write_csv

from supershaper_hf import SuperShaperConfig, SuperShaperModel, extract_from_folder, save_for_hub


SCRIPT = Path(__file__).parents[2] / "examples" / "run_sts.py"
SHAPE = ["36", "20", "48"]
# Libraries of sentence-transformers that warn by themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_sts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A supernet that is a sentence encoder, and pairs whose similarity is the share of words they have in common."""
    config = tiny_config(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_for_hub(randomize(SuperShaperModel(config)), tmp_path / "supernet", tokenizer=tokenizer, pooling="mean")
    generator = random.Random(0)
    for name, count in (("train.csv", 64), ("val.csv", 32)):
        rows = []
        for _ in range(count):
            first = generator.sample(WORDS, 6)
            common = generator.randint(0, 6)
            second = first[:common] + generator.sample([word for word in WORDS if word not in first], 6 - common)
            rows.append(
                {"sentence1": " ".join(first), "sentence2": " ".join(second), "label": round(common * 5 / 6, 2)}
            )
        write_csv(tmp_path / name, rows)
    return tmp_path


def run(script, folder, *options, output="out"):
    files = ["--validation_file", str(folder / "val.csv"), "--output_dir", str(folder / output)]
    assert script.main(["--model", str(folder / "supernet"), *files, *options]) == 0
    return json.loads((folder / output / "results.json").read_text())


def test_subnet_is_trained_and_saved_as_a_sentence_encoder(script, folder, capsys):
    train = ["--train_file", str(folder / "train.csv"), "--learning_rate", "2e-3", "--num_train_epochs", "6"]
    results = run(script, folder, "--shape", *SHAPE, *train)
    assert results["after"] > results["before"] + 0.02
    assert f"{results['after']:.4f}" in capsys.readouterr().out
    assert SuperShaperConfig.from_pretrained(folder / "out" / "model").hidden_sizes == [36, 20, 48]
    encoder = SentenceTransformer(str(folder / "out" / "model"))
    rows = [line.split(",") for line in (folder / "val.csv").read_text().splitlines()[1:]]
    embeddings = [encoder.encode([row[side] for row in rows], normalize_embeddings=True) for side in (0, 1)]
    cosines = np.sum(embeddings[0] * embeddings[1], axis=1)
    labels = [float(row[2]) for row in rows]
    assert spearmanr(cosines, labels).statistic == pytest.approx(results["after"], abs=1e-3)


def test_score_before_training_is_that_of_the_subnet(script, folder):
    subnet = extract_from_folder(folder / "supernet", [36, 20, 48], folder / "subnet")
    cut, whole = run(script, folder, "--shape", *SHAPE), run(script, folder, "--model", str(subnet), output="whole")
    assert cut["before"] == whole["before"]
    assert "after" not in cut
    assert cut["parameters"] == sum(p.numel() for p in SuperShaperModel.from_pretrained(subnet).parameters())


def test_wrong_options_and_labels_are_refused(script, folder, capsys):
    with pytest.raises(SystemExit):
        script.main(["--model", "a"])
    assert "--validation_file is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="label that is not from 0 to --highest_label 2"):
        run(script, folder, "--highest_label", "2")
    (folder / "used").mkdir()
    (folder / "used" / "file").touch()
    with pytest.raises(FileExistsError):
        run(script, folder, output="used")
