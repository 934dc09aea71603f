"""Tiny training runs, and fixtures that watch or disturb them. `conftest.py` loads this file as a plugin of pytest."""

import math

import pytest
from accelerate.state import AcceleratorState
from conftest import assert_same, tiny_config, tiny_model
from texts import random_documents

from supershaper_hf import SearchSpace
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.training import checkpoints, run_folder
from supershaper_hf.training import loop as training_module
from supershaper_hf.training import progress as progress_module
from supershaper_hf.training.arguments import SuperPretrainingArguments
from supershaper_hf.training.loop import super_pretrain
from supershaper_hf.training.sandwich import sandwich_step


SPACE = SearchSpace(tiny_config())
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def no_measured_peak(monkeypatch):
    """Measuring it takes a fifth of a second in each run."""
    monkeypatch.setattr(progress_module, "matrix_product_rate", lambda *_: 1e9)


@pytest.fixture
def dataset(tokenizer):
    return tokenize(random_documents(8, words=20), tokenizer, max_length=12)


@pytest.fixture
def eval_batches(tokenizer):
    return fixed_masks(tokenize(random_documents(4, seed=1), tokenizer, 12), tokenizer, 8, mlm_probability=0.4)


@pytest.fixture
def fresh_accelerator_state():
    """Accelerate keeps one precision for a whole process: forget it before and after a test of another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(**changes):
    values = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_length": 12,
    }
    return SuperPretrainingArguments(**{**values, **changes})


def pretrain(tokenizer, dataset, model=None, eval_batches=(), teacher=None, card=None, **changes):
    """Train a tiny model for a few steps; return it and the summary."""
    model = tiny_model() if model is None else model
    args = arguments(**changes)
    return model, super_pretrain(model, tokenizer, dataset, args, eval_batches=eval_batches, teacher=teacher, card=card)


def step_records(summary):
    return [record for record in summary.log_history if "loss" in record]


def losses(summary):
    return [record["loss"] for record in step_records(summary)]


def copied_weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_trained_alike(actual, expected):
    """Weights agree within 1e-5, apart from the biases of keys.

    Softmax does not depend on them, so their gradient is rounding noise, which AdamW scales up.
    """
    pairs = (
        {k: v for k, v in model.state_dict().items() if not k.endswith("key.bias")} for model in (actual, expected)
    )
    assert_same(*pairs)


@pytest.fixture
def steps(monkeypatch):
    """Record what `sandwich_step` is given, and the weights it starts from."""
    calls = []

    def record(accelerator, model, micro_batches, shapes, objective):
        weights = copied_weights(accelerator.unwrap_model(model))
        calls.append({"batches": micro_batches, "shapes": shapes, "objective": objective, "weights": weights})
        return sandwich_step(accelerator, model, micro_batches, shapes, objective)

    monkeypatch.setattr(training_module, "sandwich_step", record)
    return calls


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    for module in (checkpoints, progress_module, run_folder):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


@pytest.fixture
def scripted(monkeypatch):
    """Let evaluations find the losses of a script, one list each, and keep the weights they were called with.

    The last loss of a list is that of all further shapes.
    """
    script, weights = [], []

    def evaluate(model, batches, shapes, *args, **kwargs):
        weights.append(copied_weights(model))
        found = script[len(weights) - 1]
        found = [*found, *[found[-1]] * (len(shapes) - len(found))]
        return [
            {"shape": shape, "loss": loss, "perplexity": math.exp(loss), "accuracy": 0.0}
            for shape, loss in zip(shapes, found, strict=True)
        ]

    monkeypatch.setattr(training_module, "evaluate_shapes", evaluate)
    return script, weights


def stream_of(n=40, words=27):
    return random_documents(n, words=words).to_iterable_dataset()


def poison(monkeypatch, bad, value=math.nan):
    """Put `value` into one gradient of the steps in `bad`, counted from 0; return the weights before each step."""
    seen = []

    def spoil(accelerator, model, *args):
        seen.append(copied_weights(accelerator.unwrap_model(model)))
        result = sandwich_step(accelerator, model, *args)
        if len(seen) - 1 in bad:
            next(iter(model.parameters())).grad[0, 0] = value
        return result

    monkeypatch.setattr(training_module, "sandwich_step", spoil)
    return seen
