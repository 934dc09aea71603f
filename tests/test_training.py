import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import assert_same, run, tiny_batch, tiny_config, tiny_model
from test_data import original_tokens, random_documents

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM
from supershaper_hf import training as training_module
from supershaper_hf.data import fixed_masks, tokenize
from supershaper_hf.modeling_supershaper import IGNORE_INDEX
from supershaper_hf.training import (
    SuperPretrainingArguments,
    decay_groups,
    sandwich_shapes,
    sandwich_step,
    super_pretrain,
)


SPACE = SearchSpace(tiny_config())
SHAPES = [[48, 48, 48], [8, 8, 8], [20, 36, 8]]


def undropped_model(**changes):
    return tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def accelerator():
    return Accelerator()


@pytest.fixture
def dataset(tokenizer):
    return tokenize(random_documents(8, words=20), tokenizer, max_length=12)


@pytest.fixture
def batch(tokenizer, dataset):
    return fixed_masks(dataset, tokenizer, batch_size=len(dataset), masking_rate=0.4)[0]


# Arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1."),
        ({"batch_size": 0}, "batch_size=0 must be at least 1."),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1 must be at least 1."),
        ({"masking_rate": 1.5}, "masking_rate=1.5 must be between 0 and 1."),
        ({"distillation_weight": -0.1}, "distillation_weight=-0.1 must be between 0 and 1."),
        ({"warmup_ratio": 2}, "warmup_ratio=2 must be between 0 and 1."),
        ({"masking_rate": 0}, "masking_rate=0 must be above 0."),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0."),
        ({"random_shapes": -1}, "random_shapes=-1 must be 0 or more."),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'. Allowed: 'no', 'bf16', 'fp16'."),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(**changes)


def test_limits_themselves_are_allowed():
    SuperPretrainingArguments(max_steps=1, batch_size=1, distillation_weight=0, warmup_ratio=0, random_shapes=0)
    SuperPretrainingArguments(masking_rate=1, distillation_weight=1, warmup_ratio=1)


# The shapes of a step


def test_step_has_the_largest_the_smallest_and_random_shapes():
    largest, smallest, *drawn = sandwich_shapes(SPACE, 4, seed=0, step=0)
    assert (largest, smallest) == (SPACE.largest, SPACE.smallest)
    assert len(drawn) == 4
    assert all(SPACE.validate(shape) == shape for shape in drawn)


def test_no_random_shapes_leave_the_two_ends():
    assert sandwich_shapes(SPACE, 0, seed=0, step=0) == [SPACE.largest, SPACE.smallest]


def test_shapes_of_a_step_depend_on_seed_and_step_alone():
    first = sandwich_shapes(SPACE, 4, seed=1, step=2)
    sandwich_shapes(SPACE, 4, seed=1, step=3)
    torch.manual_seed(99)
    assert sandwich_shapes(SPACE, 4, seed=1, step=2) == first


def test_every_seed_and_step_has_shapes_of_its_own():
    drawn = [str(sandwich_shapes(SPACE, 4, seed, step)) for seed in range(4) for step in range(4)]
    assert len(set(drawn)) == 16


