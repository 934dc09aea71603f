import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import HEADS, assert_same, randomize, tiny_batch, tiny_bert_config, tiny_config, tiny_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import BertModel

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM, SuperShaperForMultipleChoice, SuperShaperModel
from supershaper_hf.model.modeling_supershaper import IGNORE_INDEX
from supershaper_hf.training import sandwich
from supershaper_hf.training.arguments import SuperPretrainingArguments
from supershaper_hf.training.distillation import Largest, Objective, watch_layers
from supershaper_hf.training.loop import checkpoint_layers
from supershaper_hf.training.losses import pooled_loss, state_loss
from supershaper_hf.training.preparing import freeze
from supershaper_hf.training.sandwich import (
    count_positions,
    decay_groups,
    exchange_gradients,
    order_of_passes,
    sandwich_step,
    shares_of_step,
    step_shapes,
)
from supershaper_hf.training.teacher import OutsideTeacher


SPACE = SearchSpace(tiny_config())
SHAPES = [[48, 48, 48], [8, 8, 8], [20, 0, 36]]
PADDING = 0


def undropped_model(model_class=SuperShaperForMaskedLM, **changes):
    return tiny_model(model_class, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)


def labelled(batch, every):
    """Label every n-th token that is no padding."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    labels[torch.arange(labels.numel()).view_as(labels) % every > 0] = IGNORE_INDEX
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


@pytest.fixture
def batch():
    return labelled(tiny_batch(batch=4, length=9), every=3)


@pytest.fixture
def micro_batches():
    """Unequal in sequences, length, padding and share of labels."""
    sizes = [(1, 12, 5), (4, 7, 2), (2, 9, 3)]
    return [labelled(tiny_batch(batch=n, length=m, seed=m), every) for n, m, every in sizes]


def joined(batches):
    """One batch of all sequences, padded to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    padding = {"input_ids": PADDING, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: torch.cat(
            [torch.nn.functional.pad(b[name], (0, longest - b[name].shape[1]), value=value) for b in batches]
        )
        for name, value in padding.items()
    }


def outside_teacher():
    return OutsideTeacher(randomize(BertModel(tiny_bert_config(hidden_size=32, num_hidden_layers=2)), seed=1))


def original():
    """A teacher of the width of the student."""
    return OutsideTeacher(randomize(BertModel(tiny_bert_config()), seed=1))


OBJECTIVES = {
    "labels": lambda: Objective(),
    "distillation": lambda: Objective(distillation_weight=0.4, temperature=2.0),
    "alpha": lambda: Objective(distillation_weight=0.4, divergence="alpha"),
    "hidden": lambda: Objective(hidden_weight=0.5),
    "attention": lambda: Objective(attention_weight=0.5),
    "outside": lambda: Objective(teacher=outside_teacher(), teacher_weight=0.5),
    "original": lambda: Objective(teacher=original(), state_weight=0.5, pooled_weight=0.3),
    "all": lambda: Objective(
        distillation_weight=0.3,
        hidden_weight=0.2,
        attention_weight=0.3,
        teacher=original(),
        teacher_weight=0.4,
        relation_heads=2,
        state_weight=0.5,
        pooled_weight=0.6,
        pooling="cls",
    ),
}


@pytest.fixture(params=list(OBJECTIVES))
def objective(request):
    return OBJECTIVES[request.param]()


@pytest.fixture
def accelerator():
    return Accelerator()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def step(accelerator, model, batches, objective, shapes=SHAPES):
    """Return the gradients and the losses of one step."""
    model.zero_grad()
    losses = sandwich_step(accelerator, model, batches, shapes, objective)
    return gradients(model), losses


