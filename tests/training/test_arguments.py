"""Options of a training run: which values are allowed, and the command line that is made of them."""

import dataclasses
import doctest
import json
import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, get_scheduler

from supershaper_hf.training import arguments as arguments_module
from supershaper_hf.training.arguments import CHOICES, HelpFormatter, SuperPretrainingArguments


def parse(*words):
    (arguments,) = HfArgumentParser(SuperPretrainingArguments).parse_args_into_dataclasses([*words])
    return arguments


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 must be an integer of at least 1."),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be an integer of at least 1."),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1 must be an integer of at least 1."),
        ({"max_length": 0}, "max_length=0 must be an integer of at least 1."),
        ({"logging_steps": 0}, "logging_steps=0 must be an integer of at least 1."),
        ({"eval_steps": 0}, "eval_steps=0 must be an integer of at least 1."),
        ({"save_steps": 0}, "save_steps=0 must be an integer of at least 1."),
        ({"save_total_limit": 0}, "save_total_limit=0 must be an integer of at least 1."),
        ({"max_skipped_steps": 0}, "max_skipped_steps=0 must be an integer of at least 1."),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0."),
        ({"random_shapes": -1}, "random_shapes=-1 must be an integer of at least 0."),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be an integer of at least 0."),
        ({"relation_heads": 0}, "relation_heads=0 must be an integer of at least 1."),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be a finite number at least 0."),
        ({"mlm_probability": 1.5}, "mlm_probability=1.5 must be a finite number at least 0 and at most 1."),
        ({"mlm_probability": -0.5}, "mlm_probability=-0.5 must be a finite number at least 0 and at most 1."),
        (
            {"shared_learning_rate_scale": -1.0},
            "shared_learning_rate_scale=-1.0 must be a finite number at least 0.",
        ),
        ({"state_weight": -1.0}, "state_weight=-1.0 must be a finite number at least 0."),
        ({"pooled_weight": -1.0}, "pooled_weight=-1.0 must be a finite number at least 0."),
        ({"drop_rate": 1.0}, "drop_rate=1.0 must be a finite number at least 0 and below 1."),
        ({"drop_rate": -0.1}, "drop_rate=-0.1 must be a finite number at least 0 and below 1."),
        ({"distillation_weight": 1.1}, "distillation_weight=1.1 must be a finite number at least 0 and at most 1."),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number above 0."),
        ({"divergence": "kl"}, "divergence='kl' is unknown. Allowed: 'cross_entropy', 'alpha'."),
        ({"warmup_steps": -0.01}, "warmup_steps=-0.01 must be a finite number at least 0."),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a finite number above 0."),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be a finite number above 0."),
        ({"target_perplexity": 0.5, "eval_steps": 1}, "target_perplexity=0.5 must be a finite number at least 1."),
    ],
    ids=str,
)
def test_number_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(**changes)


FIELDS = {field.name: field for field in dataclasses.fields(SuperPretrainingArguments)}
TYPES = get_type_hints(SuperPretrainingArguments)
WHOLE = [name for name, kind in TYPES.items() if kind in (int, int | None)]
DECIMAL = [name for name, kind in TYPES.items() if kind in (float, float | None)]
FLAGS = [name for name, kind in TYPES.items() if kind is bool]


@pytest.mark.parametrize("name", WHOLE)
def test_number_that_is_not_whole_is_refused(name):
    for value in (5.5, "5", True, INFINITY, NAN):
        with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(value))} must be an integer of at least "):
            SuperPretrainingArguments(**{name: value})


@pytest.mark.parametrize("name", DECIMAL)
def test_number_that_is_not_finite_is_refused(name):
    for value in (NAN, INFINITY, -INFINITY, "0.5", True):
        with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(value))} must be a finite number"):
            SuperPretrainingArguments(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
def test_only_true_and_false_switch_an_option(name):
    with pytest.raises(ValueError, match=f"{name}='no' is unknown. Allowed: True, False."):
        SuperPretrainingArguments(**{name: "no"})


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.default not in (None, "")])
def test_nothing_is_not_a_value(name):
    """Only an option whose default is None may be None."""
    with pytest.raises((ValueError, TypeError), match=f"{name}"):
        SuperPretrainingArguments(**{name: None})


