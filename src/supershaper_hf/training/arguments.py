"""What a training run is told: every option with its help, checked before anything is loaded.

`HfArgumentParser` makes the command line of `examples/run_super_pretraining.py` from these fields.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

from ..model.shapes import DISTRIBUTIONS
from .distillation import Objective


SAMPLINGS = ("sandwich", "random", "fixed")
PRECISIONS = ("no", "bf16", "fp16")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Of a script's `--help`: defaults are shown, the description keeps its lines."""


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SuperPretrainingArguments:
    """What to train for how long. Validated at construction.

    Raises:
        ValueError: If a value is out of its range, or two options do not fit together.
    """

    # Length and optimiser
    max_steps: int = option(1000, "Optimiser steps.")
    per_device_train_batch_size: int = option(32, "Sequences per process and micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimiser step.")
    learning_rate: float = option(5e-5, "Peak learning rate of AdamW.")
    weight_decay: float = option(0.0, "Decay of weight matrices; none on biases and LayerNorms.")
    warmup_ratio: float = option(0.05, "Share of the steps with rising learning rate.")
    lr_scheduler_type: str = option("linear", "A scheduler of transformers by name: linear, cosine, constant, ...")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    max_length: int = option(128, "Tokens of a sequence, [CLS] and [SEP] included.")
    cross_documents: bool = option(False, "Let a sequence go on over the end of a document.")
    mlm_probability: float = option(0.15, "Share of tokens to predict.")
    seed: int = option(0, "Of masks, order, dropout and shapes.")

    # Shapes
    sampling: str = option("sandwich", "sandwich: largest, smallest, random ones; random: no ends; fixed: one shape.")
    random_shapes: int = option(1, "Random shapes per step.")
    distribution: str = option(
        "uniform", "Of random shapes: uniform, parameters (biased to wide), budget (even sizes)."
    )
    drop_rate: float = option(0.0, "Chance of each layer of a random shape to be dropped.")
    shape: list[int] | None = option(None, "The one shape of fixed sampling; by default the model's own full shape.")

    # Losses, beside the one on the labels
    distillation_weight: float | None = option(None, "0: labels only, 1: largest net only. Default .5 in a sandwich.")
    temperature: float = option(1.0, "Softens teacher and student in distillation.")
    divergence: str = option("cross_entropy", "Of distillation: cross_entropy or alpha (adaptive, AlphaNet).")
    hidden_weight: float = option(0.0, "Weight of matching the hidden states of the largest net.")
    attention_weight: float = option(0.0, "Weight of matching the attention of the largest net.")
    teacher_weight: float = option(0.0, "Weight of matching an outside teacher's attention relations (MiniLMv2).")
    relation_heads: int | None = option(None, "Heads of these relations; by default the model's attention heads.")

    # Machine
    mixed_precision: str | None = option(None, "no, bf16 or fp16; by default what accelerate launch was told.")
    gradient_checkpointing: bool = option(False, "Compute layers again in the backward pass to save memory.")
    compile: bool = option(False, "Compile one encoder layer per width.")
    dataloader_num_workers: int = option(0, "Processes that prepare batches, for each training process.")

    # Output
    output_dir: str | None = option(None, "Folder of checkpoints, models and records; by default nothing is written.")
    resume: str = option("auto", "auto: go on from the newest good checkpoint; never: refuse a folder that has one.")
    logging_steps: int = option(10, "Steps between two records.")
    eval_steps: int | None = option(None, "Steps between two evaluations; by default only at the end.")
    save_steps: int = option(500, "Steps between two checkpoints.")
    save_total_limit: int = option(2, "Checkpoints kept; older ones are removed.")
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers beside metrics.jsonl: tensorboard, trackio, wandb."}
    )
    target_perplexity: float | None = option(None, "Stop when the evaluation of the first shape reaches this.")
    max_skipped_steps: int = option(10, "Stop after this many steps in a row with gradients that are not finite.")

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
        ):
            self._at_least(name, 1)
        for name in ("save_steps", "save_total_limit", "max_skipped_steps"):
            self._at_least(name, 1)
        for name in ("seed", "random_shapes", "dataloader_num_workers", "weight_decay"):
            self._at_least(name, 0)
        for name in ("mlm_probability", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate={self.drop_rate} must be at least 0 and below 1.")
        for name in ("mlm_probability", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        self._one_of("sampling", SAMPLINGS)
        if self.mixed_precision is not None:
            self._one_of("mixed_precision", PRECISIONS)
        self._one_of("distribution", DISTRIBUTIONS)
        self._one_of("resume", ("auto", "never"))
        self._check_shapes()
        self._check_losses()
        if self.target_perplexity is not None and self.eval_steps is None:
            raise ValueError(f"target_perplexity={self.target_perplexity} needs eval_steps: how often to evaluate.")

    def _check_shapes(self) -> None:
        if self.shape is not None and self.sampling != "fixed":
            raise ValueError(f"shape={self.shape} is for sampling='fixed', not {self.sampling!r}.")
        if self.sampling == "random" and self.random_shapes == 0:
            raise ValueError("random_shapes=0 leaves sampling='random' nothing to train. Use at least 1.")

    def _check_losses(self) -> None:
        """Only the sandwich has a largest net for the others to learn from."""
        if self.distillation_weight is None:
            self.distillation_weight = 0.5 if self.sampling == "sandwich" else 0.0
        in_place = [
            name for name in ("distillation_weight", "hidden_weight", "attention_weight") if getattr(self, name)
        ]
        if in_place and self.sampling != "sandwich":
            raise ValueError(
                f"{in_place[0]}={getattr(self, in_place[0])} needs the largest net of each step as a teacher, which "
                f"sampling={self.sampling!r} does not train. Use sampling='sandwich' or an outside teacher."
            )
        Objective(  # refuses what is out of range
            distillation_weight=self.distillation_weight,
            temperature=self.temperature,
            divergence=self.divergence,
            hidden_weight=self.hidden_weight,
            attention_weight=self.attention_weight,
            relation_heads=self.relation_heads,
        )
        if self.compile and (self.hidden_weight or self.attention_weight or self.teacher_weight):
            raise ValueError(
                "compile=True does not go with hidden_weight, attention_weight or teacher_weight, which look into the "
                "layers. Leave one of them out."
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r}. Allowed: {', '.join(map(repr, allowed))}.")
