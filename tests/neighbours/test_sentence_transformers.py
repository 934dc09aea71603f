"""sentence-transformers' own trainer and SetFit: a subnet trained, saved, and loaded with and without the package."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import randomize, tiny_config
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from texts import random_documents

from supershaper_hf import SuperShaperForSequenceClassification, SuperShaperModel, save_for_hub


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEXTS = list(random_documents(6, words=6)["text"])
LOADING = """
import json, sys
sys.modules.update(dict.fromkeys({hidden!r}))
{imports}
from sentence_transformers import {kind}
model = {kind}({folder!r}, device="cpu"{trust})
rows = model.{method}({texts!r})
print(json.dumps([list(map(float, row)) if hasattr(row, "__len__") else float(row) for row in rows]))
"""
WAYS = {  # hidden modules, imports, further arguments
    "imported": ([], "import supershaper_hf", ""),
    "installed, not imported": ([], "", ", trust_remote_code=True"),
    "not installed": (["supershaper_hf"], "", ", trust_remote_code=True"),
}


@pytest.fixture
def subnet(tokenizer, tmp_path):
    supernet = randomize(SuperShaperModel(tiny_config(vocab_size=len(tokenizer))))
    folder = save_for_hub(
        supernet.extract_subnet([8, 20, 36]), tmp_path / "subnet", tokenizer=tokenizer, pooling="mean"
    )
    return str(folder)


def loaded(way, kind, method, folder, texts):
    """What a fresh process computes that loads a folder in one of three ways."""
    hidden, imports, trust = WAYS[way]
    code = LOADING.format(
        hidden=hidden, imports=imports, kind=kind, folder=str(folder), trust=trust, method=method, texts=texts
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def train(encoder, folder):
    from sentence_transformers.losses import CosineSimilarityLoss  # version 6 warns of this name, 5 has no other one

    pairs = Dataset.from_dict({"sentence1": TEXTS, "sentence2": TEXTS[::-1], "score": np.linspace(0, 1, 6).tolist()})
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=encoder, args=args, train_dataset=pairs, loss=CosineSimilarityLoss(encoder)
    )
    trainer.train()


@pytest.mark.parametrize("way", WAYS)
def test_encoder_that_was_trained_and_saved_by_the_library_loads(way, subnet, tmp_path):
    encoder = SentenceTransformer(subnet, device="cpu")
    before = encoder.encode(TEXTS)
    train(encoder, tmp_path / "run")
    expected = encoder.encode(TEXTS)
    assert np.abs(expected - before).max() > 1e-3
    encoder.save_pretrained(str(tmp_path / "saved"))
    found = loaded(way, "SentenceTransformer", "encode", tmp_path / "saved", TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_cross_encoder_loads(way, tokenizer, tmp_path):
    head = randomize(SuperShaperForSequenceClassification(tiny_config(vocab_size=len(tokenizer), num_labels=1)))
    save_for_hub(head.extract_subnet([8, 20, 36]), tmp_path / "subnet", tokenizer=tokenizer)
    encoder = CrossEncoder(str(tmp_path / "subnet"), device="cpu")
    pairs = [[first, second] for first, second in zip(TEXTS, TEXTS[::-1], strict=True)]
    expected = encoder.predict(pairs)
    encoder.save_pretrained(str(tmp_path / "saved"))
    found = loaded(way, "CrossEncoder", "predict", tmp_path / "saved", pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # SetFit has no option for it
def test_setfit_trains_and_loads_a_subnet(subnet, tmp_path):
    setfit = pytest.importorskip("setfit", reason="SetFit is not installed; `make test-neighbours` installs it")
    data = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 3})
    model = setfit.SetFitModel.from_pretrained(subnet)
    args = setfit.TrainingArguments(
        output_dir=str(tmp_path / "run"), num_epochs=1, max_steps=2, batch_size=4, report_to="none", save_strategy="no"
    )
    setfit.Trainer(model=model, args=args, train_dataset=data).train()
    expected = np.array(model.predict_proba(TEXTS))
    model.save_pretrained(str(tmp_path / "saved"))
    found = np.array(setfit.SetFitModel.from_pretrained(str(tmp_path / "saved")).predict_proba(TEXTS))
    np.testing.assert_allclose(found, expected, atol=1e-5)
