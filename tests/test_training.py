import importlib.util
import json
import math
import re
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from conftest import assert_same, randomize, run, tiny_batch, tiny_bert_config, tiny_config, tiny_model
from test_data import original_tokens, random_documents
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertModel

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM
from supershaper_hf import progress as progress_module
from supershaper_hf import training as training_module
from supershaper_hf.arguments import SuperPretrainingArguments
from supershaper_hf.batches import MicroBatches, fixed_masks
from supershaper_hf.checkpoints import MANIFEST, list_checkpoints, seal
from supershaper_hf.costs import training_flops
from supershaper_hf.data import tokenize
from supershaper_hf.distillation import OutsideTeacher
from supershaper_hf.elastic import SuperShaperLayer
from supershaper_hf.evaluation import evaluate_shapes
from supershaper_hf.modeling_supershaper import IGNORE_INDEX
from supershaper_hf.report import markdown_table
from supershaper_hf.sandwich import sandwich_step, step_shapes
from supershaper_hf.training import derive_seed, evaluation_shapes, make_accelerator, super_pretrain


SPACE = SearchSpace(tiny_config())
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def no_measured_peak(monkeypatch):
    """Measuring it takes a fifth of a second in each run."""
    monkeypatch.setattr(progress_module, "matrix_product_rate", lambda *_: 1e9)


@pytest.fixture
def dataset(tokenizer):
    return tokenize(random_documents(8, words=20), tokenizer, max_length=12)


@pytest.fixture
def eval_batches(tokenizer):
    return fixed_masks(tokenize(random_documents(4, seed=1), tokenizer, 12), tokenizer, 8, masking_rate=0.4)


@pytest.fixture
def fresh_accelerator_state():
    """Accelerate keeps one precision for a whole process: forget it before and after a test of another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(**changes):
    values = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "max_length": 12}
    return SuperPretrainingArguments(**{**values, **changes})


def pretrain(tokenizer, dataset, model=None, eval_batches=(), teacher=None, card=None, **changes):
    """Train a tiny model for a few steps; return it and the summary."""
    model = tiny_model() if model is None else model
    args = arguments(**changes)
    return model, super_pretrain(model, tokenizer, dataset, args, eval_batches=eval_batches, teacher=teacher, card=card)


def step_records(summary):
    return [record for record in summary.records if "loss" in record]


def losses(summary):
    return [record["loss"] for record in step_records(summary)]


def copied_weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_trained_alike(actual, expected):
    """Weights agree within 1e-5.

    But for biases of keys: softmax does not see them, so their gradient is rounding noise, which AdamW scales up.
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
    monkeypatch.setattr(training_module.logger, "warning", messages.append)
    return messages


# The loop


def test_loss_of_every_shape_falls(tokenizer, dataset):
    model = SuperShaperForMaskedLM(tiny_config())
    _, summary = pretrain(tokenizer, dataset, model, max_steps=60, learning_rate=5e-3)
    for first, *_, last in zip(*losses(summary), strict=True):
        assert last < first - 0.5


def test_every_logged_step_has_a_record_with_the_loss_of_every_shape(tokenizer, dataset):
    _, summary = pretrain(tokenizer, dataset, max_steps=5, random_shapes=2, gradient_accumulation_steps=2)
    assert [record["step"] for record in step_records(summary)] == [1, 2, 3, 4, 5]
    assert [len(values) for values in losses(summary)] == [4] * 5
    assert all(math.isfinite(loss) for values in losses(summary) for loss in values)


def test_recorded_losses_are_those_of_the_step(tokenizer, dataset, steps):
    _, summary = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), max_steps=2)
    for call, record in zip(steps, step_records(summary), strict=True):
        model = tiny_model(**NO_DROPOUT)
        model.load_state_dict(call["weights"])
        with torch.no_grad():
            expected = [model(**call["batches"][0], shape=shape).loss.item() for shape in call["shapes"]]
        assert record["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("linear", [0, 1 / 2, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant_with_warmup", [0, 1 / 2, *[1] * 8]),
        ("cosine", [0, 1 / 2, *[(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]]),
    ],
)
def test_learning_rate_follows_the_schedule(tokenizer, dataset, scheduler, rates):
    changes = {"lr_scheduler_type": scheduler, "warmup_ratio": 0.15, "gradient_accumulation_steps": 2, "batch_size": 2}
    _, summary = pretrain(tokenizer, dataset, max_steps=10, **changes)
    assert [record["learning_rate"] / 1e-3 for record in step_records(summary)] == pytest.approx(rates)


def test_recorded_learning_rate_is_the_one_applied(tokenizer, dataset, monkeypatch):
    applied, step = [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        applied.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    _, summary = pretrain(tokenizer, dataset, max_steps=4, warmup_ratio=0.5)
    assert applied == [[record["learning_rate"]] * 2 for record in step_records(summary)]


def test_same_seed_trains_the_same_weights(tokenizer, dataset):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(pretrain(tokenizer, dataset, seed=5))
    (first, first_summary), (second, second_summary) = runs
    assert_same(first.state_dict(), second.state_dict(), atol=0)
    assert losses(first_summary) == losses(second_summary)


def test_another_seed_trains_other_weights(tokenizer, dataset):
    first, _ = pretrain(tokenizer, dataset, seed=5)
    second, _ = pretrain(tokenizer, dataset, seed=6)
    assert not torch.equal(first.bert.embeddings.word_embeddings.weight, second.bert.embeddings.word_embeddings.weight)


def test_dropout_is_another_in_every_step_and_seed():
    seeds = {derive_seed(seed, step, rank) for seed in range(5) for step in range(5) for rank in range(5)}
    assert len(seeds) == 125


def test_dropout_is_drawn_from_seed_and_step(tokenizer, dataset, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), manual_seed(seed)))
    pretrain(tokenizer, dataset, seed=5)
    assert seeds == [derive_seed(5, step, 0) for step in range(3)]


