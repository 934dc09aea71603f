"""Super fine-tuning: the gradient of a sandwich, however the batch is split, and what is found and saved afterwards."""

import copy
import json

import pytest
import torch
from conftest import assert_same, randomize, tiny_batch, tiny_bert_config, tiny_config
from datasets import Dataset
from forking import finish, fork
from safetensors.torch import load_file
from tiny_tasks import tune, write_supernet, write_task
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, TrainingArguments

from supershaper_hf import (
    SearchSpace,
    ShapePredictor,
    SuperShaperConfig,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    pareto_front,
    read_records,
)
from supershaper_hf.finetuning.super_tuning import SandwichTrainer
from supershaper_hf.finetuning.trainer import logit_distance


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = {  # head, labels of 8 examples, what the configuration says
    "one label": (SuperShaperForSequenceClassification, [0, 1, 2, 0, 1, 2, 0, 1], {"num_labels": 3}),
    "regression": (SuperShaperForSequenceClassification, [0.1 * n for n in range(8)], {"num_labels": 1}),
    "tokens": (
        SuperShaperForTokenClassification,
        [[-100] * (1 + n % 4) + [n % 3] * (8 - n % 4) for n in range(8)],
        {"num_labels": 3},
    ),
    "questions": (SuperShaperForQuestionAnswering, None, {}),
}
RATE = 1e-2


def make(kind, **changes):
    """A supernet, and 8 examples."""
    head, labels, config = KINDS[kind]
    batch = {name: tensor.tolist() for name, tensor in tiny_batch(batch=8).items()}
    if labels is None:
        batch |= {"start_positions": list(range(8)), "end_positions": list(range(8))}
    else:
        batch["labels"] = labels
    return randomize(head(tiny_config(**NO_DROPOUT, **config, **changes))), Dataset.from_dict(batch)


def train(folder, supernet, data, size=8, accumulate=1, teacher=None, steps=1):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
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
    model = copy.deepcopy(supernet)
    trainer = SandwichTrainer(model=model, args=args, train_dataset=data, teacher=teacher, weight=0.25, temperature=2.0)
    trainer.train()
    return model


def by_hand(supernet, data, shapes, teacher=None):
    """The supernet after one step on all 8 examples: the sum over shapes of labels and distance."""
    model = copy.deepcopy(supernet).train()
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    inputs = {name: tensor for name, tensor in batch.items() if name in tiny_batch()}
    loss, taught = torch.zeros(()), None
    if teacher is not None:
        with torch.no_grad():
            taught = teacher(**inputs)
    for shape in shapes:
        outputs = model(**batch, shape=shape)
        own = outputs.loss
        if taught is not None:
            own = 0.75 * own + 0.25 * logit_distance(outputs, taught, batch, 2.0)
        loss = loss + own
        if taught is None:
            taught = {name: tensor.detach() for name, tensor in outputs.items() if name.endswith("logits")}
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
    return model


def shapes_of(supernet, step):
    space = SearchSpace.from_config(supernet.config)
    return [space.largest, space.smallest, *space.sample(2, (42, step)).tolist()]  # 42: the seed of TrainingArguments


@pytest.mark.parametrize("changes", [{}, {"bottlenecks": "by_width", "head_slicing": "per_head"}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (2, 4)])
def test_update_is_the_sum_over_the_shapes_however_the_batch_is_split(kind, size, accumulate, changes, tmp_path):
    supernet, data = make(kind, **changes)
    expected = by_hand(supernet, data, shapes_of(supernet, 0))
    trained = train(tmp_path, supernet, data, size, accumulate)
    assert_same(dict(trained.state_dict()), dict(expected.state_dict()), atol=5e-6)


def test_every_step_has_shapes_of_its_own(tmp_path):
    supernet, data = make("one label")
    first = by_hand(supernet, data, shapes_of(supernet, 0))
    expected = by_hand(first, data, shapes_of(supernet, 1))
    assert shapes_of(supernet, 0) != shapes_of(supernet, 1)
    assert_same(dict(train(tmp_path, supernet, data, steps=2).state_dict()), dict(expected.state_dict()), atol=1e-5)


def test_all_shapes_learn_from_an_outside_teacher_if_there_is_one(tmp_path):
    supernet, data = make("one label")
    teacher = randomize(BertForSequenceClassification(tiny_bert_config(num_labels=3)), seed=7)
    expected = by_hand(supernet, data, shapes_of(supernet, 0), teacher)
    assert_same(dict(train(tmp_path, supernet, data, teacher=teacher).state_dict()), dict(expected.state_dict()), 5e-6)


def test_two_processes_train_as_one_does_at_the_same_global_batch(tmp_path):
    """With weights by width, of which some have no gradient in a step."""
    finish(fork(2, train_apart, tmp_path))
    supernet, data = make("one label", bottlenecks="by_width")
    expected = dict(train(tmp_path / "one", supernet, data, steps=3).state_dict())
    for rank in (0, 1):
        assert_same(load_file(tmp_path / f"rank{rank}.safetensors"), expected, atol=1e-5)


