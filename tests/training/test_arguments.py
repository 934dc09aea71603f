import dataclasses
import re

import pytest
from transformers import HfArgumentParser

from supershaper_hf.training.arguments import SuperPretrainingArguments


def parse(*words):
    (arguments,) = HfArgumentParser(SuperPretrainingArguments).parse_args_into_dataclasses([*words])
    return arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1."),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1."),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1 must be at least 1."),
        ({"logging_steps": 0}, "logging_steps=0 must be at least 1."),
        ({"eval_steps": 0}, "eval_steps=0 must be at least 1."),
        ({"save_steps": 0}, "save_steps=0 must be at least 1."),
        ({"save_total_limit": 0}, "save_total_limit=0 must be at least 1."),
        ({"max_skipped_steps": 0}, "max_skipped_steps=0 must be at least 1."),
        ({"seed": -1}, "seed=-1 must be at least 0."),
        ({"random_shapes": -1}, "random_shapes=-1 must be at least 0."),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be at least 0."),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0."),
        ({"mlm_probability": 1.5}, "mlm_probability=1.5 must be between 0 and 1."),
        ({"mlm_probability": -0.5}, "mlm_probability=-0.5 must be between 0 and 1."),
        ({"mlm_probability": 0}, "mlm_probability=0 must be above 0."),
        ({"drop_rate": 1.0}, "drop_rate=1.0 must be at least 0 and below 1."),
        ({"drop_rate": -0.1}, "drop_rate=-0.1 must be at least 0 and below 1."),
        ({"distillation_weight": 1.1}, "distillation_weight=1.1 must be between 0 and 1."),
        ({"temperature": 0.0}, "temperature=0.0 must be positive and finite."),
        ({"divergence": "kl"}, "divergence='kl' must be one of cross_entropy, alpha."),
        ({"warmup_ratio": 2}, "warmup_ratio=2 must be between 0 and 1."),
        ({"warmup_ratio": -0.01}, "warmup_ratio=-0.01 must be between 0 and 1."),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0."),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0."),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be above 0."),
    ],
    ids=str,
)
def test_number_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "all"}, "sampling='all'. Allowed: 'sandwich', 'random', 'fixed'."),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'. Allowed: 'no', 'bf16', 'fp16'."),
        ({"distribution": "normal"}, "distribution='normal'. Allowed: 'uniform', 'parameters', 'budget'."),
        ({"resume": "always"}, "resume='always'. Allowed: 'auto', 'never'."),
    ],
    ids=str,
)
def test_unknown_choice_is_refused_with_those_allowed(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(**changes)


@pytest.mark.parametrize("sampling", ["sandwich", "random"])
def test_a_shape_is_for_fixed_sampling_only(sampling):
    message = f"shape=[8, 8] is for sampling='fixed', not '{sampling}'."
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(shape=[8, 8], sampling=sampling)


def test_random_sampling_needs_a_random_shape():
    message = "random_shapes=0 leaves sampling='random' nothing to train. Use at least 1."
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(sampling="random", random_shapes=0)


@pytest.mark.parametrize("sampling", ["random", "fixed"])
@pytest.mark.parametrize("name", ["distillation_weight", "hidden_weight", "attention_weight"])
def test_only_the_sandwich_has_a_largest_net_to_learn_from(name, sampling):
    message = (
        f"{name}=0.5 needs the largest net of each step as a teacher, which sampling='{sampling}' does not train. "
        "Use sampling='sandwich' or an outside teacher."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperPretrainingArguments(sampling=sampling, **{name: 0.5})


@pytest.mark.parametrize("name", ["hidden_weight", "attention_weight", "teacher_weight"])
def test_compiled_layers_cannot_be_looked_into(name):
    message = "compile=True does not go with hidden_weight, attention_weight or teacher_weight"
    with pytest.raises(ValueError, match=message):
        SuperPretrainingArguments(compile=True, **{name: 0.5})


def test_target_perplexity_needs_evaluations():
    message = "target_perplexity=20.0 needs eval_steps: how often to evaluate."
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
    {"mlm_probability": 1.0, "warmup_ratio": 1.0, "distillation_weight": 1.0},
    {"warmup_ratio": 0.0, "distillation_weight": 0.0},
    {"sampling": "random", "random_shapes": 1},
    {"sampling": "fixed", "random_shapes": 0, "shape": [8, 8]},
    {"sampling": "fixed", "shape": None, "distillation_weight": 0.0, "hidden_weight": 0.0, "attention_weight": 0.0},
    {"sampling": "random", "teacher_weight": 1.0},
    {"sampling": "fixed", "compile": True},
    {"compile": True, "distillation_weight": 0.5},
    {"target_perplexity": 20.0, "eval_steps": 1},
]


@pytest.mark.parametrize("values", LIMITS, ids=str)
def test_limits_themselves_are_allowed(values):
    arguments = SuperPretrainingArguments(**values)
    assert {name: getattr(arguments, name) for name in values} == values


@pytest.mark.parametrize(("sampling", "weight"), [("sandwich", 0.5), ("random", 0.0), ("fixed", 0.0)])
def test_distillation_is_on_by_default_in_a_sandwich_only(sampling, weight):
    assert SuperPretrainingArguments(sampling=sampling).distillation_weight == weight


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
    with pytest.raises(ValueError, match="per_device_train_batch_size=0 must be at least 1"):
        parse("--per_device_train_batch_size", "0")


def test_every_option_has_help():
    fields = dataclasses.fields(SuperPretrainingArguments)
    assert [field.name for field in fields if not field.metadata.get("help", "").endswith(".")] == []


def test_help_of_the_command_line_prints(capsys):
    """A per cent sign in a help text would break it."""
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--target_perplexity" in capsys.readouterr().out


def test_lists_are_not_shared_between_arguments():
    SuperPretrainingArguments().report_to.append("wandb")
    assert SuperPretrainingArguments().report_to == []