def test_accumulated_micro_batches_train_the_weights_of_a_larger_batch(tokenizer):
    dataset = tokenize(random_documents(9, words=27), tokenizer, max_length=12)  # sequences of unequal length
    model, summary = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), max_steps=6)
    accumulated, accumulated_summary = pretrain(
        tokenizer, dataset, tiny_model(**NO_DROPOUT), max_steps=6, batch_size=2, gradient_accumulation_steps=4
    )
    assert_trained_alike(accumulated, model)
    torch.testing.assert_close(losses(accumulated_summary), losses(summary), atol=1e-5, rtol=0)


def test_workers_change_nothing(tokenizer, dataset, monkeypatch):
    workers, iterate = [], MicroBatches.iterate
    monkeypatch.setattr(
        MicroBatches, "iterate", lambda self, state: (workers.append(self.num_workers), iterate(self, state))[1]
    )
    first, _ = pretrain(tokenizer, dataset)
    second, _ = pretrain(tokenizer, dataset, num_workers=1)
    assert workers == [0, 1]
    assert_same(first.state_dict(), second.state_dict(), atol=0)


def test_gradient_checkpointing_changes_nothing(tokenizer, dataset):
    first, _ = pretrain(tokenizer, dataset)
    second, _ = pretrain(tokenizer, dataset, gradient_checkpointing=True)
    assert_same(first.state_dict(), second.state_dict(), atol=1e-6)


def test_layers_are_checkpointed_while_training_only(tokenizer, dataset, monkeypatch):
    def flags(model):
        return {layer.gradient_checkpointing for layer in model.modules() if isinstance(layer, SuperShaperLayer)}

    seen = []

    def record(accelerator, model, *args):
        seen.append(flags(model))
        return sandwich_step(accelerator, model, *args)

    monkeypatch.setattr(training_module, "sandwich_step", record)
    plain, _ = pretrain(tokenizer, dataset, max_steps=1)
    model, _ = pretrain(tokenizer, dataset, max_steps=1, gradient_checkpointing=True)
    assert seen == [{False}, {True}]
    assert flags(plain) == flags(model) == {False}


# What a step is given


def test_every_step_draws_the_shapes_of_its_seed_and_number(tokenizer, dataset, steps):
    changes = {"seed": 7, "random_shapes": 2, "distribution": "budget", "drop_rate": 0.3}
    pretrain(tokenizer, dataset, **changes)
    assert [step["shapes"] for step in steps] == [step_shapes(SPACE, arguments(**changes), n) for n in range(3)]


def test_steps_get_the_micro_batches_of_the_text_in_order(tokenizer, dataset, steps):
    changes = {"seed": 7, "batch_size": 2, "masking_rate": 0.4}
    pretrain(tokenizer, dataset, gradient_accumulation_steps=3, max_steps=2, **changes)
    expected = MicroBatches(dataset, tokenizer, **changes).iterate()
    assert [len(step["batches"]) for step in steps] == [3, 3]
    for step in steps:
        for batch in step["batches"]:
            assert_same(batch, next(expected)[0], atol=0)


def test_masks_are_drawn_anew_in_every_round(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset.select([0]), max_steps=3, batch_size=1, masking_rate=0.5)
    labels = [step["batches"][0]["labels"] for step in steps]
    assert not torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[1], labels[2])


def test_every_round_reads_all_sequences_in_an_order_of_its_own(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, max_steps=2, batch_size=len(dataset))
    first, second = (original_tokens(step["batches"][0]).tolist() for step in steps)
    assert first != second
    assert sorted(first) == sorted(second)


def test_losses_of_the_arguments_reach_the_step(tokenizer, dataset, steps):
    given = {"distillation_weight": 0.3, "temperature": 2.0, "hidden_weight": 0.1, "attention_weight": 0.2}
    given |= {"teacher_weight": 0.4, "relation_heads": 2}
    teacher = outside_teacher()
    pretrain(tokenizer, dataset, max_steps=1, teacher=teacher, **given)
    assert {name: getattr(steps[0]["objective"], name) for name in given} == given
    assert steps[0]["objective"].teacher is teacher


def test_divergence_reaches_the_step(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, max_steps=1, divergence="alpha")
    assert steps[0]["objective"].divergence == "alpha"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_weight": 0.5}, "teacher_weight=0.5 needs a teacher."),
        ({"max_length": 25}, "25"),
    ],
    ids=str,
)
def test_wrong_losses_and_lengths_are_refused(tokenizer, changes, message):
    tokenizer.model_max_length = 24
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, random_documents(8).to_iterable_dataset(), **changes)


# Sampling


def test_random_sampling_trains_random_shapes_only(tokenizer, dataset, steps):
    _, summary = pretrain(tokenizer, dataset, sampling="random", random_shapes=2, drop_rate=0.3)
    expected = [SPACE.sample(2, (0, n), drop_rate=0.3).tolist() for n in range(3)]
    assert [step["shapes"] for step in steps] == expected
    assert [len(values) for values in losses(summary)] == [2] * 3


def test_fixed_sampling_trains_one_shape(tokenizer, dataset, steps):
    before = copied_weights(tiny_model())
    model, _ = pretrain(tokenizer, dataset, sampling="fixed", shape=[8, 0, 36])
    assert [step["shapes"] for step in steps] == [[[8, 0, 36]]] * 3
    unchanged = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in unchanged if ".layer.1." in name} == {n for n in before if ".layer.1." in n}
    assert not any(".layer.0." in name or ".layer.2." in name for name in unchanged)


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=["supernet", "subnet"])
def test_fixed_sampling_without_a_shape_trains_the_models_own(tokenizer, dataset, steps, shape):
    model = tiny_model() if shape is None else tiny_model().extract_subnet(shape)
    before = copied_weights(model)
    _, summary = pretrain(tokenizer, dataset, model, sampling="fixed")
    assert [step["shapes"] for step in steps] == [[None]] * 3
    assert [len(values) for values in losses(summary)] == [1] * 3
    assert [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])] == []


