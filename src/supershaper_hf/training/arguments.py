"""The options of a training run, each with its help text. They are checked before anything is loaded.

`HfArgumentParser` makes the command line of `examples/run_super_pretraining.py` from these fields. An option that
transformers' `TrainingArguments` also has bears the same name here.
"""

import argparse
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from ..checks import check_choice, check_count, check_number
from ..model.shapes import DISTRIBUTIONS
from ..publish.sentences import POOLINGS
from .distillation import Objective


PRECISIONS = ("no", "bf16", "fp16")
COUNTS = {  # option -> its smallest value
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 1,
    "seed": 0,
    "random_shapes": 0,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "max_skipped_steps": 1,
}
NUMBERS: dict[str, dict[str, float]] = {  # option -> its bounds
    "learning_rate": {"above": 0},
    "weight_decay": {"least": 0},
    "warmup_steps": {"least": 0},
    "max_grad_norm": {"above": 0},
    "mlm_probability": {"least": 0, "most": 1},
    "shared_learning_rate_scale": {"least": 0},
    "drop_rate": {"least": 0, "below": 1},
    "teacher_weight": {"least": 0},
    "state_weight": {"least": 0},
    "pooled_weight": {"least": 0},
    "first_token_weight": {"least": 0},
    "target_perplexity": {"least": 1},
}
CHOICES = {  # option -> its values
    # The other schedulers of transformers need arguments of their own, or the loss of an evaluation.
    "lr_scheduler_type": (
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ),
    "sampling": ("sandwich", "smallest", "random", "fixed"),
    "distribution": DISTRIBUTIONS,
    "pooling": POOLINGS,
    "mixed_precision": PRECISIONS,
}
OBJECTIVE = (  # options that `Objective` checks
    "distillation_weight",
    "temperature",
    "divergence",
    "hidden_weight",
    "attention_weight",
    "relation_heads",
)
TRACKERS = sorted({tracker.value for tracker in LoggerType} - {"all"})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formats the `--help` of a script: it keeps the line breaks of the description, and shows the default values.

    A default of None or an empty list is left out, because the help text says what it means.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class SuperPretrainingArguments:
    """The options of `super_pretrain`. They are checked at construction.

    Raises:
        ValueError: If a value is of the wrong type or out of its range, or if two options do not go together.

    Example:
        >>> args = SuperPretrainingArguments(max_steps=2000, learning_rate=5e-4, output_dir="outputs/supernet")
        >>> args.get_warmup_steps()  # by default 5 % of the steps
        100
    """

    # Length and optimiser
    max_steps: int = option(1000, "Number of optimiser steps.")
    per_device_train_batch_size: int = option(32, "Sequences in a micro-batch of each process.")
    gradient_accumulation_steps: int = option(1, "Micro-batches of each optimiser step.")
    learning_rate: float = option(5e-5, "Highest learning rate of AdamW.")
    shared_learning_rate_scale: float = option(
        1.0,
        "Factor of the learning rate of weights that all widths share. With 0 they stay as they are, and only weights "
        "by width learn, which a supernet with bottlenecks by_width has.",
    )
    weight_decay: float = option(0.0, "Weight decay of the matrices. Biases and LayerNorms have none.")
    warmup_steps: float = option(
        0.05, "Steps in which the learning rate rises: a number of steps, or below 1 a share of all steps."
    )
    lr_scheduler_type: str = option("linear", f"Learning rate schedule: {', '.join(CHOICES['lr_scheduler_type'])}.")
    max_grad_norm: float = option(1.0, "Largest norm of the gradient. A longer gradient is scaled down to it.")
    max_length: int = option(128, "Tokens of the longest sequence, [CLS] and [SEP] included.")
    group_by_length: bool = option(
        False, "Whether stored sequences of similar length are trained on together, so that there is less padding."
    )
    cross_documents: bool = option(False, "Whether a sequence may continue with the next document.")
    mlm_probability: float = option(
        0.15,
        "Share of the tokens that the model has to predict. With 0 nothing is masked, and an outside teacher alone "
        "teaches, by --state_weight.",
    )
    seed: int = option(0, "Random seed of the masks, the order of the text, dropout and the shapes.")

    # Shapes
    sampling: str = option(
        "sandwich",
        "Shapes of each step: sandwich (the largest, the smallest and random ones), smallest (the smallest and random "
        "ones), random (only random ones) or fixed (always the same one).",
    )
    random_shapes: int = option(1, "Number of random shapes in each step.")
    distribution: str = option(
        "uniform",
        "How random shapes are drawn: uniform (every width is equally likely), parameters (wide layers are more "
        "likely) or budget (every model size is equally likely).",
    )
    drop_rate: float = option(0.0, "Probability that a layer of a random shape is dropped.")
    shape: list[int] | None = option(
        None, "The shape that --sampling fixed trains: one width for each layer. By default the model's own full shape."
    )

    # Losses in addition to the loss on the labels
    distillation_weight: float | None = option(
        None,
        "Share of the largest shape's predictions in the targets of the other shapes: 0 trains on the labels only, 1 "
        "on the predictions only. The default is 0.5 for --sampling sandwich with labels, and 0 otherwise.",
    )
    temperature: float = option(1.0, "Temperature of the distillation. A higher one softens both predictions.")
    divergence: str = option(
        "cross_entropy", "Distillation loss: cross_entropy, or alpha for AlphaNet's adaptive alpha-divergence."
    )
    hidden_weight: float = option(0.0, "Weight of the loss that matches the hidden states of the largest shape.")
    attention_weight: float = option(0.0, "Weight of the loss that matches the attention of the largest shape.")
    teacher_weight: float = option(
        0.0, "Weight of the loss that matches the attention relations of an outside teacher (MiniLMv2)."
    )
    relation_heads: int | None = option(
        None, "Number of heads of these relations. By default the number of the model's attention heads."
    )
    state_weight: float = option(
        0.0,
        "Weight of the loss that matches the last hidden state of an outside teacher, such as the BERT that the "
        "supernet was made of.",
    )
    pooled_weight: float = option(
        0.0, "Weight of the loss that matches the pooled last hidden state of an outside teacher, by the cosine."
    )
    first_token_weight: float = option(
        0.0, "Weight of the loss that matches the state of the first token, [CLS], which classifiers read, once more."
    )
    pooling: str | None = option(
        None,
        "Pooling of that state: mean (over all tokens) or cls (the first token). The saved models are sentence "
        "encoders with this pooling, which sentence-transformers loads. By default they are what the model given is, "
        "and the states are averaged.",
    )
    no_dropout: bool = option(
        False, "Whether to train without dropout. The saved models keep their dropout rates, for fine-tuning."
    )

    # Machine
    mixed_precision: str | None = option(
        None, "Precision: no, bf16 or fp16. By default the one that was given to `accelerate launch`."
    )
    gradient_checkpointing: bool = option(
        False, "Whether the backward pass computes each layer again, which takes more time and less memory."
    )
    torch_compile: bool = option(False, "Whether to compile the encoder layers, once for each width.")
    dataloader_num_workers: int = option(0, "Number of worker processes that prepare batches for each process.")

    # Output
    output_dir: str | None = option(
        None, "Folder for checkpoints, models and metrics. In Python, nothing is written to the disk without it."
    )
    resume_from_checkpoint: bool = option(
        True,
        "Continue from the newest good checkpoint in --output_dir. With --no_resume_from_checkpoint, a folder that has "
        "checkpoints is refused.",
    )
    logging_steps: int = option(10, "Number of steps between two lines of metrics.jsonl.")
    eval_steps: int | None = option(None, "Number of steps between two evaluations. By default only the end has one.")
    save_steps: int = option(500, "Number of steps between two checkpoints.")
    save_total_limit: int = option(2, "Number of checkpoints that are kept. Older ones are removed.")
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": f"Trackers that get the metrics of metrics.jsonl too: {', '.join(TRACKERS)}."},
    )
    target_perplexity: float | None = option(
        None, "Training ends early when the first shape of an evaluation has this perplexity or a lower one."
    )
    max_skipped_steps: int = option(
        10, "Training fails after this many steps in a row whose gradients are not finite numbers."
    )

    def __post_init__(self) -> None:
        self._check_values()
        self._check_shapes()
        self._check_losses()
        if self.target_perplexity is not None and self.eval_steps is None:
            raise ValueError(
                f"target_perplexity={self.target_perplexity} needs eval_steps, the number of steps between two "
                "evaluations."
            )

    def get_warmup_steps(self) -> int:
        """Return the number of steps in which the learning rate rises."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(self.warmup_steps * self.max_steps)

    def _check_values(self) -> None:
        """Check each option by itself, and store plain Python numbers, which JSON can write."""
        optional = {entry.name for entry in fields(self) if entry.default is None}
        given = {name: value for name, value in vars(self).items() if value is not None or name not in optional}
        for name in COUNTS.keys() & given:
            check_count(name, given[name], COUNTS[name])
            setattr(self, name, int(given[name]))
        for name in NUMBERS.keys() & given:
            check_number(name, given[name], **NUMBERS[name])
            setattr(self, name, float(given[name]))
        for name in CHOICES.keys() & given:
            check_choice(name, given[name], CHOICES[name])
        for name in (entry.name for entry in fields(self) if entry.type is bool):
            check_choice(name, given[name], (True, False))
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if not isinstance(self.report_to, (list, tuple)):
            raise ValueError(f"report_to={self.report_to!r} must be a list of trackers.")
        for tracker in self.report_to:
            if not isinstance(tracker, GeneralTracker):  # in Python, also a tracker of one's own
                check_choice("report_to", tracker, TRACKERS)
        if self.output_dir is not None:
            self.output_dir = os.fspath(self.output_dir)
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.mixed_precision is None and launched not in PRECISIONS:
            raise ValueError(
                f"`accelerate launch` was given mixed_precision={launched!r}. Allowed for super pre-training: "
                f"{', '.join(PRECISIONS)}."
            )

    def _check_shapes(self) -> None:
        if self.shape is not None:
            if isinstance(self.shape, str) or len(self.shape) == 0:
                raise ValueError(f"shape={self.shape!r} must be a list of widths, such as [480, 240], one per layer.")
            for width in self.shape:
                check_count("a width of shape", width, 0)
            self.shape = [int(width) for width in self.shape]
            if self.sampling != "fixed":
                raise ValueError(f"shape={self.shape} is for sampling='fixed', not {self.sampling!r}.")
        if self.sampling == "random" and self.random_shapes == 0:
            raise ValueError("random_shapes=0 leaves sampling='random' nothing to train. Use at least 1.")

    def _check_losses(self) -> None:
        """Check the options of `Objective`. Only the sandwich has a largest shape that the others can learn from."""
        labels = self.mlm_probability > 0
        if self.distillation_weight is None:
            self.distillation_weight = 0.5 if self.sampling == "sandwich" and labels else 0.0
        Objective(**{name: getattr(self, name) for name in OBJECTIVE})  # refuses values that are out of range
        self.relation_heads = None if self.relation_heads is None else int(self.relation_heads)
        for name in ("distillation_weight", "hidden_weight", "attention_weight"):
            if getattr(self, name) > 0 and self.sampling != "sandwich":
                raise ValueError(
                    f"{name}={getattr(self, name)} needs the largest shape of each step as a teacher, which "
                    f"sampling={self.sampling!r} does not train. Use sampling='sandwich' or an outside teacher."
                )
        if not labels and self.state_weight == 0:
            raise ValueError(
                f"mlm_probability={self.mlm_probability} labels nothing, so shapes learn from an outside teacher: give "
                "state_weight a value above 0, or mlm_probability."
            )
        if not labels and self.distillation_weight > 0:
            raise ValueError(
                f"distillation_weight={self.distillation_weight} compares predictions of labelled tokens, and "
                "mlm_probability=0 labels none. Set distillation_weight to 0."
            )
        if not labels and self.target_perplexity is not None:
            raise ValueError(
                f"target_perplexity={self.target_perplexity} is measured on labelled tokens, and mlm_probability=0 "
                "labels none. Leave it out."
            )
        if self.torch_compile and (self.hidden_weight or self.attention_weight or self.teacher_weight):
            raise ValueError(
                "torch_compile=True does not go with hidden_weight, attention_weight or teacher_weight, which look "
                "into the layers. Leave one of them out."
            )