def train_apart(folder):
    from safetensors.torch import save_file

    supernet, data = make("one label", bottlenecks="by_width")
    model = train(folder / "two", supernet, data, size=4, steps=3)
    save_file(dict(model.state_dict()), folder / f"rank{torch.distributed.get_rank()}.safetensors")


def test_subnet_has_one_shape_only(tmp_path):
    supernet, data = make("one label")
    with pytest.raises(ValueError, match="is not a supernet, so it has one shape only"):
        train(tmp_path, supernet.extract_subnet([8, 8, 8]), data)


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")  # of a model of a few steps
def test_every_shape_is_ready_for_the_task_and_the_best_one_is_cut_out(tokenizer, tmp_path):
    files = write_task(tmp_path)
    supernet = write_supernet(tmp_path / "supernet", tokenizer, **NO_DROPOUT)
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(supernet))
    budget = int(space.num_parameters([36, 20, 20]))
    results = tune(
        tmp_path / "out", supernet, files, tokenizer, sandwich=True, max_cost=budget, num_shapes=12,
        num_train_epochs=12,
    )  # fmt: skip
    out = tmp_path / "out"
    model = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert model.config.hidden_sizes == [48, 48, 48]
    assert not model.config.merged_bottlenecks
    records = read_records(out / "search" / "records.jsonl")
    scores = {tuple(record["shape"]): record["score"] for record in records}
    assert scores[48, 48, 48] == pytest.approx(results["mean"]["validation"]["accuracy"], abs=1e-6)
    assert sum(scores.values()) / len(scores) > 0.6  # untrained they are at .5
    assert {row["shape"] for row in results["shapes"]} >= {"rectangle 48", "rectangle 8", "random"}
    front = pareto_front(space, ShapePredictor.fit_records(records), cost="parameters")
    assert space.num_parameters(front.best(max_cost=budget)) <= budget
    subnet = AutoModelForSequenceClassification.from_pretrained(out / "subnet")
    (saved,) = [row for row in results["shapes"] if row["shape"].endswith(" (subnet)")]
    assert (saved["widths"], saved["parameters"]) == (subnet.config.hidden_sizes, subnet.num_parameters())
    card = (out / "subnet" / "README.md").read_text()
    assert f"Of {len(results['shapes'])} measured shapes, it is the one with the lowest loss on validation" in card
    assert "All shapes were trained at once" in (out / "model" / "README.md").read_text()
    assert subnet.num_parameters() <= budget + model.config.hidden_size**2 * 2  # the head is not that of masked LM
    affordable = [record for record in records if space.num_parameters(record["shape"]) <= budget]
    assert subnet.config.hidden_sizes == min(affordable, key=lambda record: record["task_loss"])["shape"]
    assert "fine-tuned on the task sst2 at once" in (out / "subnet" / "README.md").read_text()
    assert (out / "search" / "report.md").exists()
    page = (out / "search" / "explorer.html").read_text()
    assert json.dumps(f'supernet = "{out / "model"}"')[1:-1] in page
    assert (out / "search" / "scores.png").read_bytes()[:4] == b"\x89PNG"
    again = tune(
        out, supernet, files, tokenizer, sandwich=True, max_cost=budget, num_shapes=12, num_train_epochs=12
    )  # fmt: skip
    assert again == results
    assert json.loads((out / "results.json").read_text())["best_seed"] == 0


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")
def test_shapes_are_measured_again_if_a_further_seed_is_better(tokenizer, tmp_path):
    files = write_task(tmp_path)
    supernet = write_supernet(tmp_path / "supernet", tokenizer, **NO_DROPOUT)
    options = {"sandwich": True, "num_shapes": 12, "num_train_epochs": 2}
    expected = tune(tmp_path / "whole", supernet, files, tokenizer, seeds=[0, 1, 2], **options)
    scores = {run["seed"]: run["scores"]["validation"]["accuracy"] for run in expected["seeds"]}
    for seed in sorted(scores, key=scores.get):  # the best one last
        results = tune(tmp_path / "out", supernet, files, tokenizer, seeds=[seed], **options)
    assert results == expected


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")
def test_budget_in_flops_is_of_sequences_of_max_length(tokenizer, tmp_path):
    """A budget that no shape could meet at 128 tokens."""
    files = write_task(tmp_path)
    supernet = write_supernet(tmp_path / "supernet", tokenizer)
    config = SuperShaperConfig.from_pretrained(supernet)
    space = SearchSpace.from_config(config, "SuperShaperForSequenceClassification")
    budget = 3 * space.flops(space.smallest, 12)
    tune(
        tmp_path / "out", supernet, files, tokenizer, sandwich=True, max_cost=budget, cost="flops", max_steps=1,
        num_shapes=12,
    )  # fmt: skip
    subnet = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "subnet")
    assert space.flops(subnet.config.hidden_sizes, 12) <= budget
