import json
import math
import re
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from conftest import assert_same, randomize, run, tiny_batch, tiny_bert_config, tiny_config, tiny_model
from texts import original_tokens, random_documents
from training_runs import (
    NO_DROPOUT,
    SPACE,
    arguments,
    assert_trained_alike,
    copied_weights,
    losses,
    poison,
    pretrain,
    step_records,
    stream_of,
)
from transformers import BertModel

from supershaper_hf import SuperShaperForMaskedLM
from supershaper_hf.data.batches import MicroBatches
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.devices import device_name
from supershaper_hf.model.costs import training_flops
from supershaper_hf.model.elastic import SuperShaperLayer
from supershaper_hf.model.modeling_supershaper import IGNORE_INDEX
from supershaper_hf.training import loop as training_module
from supershaper_hf.training.loop import derive_seed
from supershaper_hf.training.sandwich import sandwich_step, step_shapes
from supershaper_hf.training.teacher import OutsideTeacher


pytestmark = pytest.mark.usefixtures("no_measured_peak")


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
    changes = {
        "lr_scheduler_type": scheduler,
        "warmup_steps": 0.15,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    _, summary = pretrain(tokenizer, dataset, max_steps=10, **changes)
    assert [record["learning_rate"] / 1e-3 for record in step_records(summary)] == pytest.approx(rates)


def test_recorded_learning_rate_is_the_one_applied(tokenizer, dataset, monkeypatch):
    applied, step = [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        applied.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    _, summary = pretrain(tokenizer, dataset, max_steps=4, warmup_steps=0.5)
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
        tokenizer,
        dataset,
        tiny_model(**NO_DROPOUT),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert_trained_alike(accumulated, model)
    torch.testing.assert_close(losses(accumulated_summary), losses(summary), atol=1e-5, rtol=0)


def test_workers_change_nothing(tokenizer, dataset, monkeypatch):
    workers, iterate = [], MicroBatches.iterate
    monkeypatch.setattr(
        MicroBatches, "iterate", lambda self, state: (workers.append(self.num_workers), iterate(self, state))[1]
    )
    first, _ = pretrain(tokenizer, dataset)
    second, _ = pretrain(tokenizer, dataset, dataloader_num_workers=1)
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
    changes = {"seed": 7, "mlm_probability": 0.4}
    pretrain(tokenizer, dataset, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2, **changes)
    expected = MicroBatches(dataset, tokenizer, batch_size=2, **changes).iterate()
    assert [len(step["batches"]) for step in steps] == [3, 3]
    for step in steps:
        for batch in step["batches"]:
            assert_same(batch, next(expected)[0], atol=0)


def test_masks_are_drawn_anew_in_every_round(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset.select([0]), max_steps=3, per_device_train_batch_size=1, mlm_probability=0.5)
    labels = [step["batches"][0]["labels"] for step in steps]
    assert not torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[1], labels[2])


def test_every_round_reads_all_sequences_in_an_order_of_its_own(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, max_steps=2, per_device_train_batch_size=len(dataset))
    first, second = (original_tokens(step["batches"][0]).tolist() for step in steps)
    assert first != second
    assert sorted(first) == sorted(second)


def test_losses_of_the_arguments_reach_the_step(tokenizer, dataset, steps):
    given = {"distillation_weight": 0.3, "temperature": 2.0, "hidden_weight": 0.1, "attention_weight": 0.2}
    given |= {"teacher_weight": 0.4, "relation_heads": 2, "state_weight": 0.5, "pooled_weight": 0.6}
    given |= {"first_token_weight": 0.7, "pooling": "cls"}
    teacher = outside_teacher(hidden_size=48)
    pretrain(tokenizer, dataset, max_steps=1, teacher=teacher, **given)
    assert {name: getattr(steps[0]["objective"], name) for name in given} == given
    assert steps[0]["objective"].teacher is teacher
    assert steps[0]["objective"].labels


def test_divergence_reaches_the_step(tokenizer, dataset, steps):
    pretrain(tokenizer, dataset, max_steps=1, divergence="alpha")
    assert steps[0]["objective"].divergence == "alpha"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_weight": 0.5}, "teacher_weight=0.5 needs a teacher."),
        ({"state_weight": 0.5}, "state_weight=0.5 needs a teacher."),
        ({"pooled_weight": 0.5}, "pooled_weight=0.5 needs a teacher."),
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


def test_smallest_sampling_never_trains_the_largest_shape(tokenizer, dataset, steps):
    _, summary = pretrain(tokenizer, dataset, sampling="smallest", random_shapes=2)
    expected = [[SPACE.smallest, *SPACE.sample(2, (0, n)).tolist()] for n in range(3)]
    assert [step["shapes"] for step in steps] == expected
    assert [len(values) for values in losses(summary)] == [3] * 3


@pytest.mark.parametrize("shape", [None, [8, 0, 36]], ids=["supernet", "subnet"])
def test_fixed_sampling_without_a_shape_trains_the_models_own(tokenizer, dataset, steps, shape):
    model = tiny_model() if shape is None else tiny_model().extract_subnet(shape)
    before = copied_weights(model)
    _, summary = pretrain(tokenizer, dataset, model, sampling="fixed")
    assert [step["shapes"] for step in steps] == [[None]] * 3
    assert [len(values) for values in losses(summary)] == [1] * 3
    assert [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])] == []