@pytest.mark.parametrize("sampling", ["sandwich", "random"])
def test_subnet_has_no_shapes_to_sample(tokenizer, dataset, sampling):
    with pytest.raises(ValueError, match=re.escape("belongs to a subnet with fixed hidden_sizes=[8, 36]")):
        pretrain(tokenizer, dataset, tiny_model().extract_subnet([8, 0, 36]), sampling=sampling)


def test_tokenizer_of_another_vocabulary_is_refused(tokenizer, dataset):
    with pytest.raises(ValueError, match="The tokenizer has 20 tokens, but the model has vocab_size=19"):
        pretrain(tokenizer, dataset, tiny_model(vocab_size=19))


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ({}, False),
        ({"drop_rate": 0.1}, True),
        ({"sampling": "fixed"}, False),
        ({"sampling": "fixed", "shape": [8, 20, 36]}, False),
        ({"sampling": "fixed", "shape": [8, 0, 36]}, True),
    ],
    ids=str,
)
def test_only_dropped_layers_let_processes_expect_missing_gradients(changes, unused):
    handler = make_accelerator(arguments(**changes)).ddp_handler
    assert handler.find_unused_parameters == unused


# The optimiser


def test_gradients_are_clipped(tokenizer, dataset, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    _, summary = pretrain(tokenizer, dataset, max_grad_norm=0.01)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    norms.clear()
    _, unclipped = pretrain(tokenizer, dataset, max_grad_norm=1e9)
    assert norms == pytest.approx([record["gradient_norm"] for record in step_records(unclipped)])
    assert step_records(summary)[0]["gradient_norm"] == pytest.approx(norms[0])  # the norm before clipping


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
    pretrain(tokenizer, dataset, model, sampling="fixed", weight_decay=0.1)
    before = tiny_model().state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_no_gradients_are_left(tokenizer, dataset):
    model, _ = pretrain(tokenizer, dataset)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_step_without_any_label_changes_nothing_but_goes_by(tokenizer, dataset, steps):
    _, summary = pretrain(tokenizer, dataset, max_steps=4, batch_size=1, masking_rate=1e-9)
    assert losses(summary) == [[0.0, 0.0, 0.0]] * 4
    assert_same(steps[0]["weights"], steps[-1]["weights"], atol=0)
    assert (summary.progress.step, summary.progress.labelled, summary.progress.skipped_steps) == (4, 0, 0)


# The model afterwards


def test_dropout_is_on_while_training_and_after_an_evaluation(tokenizer, dataset, eval_batches, monkeypatch):
    modes = []

    def record(accelerator, model, *args):
        modes.append({module.training for module in model.modules()})
        return sandwich_step(accelerator, model, *args)

    monkeypatch.setattr(training_module, "sandwich_step", record)
    model, _ = pretrain(tokenizer, dataset, eval_batches=eval_batches, eval_steps=1)
    assert modes == [{True}] * 3
    assert {module.training for module in model.modules()} == {False}


def test_model_is_left_in_evaluation_mode(tokenizer, dataset):
    model, _ = pretrain(tokenizer, dataset, tiny_model().train())
    assert not any(module.training for module in model.modules())


def test_forward_is_left_in_full_precision(tokenizer, dataset, fresh_accelerator_state):
    full, _ = pretrain(tokenizer, dataset)
    AcceleratorState._reset_state(reset_partial_state=True)
    model, summary = pretrain(tokenizer, dataset, mixed_precision="bf16")
    twin = tiny_model()
    twin.load_state_dict(model.state_dict())
    assert_same(run(model, tiny_batch()), run(twin, tiny_batch()), atol=0)
    assert summary.arguments["mixed_precision"] == "bf16"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, full.bert.embeddings.word_embeddings.weight)


@pytest.fixture
def compiled(monkeypatch):
    """Mark the layers as compiled without compiling them; return what `compile_layers` is told."""
    calls = []

    def mark(model, *args):
        calls.append(args)
        for layer in model.bert.encoder.layer:
            layer._compiled_call_impl = layer._call_impl

    monkeypatch.setattr(training_module, "compile_layers", mark)
    return calls


def test_layers_are_compiled_for_the_widths_they_will_meet(tokenizer, dataset, compiled):
    pretrain(tokenizer, dataset, compile=True)
    pretrain(tokenizer, dataset, tiny_model().extract_subnet([8, 0, 36]), sampling="fixed", compile=True)
    assert compiled == [(4, 3, torch.device("cpu")), (1, 3, torch.device("cpu"))]


def test_layers_are_not_compiled_unless_asked_for(tokenizer, dataset, compiled):
    pretrain(tokenizer, dataset)
    assert compiled == []


def test_compiled_layers_meet_one_length_only(tokenizer, dataset, compiled, steps):
    pretrain(tokenizer, dataset.select([0, len(dataset) - 1]), compile=True, batch_size=1, max_length=14)
    assert {step["batches"][0]["input_ids"].shape for step in steps} == {(1, 14)}


def test_layers_are_not_left_compiled(tokenizer, dataset, compiled):
    model, _ = pretrain(tokenizer, dataset, compile=True)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_model_is_released_when_training_fails(tokenizer, dataset, compiled, monkeypatch):
    def fail(*args):
        raise RuntimeError("power cut")

    monkeypatch.setattr(training_module, "sandwich_step", fail)
    model = tiny_model()
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(tokenizer, dataset, model, compile=True, gradient_checkpointing=True)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert not any(layer.gradient_checkpointing for layer in model.bert.encoder.layer)


