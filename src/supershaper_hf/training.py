"""Super pre-training: one supernet trained so that every shape works, under Accelerate.

Each step trains the largest shape, the smallest, and some random ones on the same batch: the sandwich rule (Yu and
Huang, 2019; section 3 of SuperShaper, arXiv 2110.04711). `sandwich_step` is the method, `super_pretrain` the loop.
With `single_shape`, every step trains the model's own shape only: a plain BERT, or an extracted subnet.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_scheduler

from .data import MASKING_RATE, check_vocabulary, masking_collator
from .distillation import mixed_loss
from .modeling_supershaper import SuperShaperForMaskedLM
from .shapes import SearchSpace


@dataclass
class SuperPretrainingArguments:
    """What to train for how long. Validated at construction.

    Raises:
        ValueError: If a value is out of its range.
    """

    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=32, metadata={"help": "Sequences per process and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimiser step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decay of weight matrices; none on biases and norms."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with rising learning rate."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "A scheduler of transformers by name."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    masking_rate: float = field(default=MASKING_RATE, metadata={"help": "Share of tokens to predict."})
    random_shapes: int = field(default=1, metadata={"help": "Random shapes per step, beside largest and smallest."})
    distillation_weight: float = field(default=0.5, metadata={"help": "0: labels only, 1: the largest net only."})
    temperature: float = field(default=1.0, metadata={"help": "Softens teacher and student in distillation."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    seed: int = field(default=0, metadata={"help": "Of masks, order, dropout and shapes."})

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("masking_rate", "distillation_weight", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        for name in ("masking_rate", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.random_shapes < 0:
            raise ValueError(f"random_shapes={self.random_shapes} must be 0 or more.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r}. Allowed: 'no', 'bf16', 'fp16'.")


def sandwich_shapes(space: SearchSpace, random_shapes: int, seed: int, step: int) -> list[list[int]]:
    """Return the shapes of a step: largest, smallest, then random ones drawn from (seed, step), equal on every rank."""
    return [space.largest, space.smallest, *space.sample(random_shapes, (seed, step)).tolist()]


def sandwich_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    shapes: Sequence[Sequence[int] | None],
    distillation_weight: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Add up the gradients of every shape on one batch; the first shape learns from the labels and teaches the others.

    Each shape is backpropagated before the next is run, so that memory holds one shape's activations. Processes
    exchange gradients only in the last backward pass.

    Returns:
        The masked-LM losses on the labels in nats, (shapes,), detached.
    """
    teacher_logits = None
    losses: list[torch.Tensor] = []
    for shape in shapes:
        last = len(losses) == len(shapes) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(**batch, shape=shape, sparse_prediction=True)
            loss = output.loss
            if teacher_logits is None:
                teacher_logits = output.logits.detach()
            else:
                loss = mixed_loss(loss, output.logits, teacher_logits, distillation_weight, temperature)
            accelerator.backward(loss)
        losses.append(output.loss.detach())
    return torch.stack(losses)


def super_pretrain(
    model: SuperShaperForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: SuperPretrainingArguments,
    single_shape: bool = False,
    description: str = "Super pre-training",
) -> list[dict[str, Any]]:
    """Train `model` in place on `dataset` (the result of `data.tokenize`).

    Args:
        model: A supernet; with `single_shape` also a subnet.
        tokenizer: Chooses and masks the tokens.
        dataset: Sequences with `input_ids` and `special_tokens_mask`.
        args: See `SuperPretrainingArguments`.
        single_shape: Train only the model's own full shape instead of the sandwich.
        description: Label of the progress bar.

    Returns:
        One record per step: `step`, `loss` of each trained shape in nats (this process, last micro-batch),
        `learning_rate`.

    Raises:
        ValueError: If tokenizer and vocabulary disagree, or `model` is a subnet and `single_shape` is not set.
    """
    check_vocabulary(tokenizer, model.config)
    space = None if single_shape else SearchSpace.from_config(model.config)
    set_seed(args.seed)
    # The text is read in rounds without end: a round's last micro-batch is no reason to step early.
    accumulation = GradientAccumulationPlugin(args.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_plugin=accumulation)
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=len(dataset) >= args.batch_size * accelerator.num_processes,
        collate_fn=masking_collator(tokenizer, args.masking_rate),
    )
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.learning_rate)
    # The prepared scheduler is stepped once per process for each optimiser step.
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(args.warmup_ratio * args.max_steps) * accelerator.num_processes,
        num_training_steps=args.max_steps * accelerator.num_processes,
    )
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    history: list[dict[str, Any]] = []
    progress = tqdm(total=args.max_steps, desc=description, disable=not accelerator.is_local_main_process)
    for batch in endless(loader):
        shapes = [None] if space is None else sandwich_shapes(space, args.random_shapes, args.seed, len(history))
        with accelerator.accumulate(wrapped):
            losses = sandwich_step(accelerator, wrapped, batch, shapes, args.distillation_weight, args.temperature)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            history.append({"step": len(history) + 1, "loss": losses.tolist(), "learning_rate": learning_rate})
            progress.set_postfix(loss=f"{losses[0].item():.2f}", refresh=False)
            progress.update()
        if len(history) == args.max_steps:
            break
    progress.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # mixed precision had replaced model.forward
    model.eval()
    return history


def endless(loader: DataLoader) -> Iterator[Any]:
    """Yield batches for ever, a new order in each epoch."""
    while True:
        yield from loader


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices decay, biases and LayerNorms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
