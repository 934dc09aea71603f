"""transformers' `Trainer` on a subnet and on a supernet: train, save, resume, predict, keep the best, push."""

import numpy as np
import pytest
import torch
from conftest import assert_same, tiny_batch, tiny_model
from publishing import IGNORE_UPLOADS, server  # noqa: F401, a fixture
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import hub

from supershaper_hf import SuperShaperForSequenceClassification


@pytest.fixture(params=["subnet", "supernet"])
def folder(request, tmp_path):
    supernet = tiny_model(SuperShaperForSequenceClassification, num_labels=2)
    model = supernet if request.param == "supernet" else supernet.extract_subnet([8, 20, 36])
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows():
    columns = tiny_batch(batch=8) | {"labels": torch.arange(8) % 2}
    return [{name: values[row] for name, values in columns.items()} for row in range(8)]


def trainer(folder, output, rows, **changes):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True}
    options |= {"dataloader_pin_memory": False, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(output), **options | changes)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)


def test_resumed_run_equals_one_that_was_never_stopped(folder, rows, tmp_path):
    whole = trainer(folder, tmp_path / "whole", rows)
    whole.train()
    resumed = trainer(folder, tmp_path / "resumed", rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()), atol=0)


def test_best_model_is_loaded_at_the_end_and_saved(folder, rows, tmp_path):
    run = trainer(folder, tmp_path / "run", rows, load_best_model_at_end=True, learning_rate=1e-2)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    run.save_model(str(tmp_path / "saved"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same(dict(saved.state_dict()), dict(run.model.state_dict()), atol=0)


def test_predictions_are_those_of_the_model(folder, rows, tmp_path):
    run = trainer(folder, tmp_path / "run", rows)
    found = run.predict(rows)
    expected = run.model(**tiny_batch(batch=8)).logits.detach()
    np.testing.assert_allclose(found.predictions, expected, atol=1e-5)


@IGNORE_UPLOADS
def test_pushed_model_loads_from_the_hub(folder, rows, tmp_path, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hub, "_hf_api", None)  # it keeps the endpoint of an earlier server
    run = trainer(folder, tmp_path / "run", rows, max_steps=1, hub_model_id="user/tuned", hub_token=server.token)
    run.train()
    run.push_to_hub()
    published = server.repos["user/tuned"].files()
    assert {"config.json", "model.safetensors", "README.md", "modeling_supershaper.py"} <= set(published)
    assert not [path for path in published if path.startswith("checkpoint-")]
    loaded = AutoModelForSequenceClassification.from_pretrained("user/tuned")
    assert_same(dict(loaded.state_dict()), dict(run.model.state_dict()), atol=0)


def test_hidden_states_of_unequal_widths_are_predicted_too(folder, rows, tmp_path):
    run = trainer(folder, tmp_path / "run", rows)
    run.model.config.output_hidden_states = True
    _, states = run.predict(rows).predictions
    widths = [48, *run.model.config.hidden_sizes]
    assert [state.shape for state in states[:-1]] == [(8, 9, width) for width in widths[: len(states) - 1]]