# Counters


def test_counters_add_up_the_micro_batches(tokenizer, steps):
    dataset = tokenize(random_documents(9, words=27), tokenizer, max_length=12)
    _, summary = pretrain(tokenizer, dataset, batch_size=3, gradient_accumulation_steps=2)
    batches = [batch for step in steps for batch in step["batches"]]
    progress = summary.progress
    assert (progress.step, progress.sequences) == (3, 18)
    assert progress.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert progress.padded_tokens == sum(batch["input_ids"].numel() for batch in batches) > progress.tokens
    assert progress.labelled == sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    assert progress.flops == sum(
        training_flops(tiny_config(), s["shapes"], *b["input_ids"].shape, int((b["labels"] != IGNORE_INDEX).sum()))
        for s in steps
        for b in s["batches"]
    )
    assert progress.seconds > 0


def test_summary_tells_the_model_and_the_machine(tokenizer, dataset):
    model, summary = pretrain(tokenizer, dataset)
    assert (summary.status, summary.processes, summary.device) == ("finished", 1, "cpu")
    assert summary.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert summary.arguments == vars(arguments()) | {"mixed_precision": "no"}


# A stream of text


def stream_of(n=40, words=27):
    return random_documents(n, words=words).to_iterable_dataset()


def test_stream_is_tokenised_on_the_way(tokenizer, steps):
    _, summary = pretrain(tokenizer, stream_of(), max_length=9, seed=3, masking_rate=0.4)
    expected = MicroBatches(stream_of(), tokenizer, 8, 0.4, 3, max_length=9).iterate()
    for step in steps:
        assert_same(step["batches"][0], next(expected)[0], atol=0)
    assert summary.progress.sequences == 24


def test_stream_is_packed_over_the_ends_of_documents_if_asked_for(tokenizer, steps):
    _, summary = pretrain(tokenizer, stream_of(), cross_documents=True, max_steps=2)
    assert summary.progress.tokens == summary.progress.padded_tokens == 2 * 8 * 12
    _, apart = pretrain(tokenizer, stream_of(), max_steps=2)
    assert apart.progress.tokens < apart.progress.padded_tokens


# Gradients that are not finite


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_step_with_gradients_that_are_not_finite_is_skipped(tokenizer, dataset, monkeypatch, value):
    seen = poison(monkeypatch, {2}, value)
    model, summary = pretrain(tokenizer, dataset, max_steps=5, warmup_ratio=0.0, weight_decay=0.1)
    assert_same(seen[3], seen[2], atol=0)
    moved = [not torch.equal(next(iter(a.values())), next(iter(b.values()))) for a, b in pairwise(seen)]
    assert moved == [True, True, False, True]
    rates = [record["learning_rate"] / 1e-3 for record in step_records(summary)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.6, 0.4])
    assert [math.isfinite(record["gradient_norm"]) for record in step_records(summary)] == [True] * 2 + [False] + [
        True
    ] * 2
    assert (summary.progress.step, summary.progress.skipped_steps, summary.progress.skipped_in_a_row) == (5, 1, 0)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_gradients_of_a_skipped_step_are_forgotten(tokenizer, dataset, monkeypatch):
    """Then the next step would not be finite either."""
    poison(monkeypatch, {0})
    _, summary = pretrain(tokenizer, dataset, max_skipped_steps=2)
    assert summary.progress.skipped_steps == 1


def test_many_skipped_steps_in_a_row_end_the_run(tokenizer, dataset, monkeypatch, tmp_path):
    seen = poison(monkeypatch, {3, 4, 5, 6})
    message = (
        "The gradients were not finite in 3 steps in a row (the last: step 6). Lower learning_rate=0.001, raise "
        "warmup_ratio=0.05, or train with bf16 instead of fp16. Newest checkpoint: "
        f"{tmp_path / 'checkpoint-00000004'}."
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        pretrain(tokenizer, dataset, max_steps=20, max_skipped_steps=3, output_dir=str(tmp_path), save_steps=2)
    assert len(seen) == 6


def test_without_a_folder_there_is_no_newest_checkpoint(tokenizer, dataset, monkeypatch):
    poison(monkeypatch, {0})
    with pytest.raises(FloatingPointError, match=re.escape("1 steps in a row (the last: step 1)")) as caught:
        pretrain(tokenizer, dataset, max_skipped_steps=1)
    assert str(caught.value).endswith("Newest checkpoint: None.")


def test_skipped_steps_apart_do_not_end_the_run(tokenizer, dataset, monkeypatch):
    poison(monkeypatch, {0, 1, 3, 4})
    _, summary = pretrain(tokenizer, dataset, max_steps=6, max_skipped_steps=3)
    assert (summary.status, summary.progress.skipped_steps) == ("finished", 4)


# Evaluation


def test_shapes_to_evaluate_are_the_ends_and_named_ones_of_half_the_size():
    shapes = evaluation_shapes(SPACE, None)
    assert list(shapes) == ["largest", "smallest", "rectangle", "lower_triangle", "supershaper"]
    budget = (SPACE.num_parameters(SPACE.largest) + SPACE.num_parameters(SPACE.smallest)) // 2
    assert list(shapes.values())[:2] == [SPACE.largest, SPACE.smallest]
    for name in ("rectangle", "lower_triangle", "supershaper"):
        assert shapes[name] == SPACE.named_shape(name, budget)


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=str)
def test_fixed_sampling_evaluates_its_one_shape(tokenizer, dataset, eval_batches, shape):
    model, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, sampling="fixed", shape=shape)
    (record,) = evaluate_shapes(model, eval_batches, [shape])
    assert summary.evaluation == {"model": {key: record[key] for key in ("loss", "perplexity", "accuracy")}}


