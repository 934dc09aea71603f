"""With transformers' Trainer, one batch of 8 is the same as four accumulated batches of 2, for every head."""

import pytest
import torch
from conftest import PER_HEAD_BY_WIDTH, assert_same, randomize, tiny_batch, tiny_config
from transformers import Trainer, TrainingArguments

from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
)


# Batches of 2 have unlike numbers of labelled tokens: 3, 2, 6 and 0 of them.
TOKEN_LABELS = torch.full((8, 9), -100)
for row, labelled in enumerate([2, 1, 1, 1, 6, 0, 0, 0]):
    TOKEN_LABELS[row, :labelled] = torch.arange(labelled) % 3

TASKS = {
    "masked LM": (SuperShaperForMaskedLM, {}, {"labels": TOKEN_LABELS}),
    "masked LM, bottlenecks by width": (SuperShaperForMaskedLM, PER_HEAD_BY_WIDTH, {"labels": TOKEN_LABELS}),
    "one label": (SuperShaperForSequenceClassification, {"num_labels": 3}, {"labels": torch.arange(8) % 3}),
    "several labels": (
        SuperShaperForSequenceClassification,
        {"num_labels": 3},
        {"labels": torch.arange(24).view(8, 3).remainder(5).lt(2).float()},
    ),
    "regression": (SuperShaperForSequenceClassification, {"num_labels": 1}, {"labels": torch.linspace(-2, 3, 8)}),
    "regression of several scores": (
        SuperShaperForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
        {"labels": torch.linspace(-2, 3, 24).view(8, 3)},
    ),
    "tokens": (SuperShaperForTokenClassification, {"num_labels": 3}, {"labels": TOKEN_LABELS}),
    "answers": (
        SuperShaperForQuestionAnswering,
        {},
        {"start_positions": torch.arange(8) % 4, "end_positions": 4 + torch.arange(8) % 5},
    ),
    "multiple choice": (SuperShaperForMultipleChoice, {}, {"labels": torch.arange(8) % 3}),
}


@pytest.mark.parametrize("task", TASKS)
def test_one_batch_of_eight_equals_four_of_two(task, tmp_path):
    model_class, changes, labels = TASKS[task]
    config = tiny_config(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    columns = {**tiny_batch(model_class, batch=8), **labels}
    rows = [{name: values[row] for name, values in columns.items()} for row in range(8)]

    def train_one_step(batch_size, accumulation_steps):
        """Return the logged loss and the gradient, which is the change of the parameters by a step of SGD."""
        model = randomize(model_class(config))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation_steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        gradient = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
        return trainer.state.log_history[0]["loss"], gradient

    whole_loss, whole_gradient = train_one_step(8, 1)
    loss, gradient = train_one_step(2, 4)
    assert loss == pytest.approx(whole_loss, rel=1e-3)  # the Trainer logs four significant digits
    assert_same(gradient, whole_gradient, atol=1e-5)
    with torch.no_grad():
        expected = randomize(model_class(config))(**columns).loss.item()
    assert whole_loss == pytest.approx(expected, rel=1e-3)
    assert max(change.abs().max().item() for change in gradient.values()) > 1e-2
