"""The Trainer with a teacher: its loss, and that accumulation and processes do not change it."""

import copy

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_bert_config, tiny_config
from datasets import Dataset
from transformers import BertForSequenceClassification, TrainingArguments

from supershaper_hf import (
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
)
from supershaper_hf.finetuning.models import take_head
from supershaper_hf.finetuning.trainer import DistillingTrainer, logit_distance


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = {  # head, labels of 8 examples, what the configuration says
    "one label": (SuperShaperForSequenceClassification, [0, 1, 2, 0, 1, 2, 0, 1], {"num_labels": 3}),
    "regression": (SuperShaperForSequenceClassification, [0.1 * n for n in range(8)], {"num_labels": 1}),
    "several labels": (
        SuperShaperForSequenceClassification,
        [[float(n % 2), 1.0, float(n % 3 == 0)] for n in range(8)],
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "tokens": (
        SuperShaperForTokenClassification,
        [[-100] * (1 + n % 4) + [n % 3] * (8 - n % 4) for n in range(8)],
        {"num_labels": 3},
    ),
    "questions": (SuperShaperForQuestionAnswering, None, {}),
}


def make(kind):
    """A model, a teacher, and 8 examples."""
    head, labels, config = KINDS[kind]
    student, teacher = (randomize(head(tiny_config(**NO_DROPOUT, **config)), seed) for seed in (0, 1))
    batch = {name: tensor.tolist() for name, tensor in tiny_batch(batch=8).items()}
    if labels is None:
        batch |= {"start_positions": list(range(8)), "end_positions": list(range(8))}
    else:
        batch["labels"] = labels
    return student, teacher, Dataset.from_dict(batch)


def train(folder, student, teacher, data, size=8, accumulate=1, weight=0.5, temperature=2.0, state_weight=0.0):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = copy.deepcopy(student)
    options = {"weight": weight, "temperature": temperature, "state_weight": state_weight}
    trainer = DistillingTrainer(model=model, args=args, train_dataset=data, teacher=teacher, **options)
    trainer.train()
    return model


def expected_loss(student, teacher, data, weight, temperature):
    """By the formula, over all 8 examples at once."""
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    labels = {name: batch.pop(name) for name in list(batch) if name not in tiny_batch()}
    outputs = student(**batch, **labels)
    with torch.no_grad():
        taught = teacher(**batch)
    if "start_logits" in outputs:
        pairs = [(outputs[name], taught[name]) for name in ("start_logits", "end_logits")]
    else:
        pairs = [(outputs.logits, taught.logits)]
    target = labels.get("labels")
    if target is not None and target.is_floating_point():
        own, other = pairs[0]
        if own.shape[-1] == 1:
            distance = (own - other).square().mean()
        else:
            p, q = torch.sigmoid(other / temperature), torch.sigmoid(own / temperature)
            distance = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * temperature**2
    else:
        if target is not None and target.ndim == 2:
            pairs = [(own[target != -100], other[target != -100]) for own, other in pairs]
        found = []
        for own, other in pairs:
            p, q = torch.softmax(other / temperature, -1), torch.softmax(own / temperature, -1)
            found.append((p * (p / q).log()).sum(-1).mean() * temperature**2)
        distance = sum(found) / len(found)
    return (1 - weight) * outputs.loss + weight * distance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (2, 4)])
def test_update_is_that_of_the_formula_however_the_batch_is_split(kind, size, accumulate, tmp_path):
    student, teacher, data = make(kind)
    trained = train(tmp_path, student, teacher, data, size, accumulate)
    by_hand = copy.deepcopy(student).train()
    expected_loss(by_hand, teacher, data, 0.5, 2.0).backward()
    for (name, actual), parameter in zip(trained.named_parameters(), by_hand.parameters(), strict=True):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, parameter - 1e-2 * gradient, atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["one label", "questions"])
def test_states_of_the_teacher_are_learnt_too(kind, tmp_path):
    student, teacher, data = make(kind)
    trained = train(tmp_path, student, teacher, data, state_weight=3.0)
    by_hand = copy.deepcopy(student).train()
    inputs = {name: torch.tensor(data[name]) for name in tiny_batch()}
    own, other = (model.bert(**{**inputs}).last_hidden_state for model in (by_hand, teacher))
    mask = inputs["attention_mask"] > 0
    errors = (own - other.detach())[mask].square().sum(-1) / other.detach()[mask].square().sum(-1)
    (expected_loss(by_hand, teacher, data, 0.5, 2.0) + 3 * errors.mean()).backward()
    for (name, actual), parameter in zip(trained.named_parameters(), by_hand.parameters(), strict=True):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, parameter - 1e-2 * gradient, atol=2e-6, rtol=0, msg=name)


def test_head_of_the_teacher_is_taken_over_without_its_encoder():
    student, _, _ = make("one label")
    teacher = randomize(BertForSequenceClassification(tiny_bert_config(num_labels=3)), 1)
    before = copy.deepcopy(student.state_dict())
    take_head(student, teacher)
    taken = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert taken == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert all(torch.equal(student.state_dict()[name], teacher.state_dict()[name]) for name in taken)


def test_weight_0_learns_from_labels_alone_and_weight_1_from_the_teacher_alone(tmp_path):
    student, teacher, data = make("one label")
    alone = train(tmp_path, student, None, data)
    torch.testing.assert_close(train(tmp_path, student, teacher, data, weight=0.0).state_dict(), alone.state_dict())
    other = data.remove_columns("labels").add_column("labels", [2] * 8)
    taught = [train(tmp_path, student, teacher, each, weight=1.0).state_dict() for each in (data, other)]
    torch.testing.assert_close(*taught)


def test_teacher_is_not_trained_and_has_no_dropout(tmp_path):
    student, _, data = make("one label")
    teacher = randomize(BertForSequenceClassification(tiny_bert_config(num_labels=3, hidden_dropout_prob=0.5)))
    before = copy.deepcopy(teacher.state_dict())
    first = train(tmp_path, student, teacher.train(), data)
    without = BertForSequenceClassification(tiny_bert_config(num_labels=3, **NO_DROPOUT))
    without.load_state_dict(before)
    torch.testing.assert_close(first.state_dict(), train(tmp_path, student, without, data).state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(teacher.state_dict(), before, atol=0, rtol=0)


def test_scoring_has_the_loss_on_the_labels_alone(tmp_path):
    student, teacher, data = make("one label")
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
    )
    trainer = DistillingTrainer(model=student, args=args, eval_dataset=data, teacher=teacher, weight=1.0)
    with torch.no_grad():
        expected = student.eval()(**{name: torch.tensor(data[name]) for name in data.column_names}).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("kind", ["one label", "regression", "several labels"])
def test_models_of_other_kinds_learn_from_a_teacher_too(kind, tmp_path):
    """With equal micro-batches exactly, although their loss is the mean over a micro-batch."""
    _, teacher, data = make(kind)
    config = tiny_bert_config(**NO_DROPOUT, **KINDS[kind][2])
    student = randomize(BertForSequenceClassification(config), 5)
    whole, parts = (train(tmp_path, student, teacher, data, size, 8 // size) for size in (8, 2))
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), atol=2e-6, rtol=0)
    assert not torch.equal(whole.classifier.weight, student.classifier.weight)


def test_distance_of_equal_logits_is_0():
    logits = torch.randn(4, 3)
    for labels in (torch.tensor([0, 1, 2, 0]), torch.rand(4, 3)):
        found = logit_distance({"logits": logits}, {"logits": logits.clone()}, {"labels": labels}, 2.0)
        assert abs(float(found)) < 1e-6