def test_evaluation_at_the_end_is_that_of_the_trained_model(tokenizer, dataset, eval_batches):
    model, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches)
    shapes = evaluation_shapes(SPACE, None)
    expected = dict(zip(shapes, evaluate_shapes(model, eval_batches, list(shapes.values())), strict=True))
    measures = ("loss", "perplexity", "accuracy")
    assert summary.evaluation == {name: {key: r[key] for key in measures} for name, r in expected.items()}
    assert [record["step"] for record in summary.records if "evaluation" in record] == [3]


def test_evaluations_come_every_so_many_steps_and_at_the_end(tokenizer, dataset, eval_batches):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=5, eval_steps=2)
    assert [record["step"] for record in summary.records if "evaluation" in record] == [2, 4, 5]


def test_last_step_is_evaluated_once(tokenizer, dataset, eval_batches):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=4, eval_steps=2)
    assert [record["step"] for record in summary.records if "evaluation" in record] == [2, 4]


def test_evaluations_change_nothing(tokenizer, dataset, eval_batches):
    plain, _ = pretrain(tokenizer, dataset)
    evaluated, _ = pretrain(tokenizer, dataset, eval_batches=eval_batches, eval_steps=1)
    assert_same(evaluated.state_dict(), plain.state_dict(), atol=0)


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


def test_target_perplexity_of_the_first_shape_stops_the_run(tokenizer, dataset, eval_batches, scripted, tmp_path):
    script, weights = scripted
    script += [[math.log(21), 1.0], [math.log(20), 5.0]]
    changes = {"max_steps": 9, "eval_steps": 2, "target_perplexity": 20.0001, "output_dir": str(tmp_path)}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (summary.status, summary.progress.step) == ("target reached", 4)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-00000004"]
    assert_same(AutoModelForMaskedLM.from_pretrained(tmp_path / "last").state_dict(), weights[1], atol=0)
    assert json.loads((tmp_path / "training_summary.json").read_text())["status"] == "target reached"
    _, again = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (again.status, again.progress.step, len(weights)) == ("target reached", 4, 2)


def test_target_needs_something_to_be_measured_on(tokenizer, dataset):
    with pytest.raises(ValueError, match="target_perplexity=20.0 needs eval_batches to be measured on"):
        pretrain(tokenizer, dataset, eval_steps=1, target_perplexity=20.0)


def test_target_that_is_not_reached_stops_nothing(tokenizer, dataset, eval_batches):
    changes = {"max_steps": 4, "eval_steps": 2, "target_perplexity": 1.001}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (summary.status, summary.progress.step) == ("finished", 4)


def test_best_is_the_lowest_mean_loss_and_last_is_the_last(tokenizer, dataset, eval_batches, scripted, tmp_path):
    """The second evaluation is the best on average, but neither in the first shape nor in any other."""
    script, weights = scripted
    script += [[4.0, 3.0], [3.0, 2.0], [1.0, 5.0]]
    changes = {"max_steps": 6, "eval_steps": 2, "output_dir": str(tmp_path)}
    model, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    best, last = (AutoModelForMaskedLM.from_pretrained(tmp_path / name) for name in ("best", "last"))
    assert type(best) is type(last) is SuperShaperForMaskedLM
    assert_same(best.state_dict(), weights[1], atol=0)
    assert_same(last.state_dict(), weights[2], atol=0)
    assert_same(last.state_dict(), model.state_dict(), atol=0)
    assert not torch.equal(weights[1]["cls.predictions.decoder.bias"], weights[2]["cls.predictions.decoder.bias"])
    assert (summary.progress.best_loss, summary.progress.best_step) == (pytest.approx((3 + 4 * 2.0) / 5), 4)


def test_loss_that_is_not_a_number_is_never_the_best(tokenizer, dataset, eval_batches, scripted, tmp_path):
    script, weights = scripted
    script += [[math.nan], [3.0], [math.nan]]
    changes = {"max_steps": 3, "eval_steps": 1, "output_dir": str(tmp_path)}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (summary.progress.best_loss, summary.progress.best_step) == (3.0, 2)
    assert_same(AutoModelForMaskedLM.from_pretrained(tmp_path / "best").state_dict(), weights[1], atol=0)


def test_without_evaluation_there_is_a_last_model_and_no_best_one(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert (tmp_path / "last" / "model.safetensors").exists()
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "evaluation.png").exists()


# The folder


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def read_metrics(folder):
    return [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_folder_holds_what_is_promised(tokenizer, dataset, eval_batches, tmp_path):
    folder = tmp_path / "new" / "run"
    pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        "checkpoint-00000003",
        "evaluation.png",
        "last",
        "metrics.jsonl",
        "training_summary.json",
    ]


def test_nothing_is_written_without_a_folder(tokenizer, dataset, eval_batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain(tokenizer, dataset, eval_batches=eval_batches, eval_steps=1, save_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_metrics_have_one_record_per_logged_step_and_evaluation(tokenizer, dataset, eval_batches, tmp_path):
    changes = {"max_steps": 5, "logging_steps": 2, "eval_steps": 2, "output_dir": str(tmp_path)}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    records = read_metrics(tmp_path)
    assert records == summary.records
    assert [(r["step"], "evaluation" in r) for r in records] == [
        (2, False), (2, True), (4, False), (4, True), (5, False), (5, True)
    ]  # fmt: skip
    assert records[0].keys() == {
        "step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "share_of_peak"
    }  # fmt: skip


def test_summary_file_is_valid_and_complete(tokenizer, dataset, eval_batches, tmp_path):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))
    assert strict_json((tmp_path / "training_summary.json").read_text()) == summary.to_dict()