@pytest.mark.parametrize("sampling", ["sandwich", "smallest", "random"])
def test_subnet_has_no_shapes_to_sample(tokenizer, dataset, sampling):
    with pytest.raises(ValueError, match=re.escape("belongs to a subnet with fixed hidden_sizes=[8, 36]")):
        pretrain(tokenizer, dataset, tiny_model().extract_subnet([8, 0, 36]), sampling=sampling)


def test_tokenizer_of_another_vocabulary_is_refused(tokenizer, dataset):
    with pytest.raises(ValueError, match="The tokenizer has 20 tokens, but the model has vocab_size=19"):
        pretrain(tokenizer, dataset, tiny_model(vocab_size=19))


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
    plain, _ = pretrain(tokenizer, dataset, max_steps=1, warmup_steps=0.0)
    decayed, _ = pretrain(tokenizer, dataset, max_steps=1, warmup_steps=0.0, weight_decay=10.0)
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
    _, summary = pretrain(tokenizer, dataset, max_steps=4, per_device_train_batch_size=1, mlm_probability=1e-9)
    assert losses(summary) == [[0.0, 0.0, 0.0]] * 4
    assert_same(steps[0]["weights"], steps[-1]["weights"], atol=0)
    assert (summary.progress.step, summary.progress.labelled, summary.progress.skipped_steps) == (4, 0, 0)


# Dropout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_without_dropout_is_that_of_a_model_without_it(tokenizer, dataset, eval_batches, checkpointing):
    """Also after an evaluation."""
    changes = {"eval_batches": eval_batches, "eval_steps": 1, "gradient_checkpointing": checkpointing}
    model, _ = pretrain(tokenizer, dataset, no_dropout=True, **changes)
    expected, _ = pretrain(tokenizer, dataset, tiny_model(**NO_DROPOUT), **changes)
    assert_same(model.state_dict(), expected.state_dict(), atol=0)
    rates = [getattr(model.config, name) for name in NO_DROPOUT] + [model.bert.embeddings.dropout.p]
    assert rates == [0.1, 0.1, 0.1]


def test_layers_are_checkpointed_without_dropout_too(tokenizer, dataset, monkeypatch):
    seen = []

    def record(accelerator, model, *args):
        seen.append({layer.training for layer in model.modules() if isinstance(layer, SuperShaperLayer)})
        return sandwich_step(accelerator, model, *args)

    monkeypatch.setattr(training_module, "sandwich_step", record)
    pretrain(tokenizer, dataset, max_steps=1, no_dropout=True, gradient_checkpointing=True)
    assert seen == [{True}]


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
    pretrain(tokenizer, dataset, torch_compile=True)
    pretrain(tokenizer, dataset, tiny_model().extract_subnet([8, 0, 36]), sampling="fixed", torch_compile=True)
    assert compiled == [(4, 3, torch.device("cpu")), (1, 3, torch.device("cpu"))]


def test_layers_are_not_compiled_unless_asked_for(tokenizer, dataset, compiled):
    pretrain(tokenizer, dataset)
    assert compiled == []


