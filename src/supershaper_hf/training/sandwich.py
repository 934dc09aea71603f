"""The method: what one optimiser step of super pre-training computes.

Each step trains the largest shape, the smallest, and some random ones on the same text: the sandwich rule (Yu and
Huang, 2019; section 3 of SuperShaper, arXiv 2110.04711). `step_shapes` draws the shapes, `sandwich_step` adds up their
gradients, `decay_groups` tells AdamW what to decay. `training.py` is the loop around it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..model.modeling_supershaper import IGNORE_INDEX
from ..model.shapes import SearchSpace
from .arguments import SuperPretrainingArguments
from .distillation import Largest, Objective, record_layers


Batch = dict[str, torch.Tensor]
Shape = Sequence[int] | None  # None: the model's own full shape


def step_shapes(space: SearchSpace | None, args: SuperPretrainingArguments, step: int) -> list[Shape]:
    """Return the shapes of a step, drawn from (seed, step) alone: equal on every process and after a resume.

    The largest comes first, so that it can teach the others. Layers are dropped from random shapes only.
    """
    if space is None:
        return [args.shape]
    drawn = space.sample(args.random_shapes, (args.seed, step), args.distribution, args.drop_rate).tolist()
    return drawn if args.sampling == "random" else [space.largest, space.smallest, *drawn]


def sandwich_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Sequence[Batch],
    shapes: Sequence[Shape],
    objective: Objective,
) -> torch.Tensor:
    """Add up the gradients of every shape on all micro-batches of all processes, as if they were one batch.

    A loss is a mean over positions: labelled ones, or all tokens. Each micro-batch enters with its share of the
    positions of the whole step. Each shape is backpropagated before the next is run, so that memory holds one shape's
    activations, and processes exchange gradients only in the last backward pass.

    Returns:
        This process's part of the masked-LM losses in nats, (shapes,), detached; the parts of all processes add up to
        the mean over the step's labels.
    """
    config = accelerator.unwrap_model(model).config
    counts = torch.tensor([count_positions(batch) for batch in micro_batches], device=accelerator.device)
    shares = counts / accelerator.reduce(counts.sum(dim=0)).clamp(min=1)
    losses = torch.zeros(len(shapes), device=accelerator.device)
    for number, (batch, (labels_share, tokens_share)) in enumerate(zip(micro_batches, shares)):
        unlabelled = count_positions(batch)[0] == 0
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        outside = objective.teacher(batch) if objective.teacher else None
        largest = None
        for index, shape in enumerate(shapes):
            last = (number, index) == (len(micro_batches) - 1, len(shapes) - 1)
            with nullcontext() if last else accelerator.no_sync(model):
                with record_layers(model, objective.layers(shape or config.hidden_sizes)) as records:
                    output = model(**batch, shape=shape, sparse_prediction=True)
                if unlabelled:
                    output.loss = output.logits.sum()  # of no logits: 0, where the mean would be undefined
                label_loss, token_loss = objective(output, records, batch, largest, outside)
                loss = labels_share * label_loss + tokens_share * token_loss
                accelerator.backward(loss * accelerator.num_processes)  # processes exchange the mean of gradients
            losses[index] += labels_share * output.loss.detach()
            if largest is None and objective.in_place:
                largest = Largest.of(output, records)
    return losses


def count_positions(batch: Batch) -> tuple[int, int]:
    """Return how many tokens of a batch are labelled, and how many are not padding."""
    return int((batch["labels"] != IGNORE_INDEX).sum()), int(batch["attention_mask"].sum())


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices decay, biases and LayerNorms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