def test_files_stay_valid_json_when_a_number_is_not_finite(tokenizer, dataset, eval_batches, monkeypatch, tmp_path):
    """NaN and Infinity are no JSON: a reader that is not Python's stops at them."""
    poison(monkeypatch, {1})
    model = tiny_model()
    with torch.no_grad():
        model.cls["predictions"].decoder.bias[0] = 1000.0  # a perplexity that overflows
    pretrain(tokenizer, dataset, model, eval_batches=eval_batches, output_dir=str(tmp_path))
    read_metrics(tmp_path)
    strict_json((tmp_path / "training_summary.json").read_text())


def test_cards_tell_training_and_evaluation(tokenizer, dataset, eval_batches, tmp_path):
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))
    rows = [{"shape": name, **measures} for name, measures in summary.evaluation.items()]
    card = (tmp_path / "last" / "README.md").read_text()
    assert f"## Training\n\n{summary.describe()}" in card
    assert f"## Evaluation\n\n{markdown_table(rows)}" in card
    best = (tmp_path / "best" / "README.md").read_text()
    assert "Masked language modelling, the largest shape, the smallest and 1 random" in best
    assert markdown_table(rows) in best


def test_card_without_evaluation_says_so(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert "No measurements were supplied." in (tmp_path / "last" / "README.md").read_text()


def test_given_sections_reach_both_cards(tokenizer, dataset, eval_batches, tmp_path):
    card = {"license": "mit", "limits": "Toy words only.", "training": "By hand."}
    pretrain(tokenizer, dataset, eval_batches=eval_batches, card=card, output_dir=str(tmp_path))
    for name in ("best", "last"):
        text = (tmp_path / name / "README.md").read_text()
        assert "license: mit" in text
        assert "## Limits\n\nToy words only." in text
        assert "## Training\n\nBy hand." in text


def test_saved_models_have_their_tokenizer(tokenizer, dataset, eval_batches, tmp_path):
    pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))
    for name in ("best", "last", "checkpoint-00000003"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded.get_vocab() == tokenizer.get_vocab()


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, max_steps=5, save_steps=2, save_total_limit=9, output_dir=str(tmp_path))
    assert [int(folder.name[-8:]) for folder in list_checkpoints(tmp_path)] == [5, 4, 2]


def test_older_checkpoints_are_removed(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, max_steps=5, save_steps=1, save_total_limit=2, output_dir=str(tmp_path))
    assert [int(folder.name[-8:]) for folder in list_checkpoints(tmp_path)] == [5, 4]


def test_every_checkpoint_is_written_once(tokenizer, dataset, tmp_path, monkeypatch):
    written, save = [], training_module.save_checkpoint

    def record(accelerator, folder, step, *args):
        written.append(step)
        return save(accelerator, folder, step, *args)

    monkeypatch.setattr(training_module, "save_checkpoint", record)
    pretrain(tokenizer, dataset, max_steps=4, save_steps=2, output_dir=str(tmp_path))
    pretrain(tokenizer, dataset, max_steps=4, save_steps=2, output_dir=str(tmp_path))
    assert written == [2, 4]


# Going on


def crash_before(monkeypatch, number):
    """Let the step of this number, from 0, fail in the way of a power cut; later runs go by it."""
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == number + 1:
            raise RuntimeError("power cut")
        return sandwich_step(*args)

    monkeypatch.setattr(training_module, "sandwich_step", fail)


def crash(monkeypatch, number, *args, **changes):
    crash_before(monkeypatch, number)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(*args, **changes)


TIMES = {"tokens_per_second", "share_of_peak"}


def without_times(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_run_that_goes_on_equals_one_that_was_never_stopped(
    tokenizer, dataset, eval_batches, kind, tmp_path, monkeypatch, warnings
):
    """With dropout, accumulation, evaluations, and records of steps after the checkpoint."""
    text = dataset if kind == "stored" else stream_of(n=12)  # several times through the text
    changes = {"max_steps": 7, "save_steps": 2, "eval_steps": 3, "batch_size": 4, "gradient_accumulation_steps": 2}
    whole, expected = pretrain(tokenizer, text, eval_batches=eval_batches, output_dir=str(tmp_path / "a"), **changes)
    changes["output_dir"] = str(tmp_path / "b")
    crash(monkeypatch, 5, tokenizer, text, eval_batches=eval_batches, **changes)
    assert [record["step"] for record in read_metrics(tmp_path / "b")] == [1, 2, 3, 3, 4, 5]
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    other = randomize(tiny_model(), seed=9)  # its weights come from the checkpoint
    resumed, summary = pretrain(tokenizer, text, other, eval_batches=eval_batches, **changes)
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)
    assert without_times(summary.records) == without_times(expected.records)
    assert without_times(read_metrics(tmp_path / "b")) == without_times(expected.records)
    told, wanted = summary.to_dict(), expected.to_dict()
    for each in (told, wanted):
        assert each.pop("seconds") > 0
        each["arguments"].pop("output_dir")
    assert told == wanted
    assert warnings == []


def test_best_of_the_first_part_stays_the_best(tokenizer, dataset, eval_batches, scripted, tmp_path, monkeypatch):
    script, weights = scripted
    script += [[2.0], [3.0], [2.5]]
    changes = {"max_steps": 6, "eval_steps": 2, "save_steps": 2, "output_dir": str(tmp_path)}
    crash(monkeypatch, 2, tokenizer, dataset, eval_batches=eval_batches, **changes)
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert len(weights) == 3
    assert (summary.progress.best_loss, summary.progress.best_step) == (2.0, 2)
    assert_same(AutoModelForMaskedLM.from_pretrained(tmp_path / "best").state_dict(), weights[0], atol=0)