def test_numbers_of_numpy_become_plain_ones():
    """The options are written to JSON."""
    values = {"max_steps": np.int64(7), "shape": [np.int64(8)], "learning_rate": np.float64(1e-3), "sampling": "fixed"}
    arguments = SuperPretrainingArguments(**values, relation_heads=np.int64(4))
    assert json.loads(json.dumps(vars(arguments))) == vars(arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "all"}, "sampling='all' is unknown. Allowed: 'sandwich', 'smallest', 'random', 'fixed'."),
        ({"pooling": "max"}, "pooling='max' is unknown. Allowed: 'mean', 'cls'."),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' is unknown. Allowed: 'no', 'bf16', 'fp16'."),
        ({"distribution": "normal"}, "distribution='normal' is unknown. Allowed: 'uniform', 'parameters', 'budget'."),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau' is unknown. Allowed"),
        ({"report_to": ["paper"]}, "report_to='paper' is unknown. Allowed: "),
    ],
    ids=str,
)
def test_unknown_choice_is_refused_with_those_allowed(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(**changes)


def test_one_tracker_needs_no_list():
    assert SuperPretrainingArguments(report_to="wandb").report_to == ["wandb"]


@pytest.mark.parametrize("scheduler", CHOICES["lr_scheduler_type"])
def test_every_schedule_can_be_made(scheduler):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = get_scheduler(scheduler, optimizer, 1, 3)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [1e-3]


def test_precision_of_the_launcher_is_checked_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    message = "`accelerate launch` was given mixed_precision='fp8'. Allowed for super pre-training: no, bf16, fp16."
    with pytest.raises(ValueError, match=message):
        SuperPretrainingArguments()
    assert SuperPretrainingArguments(mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("steps", "expected"), [(0, 0), (0.0, 0), (0.05, 1), (0.5, 5), (0.99, 10), (1, 1), (3, 3), (30, 30)]
)
def test_warmup_is_a_number_of_steps_or_a_share(steps, expected):
    """As in the TrainingArguments of transformers."""
    assert SuperPretrainingArguments(max_steps=10, warmup_steps=steps).get_warmup_steps() == expected


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("8 8", "shape='8 8' must be a list of widths, such as [480, 240], one per layer."),
        ([], "shape=[] must be a list of widths"),
        ([8, -1], "a width of shape=-1 must be an integer of at least 0."),
        ([8, 8.5], "a width of shape=8.5 must be an integer of at least 0."),
        (["8"], "a width of shape='8' must be an integer of at least 0."),
    ],
    ids=str,
)
def test_shape_is_a_list_of_widths(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(shape=shape, sampling="fixed")


def test_folder_may_be_a_path():
    assert SuperPretrainingArguments(output_dir=Path("runs") / "first").output_dir == "runs/first"


@pytest.mark.parametrize("sampling", ["sandwich", "smallest", "random"])
def test_a_shape_is_for_fixed_sampling_only(sampling):
    message = f"shape=[8, 8] is for sampling='fixed', not '{sampling}'."
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(shape=[8, 8], sampling=sampling)


def test_random_sampling_needs_a_random_shape():
    message = "random_shapes=0 leaves sampling='random' nothing to train. Use at least 1."
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(sampling="random", random_shapes=0)


@pytest.mark.parametrize("sampling", ["smallest", "random", "fixed"])
@pytest.mark.parametrize("name", ["distillation_weight", "hidden_weight", "attention_weight"])
def test_only_the_sandwich_has_a_largest_shape_to_learn_from(name, sampling):
    message = (
        f"{name}=0.5 needs the largest shape of each step as a teacher, which sampling='{sampling}' does not train. "
        "Use sampling='sandwich' or an outside teacher."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(sampling=sampling, **{name: 0.5})


@pytest.mark.parametrize("name", ["hidden_weight", "attention_weight", "teacher_weight"])
def test_compiled_layers_cannot_be_looked_into(name):
    message = "torch_compile=True does not go with hidden_weight, attention_weight or teacher_weight"
    with pytest.raises(ValueError, match=message):
        SuperPretrainingArguments(torch_compile=True, **{name: 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "mlm_probability=0.0 labels nothing, so shapes learn from an outside teacher: give state_weight a",
        ),
        ({"pooled_weight": 1.0}, "give state_weight a value above 0, or mlm_probability."),
        (
            {"state_weight": 1.0, "distillation_weight": 0.5},
            "distillation_weight=0.5 compares predictions of labelled tokens, and mlm_probability=0 labels none.",
        ),
        (
            {"state_weight": 1.0, "target_perplexity": 20.0, "eval_steps": 1},
            "target_perplexity=20.0 is measured on labelled tokens, and mlm_probability=0 labels none. Leave it out.",
        ),
    ],
    ids=str,
)
def test_what_needs_labels_is_refused_without_them(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(mlm_probability=0, **changes)


def test_target_perplexity_needs_evaluations():
    message = "target_perplexity=20.0 needs eval_steps, the number of steps between two evaluations."
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(target_perplexity=20.0)


LIMITS = [
    {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "eval_steps": 1,
    },
    {"save_steps": 1, "save_total_limit": 1, "max_skipped_steps": 1},
    {"seed": 0, "random_shapes": 0, "dataloader_num_workers": 0, "weight_decay": 0.0},
    {"mlm_probability": 1.0, "warmup_steps": 1.0, "distillation_weight": 1.0},
    {"warmup_steps": 0.0, "distillation_weight": 0.0},
    {"sampling": "random", "random_shapes": 1},
    {"sampling": "fixed", "random_shapes": 0, "shape": [8, 8]},
    {"sampling": "fixed", "shape": None, "distillation_weight": 0.0, "hidden_weight": 0.0, "attention_weight": 0.0},
    {"sampling": "random", "teacher_weight": 1.0},
    {"sampling": "fixed", "torch_compile": True},
    {"torch_compile": True, "distillation_weight": 0.5},
    {"target_perplexity": 1.0, "eval_steps": 1},
    {"mlm_probability": 0.0, "state_weight": 1.0, "distillation_weight": 0.0, "hidden_weight": 1.0},
    {"sampling": "smallest", "random_shapes": 0, "state_weight": 1.0, "pooled_weight": 1.0, "torch_compile": True},
]


@pytest.mark.parametrize("values", LIMITS, ids=str)
def test_limits_themselves_are_allowed(values):
    arguments = SuperPretrainingArguments(**values)
    assert {name: getattr(arguments, name) for name in values} == values


@pytest.mark.parametrize(
    ("sampling", "weight"), [("sandwich", 0.5), ("smallest", 0.0), ("random", 0.0), ("fixed", 0.0)]
)
def test_distillation_is_on_by_default_in_a_sandwich_only(sampling, weight):
    assert SuperPretrainingArguments(sampling=sampling).distillation_weight == weight
    unlabelled = SuperPretrainingArguments(sampling=sampling, mlm_probability=0, state_weight=1.0)
    assert unlabelled.distillation_weight == 0


def test_distillation_can_be_switched_off_in_a_sandwich():
    assert SuperPretrainingArguments(distillation_weight=0.0).distillation_weight == 0.0


# The command line


def test_empty_command_line_gives_the_defaults():
    assert parse() == SuperPretrainingArguments()


def test_command_line_sets_every_kind_of_field():
    command = "--max_steps 7 --learning_rate 2e-4 --lr_scheduler_type cosine --sampling fixed --shape 8 0 36"
    command += " --gradient_checkpointing --cross_documents true --report_to trackio wandb --relation_heads 4"
    command += " --mixed_precision bf16 --output_dir runs/first --eval_steps 5 --target_perplexity 20.5"
    assert parse(*command.split()) == SuperPretrainingArguments(
        max_steps=7,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        sampling="fixed",
        shape=[8, 0, 36],
        gradient_checkpointing=True,
        cross_documents=True,
        report_to=["trackio", "wandb"],
        relation_heads=4,
        mixed_precision="bf16",
        output_dir="runs/first",
        eval_steps=5,
        target_perplexity=20.5,
    )


def test_command_line_refuses_what_the_arguments_refuse():
    with pytest.raises(ValueError, match="per_device_train_batch_size=0 must be an integer of at least 1"):
        parse("--per_device_train_batch_size", "0")


def test_examples_run():
    results = doctest.testmod(arguments_module)
    assert results.failed == 0
    assert results.attempted > 0


def test_every_option_has_help():
    fields = dataclasses.fields(SuperPretrainingArguments)
    assert [field.name for field in fields if not field.metadata.get("help", "").endswith(".")] == []


def test_help_of_the_command_line_prints(capsys):
    """A per cent sign in a help text would break it."""
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--target_perplexity" in capsys.readouterr().out


def test_help_shows_defaults_that_are_values(capsys):
    parser = HfArgumentParser(SuperPretrainingArguments, formatter_class=HelpFormatter)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    printed = capsys.readouterr().out
    assert "(default: 0.15)" in printed
    assert "(default: None)" not in printed
    assert "(default: [])" not in printed


def test_lists_are_not_shared_between_arguments():
    SuperPretrainingArguments().report_to.append("wandb")
    assert SuperPretrainingArguments().report_to == []