# The sandwich step


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_gradients_are_the_sum_of_those_of_every_shape(accelerator, batch, weight, temperature):
    model = undropped_model()
    labelled = batch["labels"] != IGNORE_INDEX
    labels = batch["labels"][labelled]
    teacher = model(**batch).logits[labelled].detach()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for shape in SHAPES:
        model.zero_grad()
        logits = model(batch["input_ids"], batch["attention_mask"], shape=shape).logits[labelled]
        hard = -logits.log_softmax(-1)[range(len(labels)), labels].mean()
        targets = (teacher / temperature).softmax(-1)
        soft = -(targets * (logits / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2
        share = 0.0 if shape == SPACE.largest else weight
        ((1 - share) * hard + share * soft).backward()
        for name, gradient in gradients(model).items():
            expected[name] += gradient
    model.zero_grad()
    sandwich_step(accelerator, model, batch, SHAPES, weight, temperature)
    assert_same(gradients(model), expected)


def test_step_returns_the_losses_on_the_labels(accelerator, batch):
    model = undropped_model()
    losses = sandwich_step(accelerator, model, batch, SHAPES, distillation_weight=0.7)
    assert not losses.requires_grad
    assert_same(losses, torch.stack([model(**batch, shape=shape).loss.detach() for shape in SHAPES]))


def test_step_of_one_shape_is_plain_training(accelerator, batch):
    model = undropped_model()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    sandwich_step(accelerator, model, batch, [None], distillation_weight=0.5)
    assert_same(gradients(model), expected)


def test_gradients_agree_with_and_without_checkpointing(accelerator, batch):
    plain, checkpointed = undropped_model().train(), undropped_model().train()
    newest = hasattr(checkpointed, "activation_checkpointing_enable")
    enable = checkpointed.activation_checkpointing_enable if newest else checkpointed.gradient_checkpointing_enable
    enable()
    for model in (plain, checkpointed):
        sandwich_step(accelerator, model, batch, SHAPES, distillation_weight=0.5)
    assert_same(gradients(checkpointed), gradients(plain), atol=1e-6)


def test_batch_without_labels_changes_nothing(accelerator, batch):
    model = undropped_model()
    unlabelled = batch | {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    sandwich_step(accelerator, model, unlabelled, SHAPES, distillation_weight=0.5)
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_one_optimiser_step_of_two_micro_batches_is_one_of_their_mean(batch):
    """Accumulation divides each micro-batch by their number and steps once, after the last."""
    model = undropped_model()
    sandwich_step(Accelerator(), model, batch, SHAPES, distillation_weight=0.5)
    expected = gradients(model)
    model.zero_grad()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    for is_last in (False, True):
        with accelerator.accumulate(model):
            sandwich_step(accelerator, model, batch, SHAPES, distillation_weight=0.5)
            assert accelerator.sync_gradients == is_last
    assert_same(gradients(model), expected)


# The optimiser


def test_matrices_decay_and_vectors_do_not():
    model = tiny_model()
    decaying, steady = decay_groups(model, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decaying["weight_decay"], steady["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(parameter)].endswith(".weight") for parameter in decaying["params"])
    assert not any("LayerNorm" in names[id(parameter)] for parameter in decaying["params"])
    assert all(re.search(r"LayerNorm\.weight$|bias$", names[id(parameter)]) for parameter in steady["params"])


def test_every_parameter_is_in_one_group():
    model = tiny_model()
    grouped = [id(parameter) for group in decay_groups(model, 0.1) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


# The loop


@pytest.fixture
def fresh_accelerator_state():
    """Accelerate keeps one precision for a whole process: forget it before and after a test of another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pretrain(tokenizer, dataset, model=None, single_shape=False, **changes):
    model = tiny_model() if model is None else model
    args = SuperPretrainingArguments(**{"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, **changes})
    return model, super_pretrain(model, tokenizer, dataset, args, single_shape=single_shape)


def record_steps(setattr):
    """Record what `sandwich_step` is given: the batch, the shapes, and whether the optimiser steps after it."""
    calls = []

    def record(accelerator, model, batch, shapes, *args):
        calls.append({"batch": batch, "shapes": shapes, "last": accelerator.sync_gradients})
        return sandwich_step(accelerator, model, batch, shapes, *args)

    setattr(training_module, "sandwich_step", record)
    return calls


@pytest.fixture
def steps(monkeypatch):
    return record_steps(monkeypatch.setattr)


def test_loss_of_every_shape_falls(tokenizer, dataset):
    model = SuperShaperForMaskedLM(tiny_config())
    _, history = pretrain(tokenizer, dataset, model, max_steps=60, learning_rate=5e-3)
    for first, *_, last in zip(*(record["loss"] for record in history)):
        assert last < first - 0.5


def test_history_has_one_record_per_step(tokenizer, dataset):
    _, history = pretrain(tokenizer, dataset, max_steps=5, random_shapes=2, gradient_accumulation_steps=3)
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5]
    assert [len(record["loss"]) for record in history] == [4] * 5
    assert all(math.isfinite(loss) for record in history for loss in record["loss"])


def test_learning_rate_rises_and_falls_over_the_steps(tokenizer, dataset):
    _, history = pretrain(tokenizer, dataset, max_steps=10, warmup_ratio=0.2, gradient_accumulation_steps=2)
    rising, falling = [0, 1 / 2], [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [record["learning_rate"] / 1e-3 for record in history] == pytest.approx([*rising, *falling])


def test_same_seed_trains_the_same_weights(tokenizer, dataset):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(pretrain(tokenizer, dataset, seed=5))
    (first, first_history), (second, second_history) = runs
    assert_same(first.state_dict(), second.state_dict(), atol=0)
    assert first_history == second_history


def test_another_seed_trains_other_weights(tokenizer, dataset):
    first, _ = pretrain(tokenizer, dataset, seed=5)
    second, _ = pretrain(tokenizer, dataset, seed=6)
    assert not torch.equal(first.bert.embeddings.word_embeddings.weight, second.bert.embeddings.word_embeddings.weight)


def test_every_step_draws_the_shapes_of_its_seed_and_number(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, seed=7)
    assert [step["shapes"] for step in steps] == [sandwich_shapes(SPACE, 1, 7, number) for number in range(3)]


def test_micro_batches_of_a_step_share_its_shapes(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, seed=7, max_steps=2, batch_size=2, gradient_accumulation_steps=3)
    assert [step["last"] for step in steps] == [False, False, True] * 2
    assert [step["shapes"] for step in steps] == [sandwich_shapes(SPACE, 1, 7, number) for number in (0, 0, 0, 1, 1, 1)]


def test_steps_accumulate_over_the_end_of_the_text(tokenizer, dataset, steps):
    """Three batches a round and two a step: the third batch waits for the next round."""
    pretrain(tokenizer, dataset.select(range(6)), max_steps=3, batch_size=2, gradient_accumulation_steps=2)
    assert [step["last"] for step in steps] == [False, True] * 3


def test_masks_are_drawn_anew_in_every_round(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset.select([0]), max_steps=3, masking_rate=0.5)
    labels = [step["batch"]["labels"] for step in steps]
    assert not torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[1], labels[2])


def test_every_round_reads_all_sequences_in_an_order_of_its_own(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, max_steps=2, batch_size=len(dataset))
    first, second = (original_tokens(step["batch"]).tolist() for step in steps)
    assert first != second
    assert sorted(first) == sorted(second)


def test_masking_rate_reaches_the_batches(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, max_steps=1, masking_rate=1.0)
    batch = steps[0]["batch"]
    assert ((batch["labels"] == IGNORE_INDEX).sum(dim=1) == 2 + (batch["attention_mask"] == 0).sum(dim=1)).all()


def test_fewer_sequences_than_a_batch_are_trained_on(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset.select(range(3)), batch_size=8)
    assert [len(step["batch"]["input_ids"]) for step in steps] == [3, 3, 3]


def test_no_gradients_are_left(tokenizer, dataset):
    model, _ = pretrain(tokenizer, dataset)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_clipped(tokenizer, dataset, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    pretrain(tokenizer, dataset, max_grad_norm=0.01)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_weight_decay_shrinks_matrices_only(tokenizer, dataset):
    plain, _ = pretrain(tokenizer, dataset, max_steps=1, warmup_ratio=0.0)
    decayed, _ = pretrain(tokenizer, dataset, max_steps=1, warmup_ratio=0.0, weight_decay=10.0)
    start = tiny_model().state_dict()
    for name, weight in decayed.state_dict().items():
        lost = plain.state_dict()[name] - weight
        assert_same(lost, 1e-3 * 10.0 * start[name] if weight.ndim >= 2 else torch.zeros_like(lost), atol=1e-6)


def test_frozen_parameters_stay(tokenizer, dataset):
    model = tiny_model()
    model.bert.requires_grad_(False)
    pretrain(tokenizer, dataset, model, single_shape=True, weight_decay=0.1)
    before = tiny_model().state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_model_is_left_in_evaluation_mode(tokenizer, dataset):
    model, _ = pretrain(tokenizer, dataset, tiny_model().train())
    assert not any(module.training for module in model.modules())


def test_forward_is_left_in_full_precision(tokenizer, dataset, fresh_accelerator_state):
    model, _ = pretrain(tokenizer, dataset, mixed_precision="bf16")
    twin = tiny_model()
    twin.load_state_dict(model.state_dict())
    assert_same(run(model, tiny_batch()), run(twin, tiny_batch()), atol=0)


def test_dropout_is_on_while_training(tokenizer, dataset):
    plain, _ = pretrain(tokenizer, dataset, undropped_model())
    dropped, _ = pretrain(tokenizer, dataset, tiny_model(hidden_dropout_prob=0.5))
    assert not torch.equal(plain.bert.embeddings.word_embeddings.weight, dropped.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=["supernet", "subnet"])
def test_single_shape_trains_the_models_own_shape(tokenizer, dataset, steps, shape):
    model = tiny_model() if shape is None else tiny_model().extract_subnet(shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, history = pretrain(tokenizer, dataset, model, single_shape=True)
    assert [step["shapes"] for step in steps] == [[None]] * 3
    assert [len(record["loss"]) for record in history] == [1] * 3
    unchanged = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert unchanged == []


def test_subnet_has_no_shapes_to_sample(tokenizer, dataset):
    with pytest.raises(ValueError, match=re.escape("belongs to a subnet with fixed hidden_sizes=[8, 36]")):
        pretrain(tokenizer, dataset, tiny_model().extract_subnet([8, 0, 36]))


def test_tokenizer_of_another_vocabulary_is_refused(tokenizer, dataset):
    with pytest.raises(ValueError, match="The tokenizer has 20 tokens, but the model has vocab_size=19"):
        pretrain(tokenizer, dataset, tiny_model(vocab_size=19))


# Two processes

RANK = """
import signal, sys

signal.alarm(60)  # ends a deadlock

import torch
from accelerate import Accelerator
from conftest import SPECIAL_TOKENS, WORDS, tiny_model
from test_training import *
from transformers import BertTokenizer

accelerator = Accelerator()
rank, count = accelerator.process_index, accelerator.num_processes
tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
dataset = tokenize(random_documents(8, words=20), tokenizer, max_length=12)

model = undropped_model()
share = {name: tensor.chunk(count)[rank] for name, tensor in evenly_labelled_batch(tokenizer, dataset).items()}
sandwich_step(accelerator, accelerator.prepare(model), share, SHAPES, distillation_weight=0.5)

steps = record_steps(setattr)
trained, history = pretrain(tokenizer, dataset, batch_size=4, max_steps=5)
few, _ = pretrain(tokenizer, dataset.select(range(5)), batch_size=4)
result = {
    "processes": count,
    "gradients": gradients(model),
    "weights": trained.state_dict(),
    "weights from few sequences": few.state_dict(),
    "shapes": [step["shapes"] for step in steps],
    "inputs": [step["batch"]["input_ids"].tolist() for step in steps],
    "learning rates": [record["learning_rate"] for record in history],
}
torch.save(result, f"{sys.argv[1]}/rank{rank}.pt")
accelerator.end_training()
"""


def evenly_labelled_batch(tokenizer, dataset):
    """Eight sequences of two labels each: the mean over the batch is the mean over its halves."""
    (batch,) = fixed_masks(dataset, tokenizer, batch_size=len(dataset), masking_rate=0.5)
    excess = (batch["labels"] != IGNORE_INDEX).cumsum(dim=1) > 2
    labels = batch["labels"].masked_fill(excess, IGNORE_INDEX)
    enough = (labels != IGNORE_INDEX).sum(dim=1) == 2
    return {name: tensor[enough][:8] for name, tensor in {**batch, "labels": labels}.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes computed under torch's launcher."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    # `accelerate launch --cpu` starts one process only, whatever it is told; on several it runs torchrun.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [*launcher, str(folder / "rank.py"), str(folder)]
    subprocess.run(command, env=environment, check=True)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_launcher_started_two_processes(ranks):
    assert [rank["processes"] for rank in ranks] == [2, 2]


def test_gradients_agree_with_one_process_at_equal_global_batch(ranks, accelerator, tokenizer, dataset):
    model, batch = undropped_model(), evenly_labelled_batch(tokenizer, dataset)
    assert len(batch["labels"]) == 8
    sandwich_step(accelerator, model, batch, SHAPES, distillation_weight=0.5)
    assert_same(ranks[0]["gradients"], gradients(model))
    assert_same(ranks[1]["gradients"], gradients(model))


@pytest.mark.parametrize("weights", ["weights", "weights from few sequences"])
def test_processes_end_with_the_same_weights(ranks, weights):
    assert_same(ranks[0][weights], ranks[1][weights], atol=0)


def test_processes_draw_the_same_shapes(ranks):
    assert ranks[0]["shapes"] == ranks[1]["shapes"]
    assert ranks[0]["shapes"][:5] == [sandwich_shapes(SPACE, 1, 0, step) for step in range(5)]


def test_processes_train_on_different_sequences(ranks):
    assert all(first != second for first, second in zip(ranks[0]["inputs"][:5], ranks[1]["inputs"][:5], strict=True))


def test_learning_rate_does_not_depend_on_the_number_of_processes(ranks, tokenizer, dataset):
    _, history = pretrain(tokenizer, dataset, max_steps=5, batch_size=4)
    assert ranks[0]["learning rates"] == pytest.approx([record["learning_rate"] for record in history])