def test_finished_run_is_not_trained_again(tokenizer, dataset, tmp_path, steps):
    model, first = pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    again, second = pretrain(tokenizer, dataset, randomize(tiny_model(), seed=9), output_dir=str(tmp_path))
    assert len(steps) == 3
    assert_same(again.state_dict(), model.state_dict(), atol=0)
    assert second.records == first.records
    assert (second.status, second.progress.step) == ("finished", 3)


def test_text_that_fails_loses_no_step(tokenizer, dataset, tmp_path, monkeypatch):
    changes = {"max_steps": 6, "save_steps": 100}
    whole, _ = pretrain(tokenizer, dataset, **changes)
    iterate = MicroBatches.iterate

    def fail(batches, state):
        for number, item in enumerate(iterate(batches, state)):
            if number == 4:
                raise OSError("The disk with the text is gone.")
            yield item

    with monkeypatch.context() as broken:
        broken.setattr(MicroBatches, "iterate", fail)
        with pytest.raises(OSError, match="The disk with the text is gone"):
            pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-00000004"]
    resumed, _ = pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)


def test_text_that_fails_within_a_step_goes_on_at_the_start_of_the_step(tokenizer, tmp_path, monkeypatch):
    changes = {"max_steps": 4, "save_steps": 100, "batch_size": 4, "gradient_accumulation_steps": 3}
    whole, _ = pretrain(tokenizer, stream_of(), **changes)
    iterate = MicroBatches.iterate

    def fail(batches, state):
        for number, item in enumerate(iterate(batches, state)):
            if number == 2 * 3 + 1:
                raise OSError("The disk with the text is gone.")
            yield item

    with monkeypatch.context() as broken:
        broken.setattr(MicroBatches, "iterate", fail)
        with pytest.raises(OSError, match="The disk with the text is gone"):
            pretrain(tokenizer, stream_of(), output_dir=str(tmp_path), **changes)
    resumed, _ = pretrain(tokenizer, stream_of(), output_dir=str(tmp_path), **changes)
    assert_same(resumed.state_dict(), whole.state_dict(), atol=0)


def test_text_that_fails_at_once_leaves_no_checkpoint(tokenizer, dataset, tmp_path, monkeypatch):
    def fail(batches, state):
        raise OSError("The disk with the text is gone.")
        yield

    monkeypatch.setattr(MicroBatches, "iterate", fail)
    with pytest.raises(OSError, match="The disk with the text is gone"):
        pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert list_checkpoints(tmp_path) == []


def test_used_folder_is_refused_if_resuming_is_not_wanted(tokenizer, dataset, tmp_path, steps):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    message = f"{tmp_path} holds checkpoints, and resume='never'. Choose another output_dir, or resume='auto'."
    with pytest.raises(FileExistsError, match=re.escape(message)):
        pretrain(tokenizer, dataset, output_dir=str(tmp_path), resume="never")
    assert len(steps) == 3


def test_new_folder_is_fine_if_resuming_is_not_wanted(tokenizer, dataset, tmp_path):
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path / "new"), resume="never")
    assert summary.status == "finished"


def test_changed_conditions_are_named(tokenizer, dataset, tmp_path, warnings):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    changes = {"max_steps": 4, "learning_rate": 0.002, "sampling": "random", "distillation_weight": 0.0}
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    (message,) = warnings
    assert message == (
        f"Going on from {tmp_path / 'checkpoint-00000003'} under other conditions, so not bit for bit: max_steps was "
        "3, is 4; learning_rate was 0.001, is 0.002; sampling was 'sandwich', is 'random'; distillation_weight was "
        "0.5, is 0.0."
    )
    assert summary.progress.step == 4


def test_conditions_that_decide_nothing_may_change(tokenizer, dataset, tmp_path, warnings):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    changes = {"logging_steps": 2, "save_steps": 7, "save_total_limit": 1, "num_workers": 1}
    pretrain(tokenizer, dataset, output_dir=str(tmp_path / "b"), **changes)
    assert warnings == []


def test_run_can_go_on_in_smaller_micro_batches(tokenizer, dataset, tmp_path, monkeypatch, warnings):
    """At an equal batch per step it reads on where it was."""
    changes = {"max_steps": 6, "save_steps": 2}
    whole, _ = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), **changes)
    changes["output_dir"] = str(tmp_path)
    crash(monkeypatch, 2, tokenizer, dataset, tiny_model(**NO_DROPOUT), **changes)
    changes |= {"batch_size": 2, "gradient_accumulation_steps": 4}
    resumed, _ = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), **changes)
    assert_trained_alike(resumed, whole)
    assert "batch_size was 8, is 2; gradient_accumulation_steps was 1, is 4." in warnings[0]


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 2}, {"vocab_size": 60}, {"hidden_size": 44, "width_choices": [8, 44]}], ids=str
)
def test_checkpoint_of_another_model_is_refused(tokenizer, dataset, tmp_path, changes):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    other = tiny_model(**changes)
    message = (
        f"{tmp_path / 'checkpoint-00000003'} is of a model with hidden_sizes=[48, 48, 48] and vocab_size=61, this one "
        f"has {other.config.hidden_sizes} and {other.config.vocab_size}. Choose another output_dir."
    )
    before = copied_weights(other)
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, dataset, other, output_dir=str(tmp_path))
    assert_same(other.state_dict(), before, atol=0)


def pretend_two_processes(checkpoint):
    """Change a checkpoint into one that two processes wrote, and seal it again."""
    file = checkpoint / training_module.PROGRESS_FILE
    saved = json.loads(file.read_text())
    saved["conditions"]["processes"] = 2
    file.write_text(json.dumps(saved))
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)