def assert_equal_but_for_rounding(actual, expected):
    """Gradients agree to a millionth of the largest."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert_same(actual, expected, atol=1e-6 * largest)


# The shapes of a step


def arguments(**changes):
    return SuperPretrainingArguments(**changes)


def test_sandwich_has_the_largest_then_the_smallest_then_random_shapes():
    largest, smallest, *drawn = step_shapes(SPACE, arguments(random_shapes=4), 0)
    assert (largest, smallest) == (SPACE.largest, SPACE.smallest)
    assert len(drawn) == 4
    assert all(SPACE.validate(shape) == shape for shape in drawn)


def test_sandwich_without_random_shapes_has_the_two_ends():
    assert step_shapes(SPACE, arguments(random_shapes=0), 0) == [SPACE.largest, SPACE.smallest]


def test_random_sampling_has_random_shapes_only():
    drawn = step_shapes(SPACE, arguments(sampling="random", random_shapes=3), 5)
    assert drawn == SPACE.sample(3, (0, 5)).tolist()
    assert drawn == step_shapes(SPACE, arguments(random_shapes=3), 5)[2:]


def test_smallest_sampling_is_a_sandwich_without_the_largest():
    _, smallest, *drawn = step_shapes(SPACE, arguments(random_shapes=3, drop_rate=0.3), 5)
    assert step_shapes(SPACE, arguments(sampling="smallest", random_shapes=3, drop_rate=0.3), 5) == [smallest, *drawn]
    assert step_shapes(SPACE, arguments(sampling="smallest", random_shapes=0), 5) == [SPACE.smallest]


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=str)
def test_fixed_sampling_has_the_one_shape(shape):
    assert step_shapes(None, arguments(sampling="fixed", shape=shape, random_shapes=3), 5) == [shape]


def test_shapes_are_drawn_from_seed_and_step_alone():
    first = step_shapes(SPACE, arguments(seed=1, random_shapes=4), 2)
    step_shapes(SPACE, arguments(seed=1, random_shapes=4), 3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert (
        step_shapes(SPACE, arguments(seed=1, random_shapes=4, per_device_train_batch_size=7, learning_rate=1.0), 2)
        == first
    )


def test_every_seed_and_step_has_shapes_of_its_own():
    drawn = [str(step_shapes(SPACE, arguments(seed=s, random_shapes=4), n)) for s in range(4) for n in range(4)]
    assert len(set(drawn)) == 16


def test_layers_are_dropped_from_random_shapes_and_never_from_the_ends():
    steps = [step_shapes(SPACE, arguments(drop_rate=0.6, random_shapes=2), n) for n in range(20)]
    assert all(shapes[:2] == [SPACE.largest, SPACE.smallest] for shapes in steps)
    assert sum(shape.count(0) for shapes in steps for shape in shapes[2:]) > 40
    assert not any(0 in shape for n in range(20) for shape in step_shapes(SPACE, arguments(random_shapes=2), n))


@pytest.mark.parametrize("distribution", ["uniform", "parameters", "budget"])
def test_random_shapes_come_from_the_distribution(distribution):
    drawn = step_shapes(SPACE, arguments(distribution=distribution, random_shapes=5, seed=3), 4)[2:]
    assert drawn == SPACE.sample(5, (3, 4), distribution).tolist()


# Gradients


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0), (1.0, 0.5)])
def test_gradients_are_the_sum_of_those_of_every_shape(accelerator, batch, weight, temperature):
    model = undropped_model()
    chosen = batch["labels"] != IGNORE_INDEX
    labels = batch["labels"][chosen]
    inputs = (batch["input_ids"], batch["attention_mask"])
    teacher = model(*inputs).logits[chosen].detach()
    for number, shape in enumerate(SHAPES):
        logits = model(*inputs, shape=shape).logits[chosen]
        hard = -logits.log_softmax(-1)[range(len(labels)), labels].mean()
        targets = (teacher / temperature).softmax(-1)
        soft = -(targets * (logits / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2
        share = 0.0 if number == 0 else weight
        ((1 - share) * hard + share * soft).backward()
    expected = gradients(model)
    actual, _ = step(accelerator, model, [batch], Objective(weight, temperature))
    assert_same(actual, expected)


def test_the_first_shape_teaches_and_the_others_do_not(accelerator, batch):
    """The gradient of three shapes is that of two pairs with the same teacher, which is then counted once too often."""
    model, objective = undropped_model(), OBJECTIVES["all"]()
    teacher, _ = step(accelerator, model, [batch], objective, SHAPES[:1])
    first, _ = step(accelerator, model, [batch], objective, SHAPES[:2])
    second, _ = step(accelerator, model, [batch], objective, [SHAPES[0], SHAPES[2]])
    together, _ = step(accelerator, model, [batch], objective)
    expected = {
        name: first.get(name, 0) + second.get(name, 0) - teacher.get(name, torch.zeros(())) for name in together
    }
    assert_same(together, expected)


def test_layer_losses_enter_with_their_gradients(accelerator, batch):
    """Autograd through the objective by hand, on one batch, where every share is 1."""
    model, objective = undropped_model(), OBJECTIVES["all"]()
    outside, largest = objective.teacher(batch), None
    for shape in SHAPES:
        with watch_layers(model, objective.layers(shape)) as activations:
            output = model(**batch, shape=shape, sparse_prediction=True)
        layer_loss = objective.layer_loss(activations, batch["attention_mask"], largest, outside)
        states = model.bert(batch["input_ids"], batch["attention_mask"], shape=shape).last_hidden_state, outside.state
        end_loss = 0.5 * state_loss(*states, batch["attention_mask"])
        end_loss = end_loss + 0.6 * pooled_loss(*states, batch["attention_mask"], "cls")
        (objective.label_loss(output, largest) + layer_loss + end_loss).backward()
        largest = largest or Largest.of(output, activations)
    expected = gradients(model)
    actual, _ = step(accelerator, model, [batch], objective)
    assert_same(actual, expected, atol=1e-6)


def test_micro_batches_give_the_gradient_of_one_large_batch(accelerator, micro_batches, objective):
    model = undropped_model()
    expected, expected_losses = step(accelerator, model, [joined(micro_batches)], objective)
    actual, losses = step(accelerator, model, micro_batches, objective)
    assert_equal_but_for_rounding(actual, expected)
    assert_same(losses, expected_losses, atol=1e-6)


def test_one_fixed_shape_is_plain_training(accelerator, batch):
    model = undropped_model()
    model(**batch).loss.backward()
    expected = gradients(model)
    actual, _ = step(accelerator, model, [batch], Objective(), [None])
    assert_same(actual, expected, atol=1e-6)


def test_the_models_own_shape_can_learn_from_an_outside_teacher(accelerator, batch):
    model, objective = undropped_model(), OBJECTIVES["outside"]()
    expected, _ = step(accelerator, model, [batch], objective, [SPACE.largest])
    actual, _ = step(accelerator, model, [batch], objective, [None])
    assert_same(actual, expected, atol=0)


def test_gradients_are_added_to_those_there_are(accelerator, batch):
    model = undropped_model()
    once, _ = step(accelerator, model, [batch], Objective())
    sandwich_step(accelerator, model, [batch], SHAPES, Objective())
    assert_same(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


def test_gradients_agree_with_and_without_checkpointing(accelerator, micro_batches, objective):
    plain, checkpointed = undropped_model().train(), undropped_model().train()
    checkpoint_layers(checkpointed, True)
    expected, expected_losses = step(accelerator, plain, micro_batches, objective)
    actual, losses = step(accelerator, checkpointed, micro_batches, objective)
    assert_same(actual, expected, atol=1e-6)
    assert_same(losses, expected_losses, atol=1e-6)


# Losses


@pytest.mark.parametrize("name", ["labels", "all"])
def test_losses_are_means_over_all_labels_of_the_step(accelerator, micro_batches, name):
    """They are the masked-LM losses, whatever else the shapes learn from."""
    model = undropped_model()
    _, losses = step(accelerator, model, micro_batches, OBJECTIVES[name]())
    counts = [count_positions(batch)[0] for batch in micro_batches]
    assert len(set(counts)) == 3
    with torch.no_grad():
        sums = [
            sum(n * model(**batch, shape=shape).loss for n, batch in zip(counts, micro_batches, strict=True))
            for shape in SHAPES
        ]
    assert not losses.requires_grad
    assert_same(losses, torch.stack(sums) / sum(counts))


def without_labels(batch):
    return batch | {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)}


@pytest.mark.parametrize("name", ["labels", "distillation", "alpha"])
@pytest.mark.parametrize("position", [0, 1], ids=["first", "last"])
def test_micro_batch_without_labels_contributes_nothing(accelerator, batch, name, position):
    model = undropped_model()
    expected, expected_losses = step(accelerator, model, [batch], OBJECTIVES[name]())
    batches = [batch]
    batches.insert(position, without_labels(tiny_batch(batch=3, length=12) | {"labels": torch.zeros(3, 12).long()}))
    actual, losses = step(accelerator, model, batches, OBJECTIVES[name]())
    assert_same(actual, expected, atol=1e-6)
    assert_same(losses, expected_losses, atol=1e-6)


def test_step_without_any_label_has_loss_zero_and_changes_nothing(accelerator, batch):
    model = undropped_model()
    moved, losses = step(accelerator, model, [without_labels(batch)] * 2, OBJECTIVES["distillation"]())
    assert losses.tolist() == [0.0, 0.0, 0.0]
    assert all((gradient == 0).all() for gradient in moved.values())


def test_every_parameter_has_a_gradient_without_labels_too(accelerator, batch):
    """Processes exchange gradients: none may miss those that the others have."""
    model, objective = undropped_model(), Objective()
    labels, _ = step(accelerator, model, [batch], objective)
    none, _ = step(accelerator, model, [without_labels(batch)], objective)
    assert none.keys() == labels.keys() == dict(model.named_parameters()).keys()


def test_tokens_without_labels_still_learn_from_the_layers(accelerator, micro_batches):
    """These losses are means over all tokens, so a micro-batch counts by its tokens, labelled or not."""
    model, objective = undropped_model(), OBJECTIVES["all"]()
    batches = [*micro_batches[:2], without_labels(micro_batches[2])]
    expected, _ = step(accelerator, model, [joined(batches)], objective)
    actual, losses = step(accelerator, model, batches, objective)
    assert losses.isfinite().all()
    assert_equal_but_for_rounding(actual, expected)


# Without labels


def without_labels_objective(**changes):
    values = {"labels": False, "state_weight": 0.5, "pooled_weight": 0.3}
    return Objective(teacher=original(), **{**values, **changes})


def test_without_labels_the_original_alone_teaches(accelerator, micro_batches):
    """By hand: a mean over all tokens and a mean over all sequences of the step. The first is what is reported."""
    model, objective = undropped_model(SuperShaperModel), without_labels_objective()
    batches = [without_labels(batch) for batch in micro_batches]
    states, pooled = [], []
    for shape in SHAPES:
        errors, cosines = [], []
        for batch in batches:
            inputs, real = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"] == 1
            s = model(**inputs, shape=shape).last_hidden_state
            t = objective.teacher.model(**inputs).last_hidden_state
            errors += [(s - t)[real].square().sum(-1) / t[real].square().sum(-1)]
            for row, other, mask in zip(s, t, real):
                cosines.append(torch.nn.functional.cosine_similarity(row[mask].mean(0), other[mask].mean(0), dim=0))
        states.append(torch.cat(errors).mean())
        pooled.append(1 - torch.stack(cosines).mean())
    (0.5 * sum(states) + 0.3 * sum(pooled)).backward()
    expected = gradients(model)
    actual, losses = step(accelerator, model, batches, objective)
    assert_same(losses, torch.stack(states).detach(), atol=1e-6)
    assert_equal_but_for_rounding({name: actual[name] for name in expected}, expected)
    assert not any(actual[name].any() for name in actual.keys() - expected.keys())


@pytest.mark.parametrize("model_class", [head for head in HEADS if head is not SuperShaperForMultipleChoice])
def test_any_head_learns_as_the_bare_model_does(accelerator, micro_batches, model_class):
    batches = [without_labels(batch) for batch in micro_batches]
    bare, model = undropped_model(SuperShaperModel), undropped_model(model_class)
    model.base_model.load_state_dict(bare.state_dict(), strict=False)
    expected, expected_losses = step(accelerator, bare, batches, without_labels_objective())
    actual, losses = step(accelerator, model, batches, without_labels_objective())
    assert_same(losses, expected_losses, atol=0)
    moved = {name.removeprefix("bert."): gradient for name, gradient in actual.items() if gradient.any()}
    assert_same(moved, {name: gradient for name, gradient in expected.items() if gradient.any()}, atol=1e-7)


def test_head_does_not_run_without_labels(accelerator, batch):
    model, rows = undropped_model(), []
    model.cls["predictions"].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    step(accelerator, model, [without_labels(batch)], without_labels_objective())
    assert rows == [0, 0, 0]


def test_largest_shape_can_teach_layers_without_labels(accelerator, batch):
    model, objective = undropped_model(SuperShaperModel), without_labels_objective(hidden_weight=2.0)
    plain, _ = step(accelerator, model, [without_labels(batch)], without_labels_objective())
    taught, _ = step(accelerator, model, [without_labels(batch)], objective)
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(taught[name], plain[name])


def test_shares_are_of_labels_tokens_and_sequences(accelerator, micro_batches):
    counts = torch.tensor([[*count_positions(batch), len(batch["input_ids"])] for batch in micro_batches])
    assert_same(shares_of_step(accelerator, micro_batches), counts / counts.sum(0))


def test_positions_are_labels_and_tokens_that_are_no_padding():
    batch = labelled(tiny_batch(batch=2, length=9), every=2)
    assert count_positions(batch) == (int((batch["labels"] >= 0).sum()), 15)


# Processes and precision


def test_no_backward_pass_exchanges_gradients(accelerator, micro_batches, monkeypatch):
    """DDP would wait in it for every parameter, used or not."""
    events = []
    no_sync, backward = accelerator.no_sync, accelerator.backward

    def record_no_sync(model):
        events.append("no_sync")
        return no_sync(model)

    def record_backward(loss):
        events.append("backward")
        backward(loss)

    monkeypatch.setattr(accelerator, "no_sync", record_no_sync)
    monkeypatch.setattr(accelerator, "backward", record_backward)
    step(accelerator, undropped_model(), micro_batches, Objective())
    assert events == ["no_sync", "backward"] * 9


@pytest.mark.parametrize("bucket", [1, 100, 2**23])
def test_exchange_averages_the_gradients_there_are(monkeypatch, bucket):
    """Here two processes: this one, and one whose gradients are all 3."""
    model, exchanged = tiny_model(), []

    def all_reduce(flat):
        exchanged.append(len(flat))
        flat += 3

    monkeypatch.setattr(sandwich, "BUCKET", bucket)
    monkeypatch.setattr(sandwich.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(sandwich.distributed, "all_reduce", all_reduce)
    used = {name: p for name, p in model.named_parameters() if "layer.1" not in name}
    before = {name: torch.randn_like(parameter) for name, parameter in used.items()}
    for name, parameter in used.items():
        parameter.grad = before[name].clone()
    exchange_gradients(model)
    assert_same(gradients(model), {name: (gradient + 3) / 2 for name, gradient in before.items()}, atol=1e-6)
    assert sum(exchanged) == sum(parameter.numel() for parameter in used.values())
    assert len(exchanged) == {1: len(used), 2**23: 1}.get(bucket, len(exchanged))
    assert max(exchanged) <= bucket + max(parameter.numel() for parameter in used.values())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # that nothing writes to
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("last", [[48, 48, 48], [48, 0, 48], [20, 48, 48]], ids=str)
def test_sharded_gradients_of_all_passes_are_exchanged_in_the_last(batch, monkeypatch, frozen, last):
    """FSDP2 keeps the gradients of earlier passes until then. If shared weights are frozen, the last shape has none."""
    shapes, results = [[8, 20, 8], [0, 36, 20], last], []
    for sharded in (False, True):
        model = undropped_model(SuperShaperModel, bottlenecks="by_width")
        if frozen:
            freeze(model, arguments(mlm_probability=0, state_weight=1.0, shared_learning_rate_scale=0))
        if sharded:
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            if sharded:
                monkeypatch.setattr(Accelerator, "is_fsdp2", True)
                mesh = distributed.init_device_mesh("cpu", (1,))
                for layer in model.encoder.layer:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            for _ in range(2):  # nothing is left over for the next step
                found, _ = step(Accelerator(), model, [without_labels(batch)] * 2, without_labels_objective(), shapes)
            results.append({name: grad.full_tensor() if sharded else grad for name, grad in found.items()})
        finally:
            if sharded:
                distributed.destroy_process_group()
    expected, actual = results
    assert_same(actual, {name: gradient for name, gradient in expected.items() if name in actual}, atol=1e-6)
    assert not any(expected[name].any() for name in expected.keys() - actual.keys())


def test_shapes_that_learn_nothing_run_first():
    model, shapes = tiny_model(bottlenecks="by_width"), [[48, 48, 48], [8, 8, 8], [48, 0, 48], [48, 36, 48], None]
    assert order_of_passes(model, shapes) == [0, 1, 2, 3, 4]
    freeze(model, arguments(shared_learning_rate_scale=0))
    assert order_of_passes(model, shapes) == [0, 2, 4, 1, 3]
    model.cls.requires_grad_(True)
    assert order_of_passes(model, shapes) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("processes", [2, 5])
def test_loss_is_multiplied_by_the_processes_that_average_it(batch, monkeypatch, processes):
    model = undropped_model()
    expected, _ = step(Accelerator(), model, [batch], Objective(0.5))
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    monkeypatch.setattr(sandwich, "exchange_gradients", lambda model: None)
    actual, _ = step(Accelerator(), model, [batch], Objective(0.5))
    assert_same(actual, {name: processes * gradient for name, gradient in expected.items()})


def test_shares_are_of_the_positions_of_all_processes(accelerator, batch, monkeypatch):
    """Three more processes with as many labels and tokens each: this one's part is a quarter."""
    model = undropped_model()
    expected, expected_losses = step(accelerator, model, [batch], OBJECTIVES["all"]())
    monkeypatch.setattr(accelerator, "reduce", lambda counts: 4 * counts)
    actual, losses = step(accelerator, model, [batch], OBJECTIVES["all"]())
    assert_same(actual, {name: gradient / 4 for name, gradient in expected.items()})
    assert_same(losses, expected_losses / 4)


@pytest.fixture
def fresh_accelerator_state():
    """Accelerate keeps one precision for a whole process: forget it before and after a test of another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["distillation", "all"])
def test_bfloat16_agrees_roughly_with_full_precision(fresh_accelerator_state, micro_batches, name):
    full, full_losses = step(Accelerator(), undropped_model(), micro_batches, OBJECTIVES[name]())
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16")
    half, losses = step(accelerator, accelerator.prepare(undropped_model()), micro_batches, OBJECTIVES[name]())
    half = {key.removeprefix("module."): gradient for key, gradient in half.items()}
    assert losses.dtype == torch.float32
    assert_same(losses, full_losses, atol=0.05)
    assert not torch.equal(losses, full_losses)
    assert all(gradient.dtype == torch.float32 for gradient in half.values())
    difference = sum((half[key] - full[key]).square().sum() for key in full).sqrt()
    assert difference < 0.05 * sum(gradient.square().sum() for gradient in full.values()).sqrt()


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