def test_compiled_layers_meet_one_length_only(tokenizer, dataset, compiled, steps):
    pretrain(
        tokenizer,
        dataset.select([0, len(dataset) - 1]),
        torch_compile=True,
        per_device_train_batch_size=1,
        max_length=14,
    )
    assert {step["batches"][0]["input_ids"].shape for step in steps} == {(1, 14)}


def test_layers_are_not_left_compiled(tokenizer, dataset, compiled):
    model, _ = pretrain(tokenizer, dataset, torch_compile=True)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_model_is_released_when_training_fails(tokenizer, dataset, compiled, monkeypatch):
    def fail(*args):
        raise RuntimeError("power cut")

    monkeypatch.setattr(training_module, "sandwich_step", fail)
    model = tiny_model()
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(tokenizer, dataset, model, torch_compile=True, gradient_checkpointing=True)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert not any(layer.gradient_checkpointing for layer in model.bert.encoder.layer)


# Counters


def test_counters_add_up_the_micro_batches(tokenizer, steps):
    dataset = tokenize(random_documents(9, words=27), tokenizer, max_length=12)
    _, summary = pretrain(tokenizer, dataset, per_device_train_batch_size=3, gradient_accumulation_steps=2)
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
    assert (summary.status, summary.processes, summary.device) == ("finished", 1, device_name("cpu"))
    assert summary.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert summary.arguments == vars(arguments()) | {"mixed_precision": "no", "pooling": "mean"}


# A stream of text


def test_stream_is_tokenised_on_the_way(tokenizer, steps):
    _, summary = pretrain(tokenizer, stream_of(), max_length=9, seed=3, mlm_probability=0.4)
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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_step_with_gradients_that_are_not_finite_is_skipped(tokenizer, dataset, monkeypatch, value):
    seen = poison(monkeypatch, {2}, value)
    model, summary = pretrain(tokenizer, dataset, max_steps=5, warmup_steps=0.0, weight_decay=0.1)
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
        "The gradients were not finite in 3 steps in a row (the last: step 6). Lower learning_rate=0.001, look at "
        "weight_decay=0.0, raise warmup_steps=0.05, or train with bf16 instead of fp16, and start again: the new "
        "values are applied from the newest checkpoint on. If the run fails again soon, remove that checkpoint to "
        f"resume from the one before it. Newest checkpoint: {tmp_path / 'checkpoint-00000002'}."
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


def test_last_hidden_state_of_another_width_cannot_be_compared(tokenizer, dataset):
    names = ["state_weight", "pooled_weight", "first_token_weight"]
    message = f"{', '.join(names)} compare last hidden states, but the teacher has hidden_size=32 and"
    for name in names:
        with pytest.raises(ValueError, match=re.escape(message)):
            pretrain(tokenizer, dataset, teacher=outside_teacher(), **{name: 1.0})


def test_relations_are_not_checked_unless_they_are_compared(tokenizer, dataset):
    teacher = outside_teacher(hidden_size=48, num_attention_heads=3)
    pretrain(tokenizer, dataset, teacher=teacher, state_weight=1.0, relation_heads=7, max_steps=1)


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
    first, record = notebook.pages[0][1], summary.log_history[0]
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


def test_summary_names_a_tracker_of_ones_own(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, max_steps=1, report_to=[Notebook()], output_dir=str(tmp_path))
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["arguments"]["report_to"] == ["notebook"]


def test_closing_the_trackers_leaves_the_processes_connected(tokenizer, dataset, monkeypatch):
    """The last model is saved by all of them, and the caller may go on."""
    disconnected = []
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *args: disconnected.append(1))
    notebook = Notebook()
    pretrain(tokenizer, dataset, report_to=[notebook])
    assert notebook.closed
    assert disconnected == []


def test_tensorboard_gets_the_losses(tokenizer, dataset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, summary = pretrain(tokenizer, dataset, report_to=["tensorboard"], output_dir=str(tmp_path))
    files = [EventAccumulator(str(file)).Reload() for file in tmp_path.rglob("events.out.tfevents.*")]
    (events,) = (file for file in files if "loss" in file.Tags()["scalars"])  # another one has the arguments
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(record["step"], record["loss"][0]) for record in step_records(summary)]
    torch.testing.assert_close(found, expected)


def test_unknown_tracker_is_refused(tokenizer, dataset):
    with pytest.raises(ValueError, match="diary"):
        pretrain(tokenizer, dataset, report_to=["diary"])