def test_stream_of_other_processes_cannot_be_gone_on_with(tokenizer, tmp_path, warnings):
    pretrain(tokenizer, stream_of(), output_dir=str(tmp_path))
    checkpoint = tmp_path / "checkpoint-00000003"
    pretend_two_processes(checkpoint)
    message = f"{checkpoint} was written by 2 process(es) that each read a part of the stream, this run has 1. Start"
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, stream_of(), output_dir=str(tmp_path))


def test_stored_text_of_other_processes_is_shared_out_anew(tokenizer, dataset, tmp_path, warnings, steps):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    pretend_two_processes(tmp_path / "checkpoint-00000003")
    changes = {"max_steps": 4, "gradient_accumulation_steps": 2}
    pretrain(tokenizer, dataset, output_dir=str(tmp_path), **changes)
    text = MicroBatches(dataset, tokenizer, 8).iterate({"micro_batch": 6})
    for batch in steps[3]["batches"]:
        assert_same(batch, next(text)[0], atol=0)
    assert "processes was 2, is 1" in warnings[0]


# An outside teacher


def outside_teacher(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, **changes}
    return OutsideTeacher(randomize(BertModel(tiny_bert_config(**sizes)), seed=1))


@pytest.mark.parametrize("sampling", ["sandwich", "random", "fixed"])
def test_outside_teacher_changes_what_is_learnt_and_stays_itself(tokenizer, dataset, sampling):
    teacher = outside_teacher()
    before = copied_weights(teacher.model)
    alone, _ = pretrain(tokenizer, dataset, sampling=sampling)
    taught, summary = pretrain(tokenizer, dataset, sampling=sampling, teacher=teacher, teacher_weight=1.0)
    assert summary.status == "finished"
    weights = (model.bert.encoder.layer[2].attention.self.key.weight for model in (alone, taught))
    assert not torch.equal(*weights)
    assert_same(teacher.model.state_dict(), before, atol=0)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_relation_heads_have_to_divide_every_width(tokenizer, dataset):
    message = (
        "relation_heads=8 does not divide [20, 36], widths of the student or the teacher. Use a number that divides "
        "all of [8, 20, 32, 36, 48]: at most 4."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, dataset, teacher=outside_teacher(), teacher_weight=1.0, relation_heads=8)


def test_attention_heads_of_the_student_have_to_divide_the_teachers_width(tokenizer, dataset):
    teacher = outside_teacher(hidden_size=30, num_attention_heads=3)
    with pytest.raises(ValueError, match=re.escape("relation_heads=4 does not divide [30]")):
        pretrain(tokenizer, dataset, teacher=teacher, teacher_weight=1.0)


def test_widths_of_a_subnet_have_to_fit_the_relations(tokenizer, dataset):
    subnet = tiny_model().extract_subnet([8, 0, 36])
    with pytest.raises(ValueError, match=re.escape("relation_heads=8 does not divide [36]")):
        pretrain(
            tokenizer,
            dataset,
            subnet,
            sampling="fixed",
            teacher=outside_teacher(),
            teacher_weight=1.0,
            relation_heads=8,
        )


def test_teacher_of_a_smaller_vocabulary_is_refused(tokenizer, dataset):
    with pytest.raises(ValueError, match="The tokenizer has 20 tokens, but the model has vocab_size=19"):
        pretrain(tokenizer, dataset, teacher=outside_teacher(vocab_size=19), teacher_weight=1.0)


def test_teacher_of_shorter_texts_is_refused(tokenizer, dataset):
    message = "max_length=12 is more than the teacher's 11 positions. Lower it."
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain(tokenizer, dataset, teacher=outside_teacher(max_position_embeddings=11), teacher_weight=1.0)
    pretrain(tokenizer, dataset, teacher=outside_teacher(max_position_embeddings=12), teacher_weight=1.0, max_steps=1)


# Trackers


class Notebook(GeneralTracker):
    """Writes down what Accelerate is told to track."""

    name = "notebook"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self):
        super().__init__()
        self.config, self.pages, self.closed = {}, [], False

    @property
    def tracker(self):
        return self.pages

    @on_main_process
    def store_init_configuration(self, values):
        self.config |= values

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.pages.append((step, values))

    @on_main_process
    def finish(self):
        self.closed = True


def test_trackers_are_told_every_record_and_the_arguments(tokenizer, dataset, eval_batches):
    notebook = Notebook()
    changes = {"max_steps": 4, "logging_steps": 2, "report_to": [notebook]}
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert [step for step, _ in notebook.pages] == [2, 4, 4]
    first, record = notebook.pages[0][1], summary.records[0]
    names = ("learning_rate", "gradient_norm", "tokens_per_second", "share_of_peak")
    assert first == {
        "loss": record["loss"][0],
        **{f"loss_{index}": loss for index, loss in enumerate(record["loss"])},
        **{name: record[name] for name in names},
    }
    assert notebook.pages[2][1] == {
        f"eval/{shape}/{name}": value
        for shape, measures in summary.evaluation.items()
        for name, value in measures.items()
    }
    assert notebook.config["max_steps"] == "4"
    assert notebook.closed


def test_closing_the_trackers_leaves_the_processes_connected(tokenizer, dataset, monkeypatch):
    """The last model is saved by all of them, and the caller may go on."""
    disconnected = []
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *args: disconnected.append(1))
    notebook = Notebook()
    pretrain(tokenizer, dataset, report_to=[notebook])
    assert notebook.closed
    assert disconnected == []


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_gets_the_losses(tokenizer, dataset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, summary = pretrain(tokenizer, dataset, report_to=["tensorboard"], output_dir=str(tmp_path))
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(record["step"], record["loss"][0]) for record in step_records(summary)]
    torch.testing.assert_close(found, expected)


def test_unknown_tracker_is_refused(tokenizer, dataset):
    with pytest.raises(ValueError, match="diary"):
        pretrain(tokenizer, dataset, report_to=["diary"])
