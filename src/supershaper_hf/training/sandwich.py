"""The method: what one optimiser step of super pre-training computes.

Each step trains the largest shape, the smallest one and some random ones on the same text. This is the sandwich rule
(Yu and Huang, "Universally Slimmable Networks", 2019; section 3 of SuperShaper, arXiv 2110.04711). `step_shapes` draws
the shapes, `sandwich_step` adds up their gradients, and `decay_groups` separates the parameters that decay. `loop.py`
calls the first two in every step.
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
from .distillation import Largest, Objective, watch_layers


Batch = dict[str, torch.Tensor]
Shape = Sequence[int] | None  # None is the model's own full shape


def step_shapes(space: SearchSpace | None, args: SuperPretrainingArguments, step: int) -> list[Shape]:
    """Return the shapes of a step. Equal (seed, step) give equal shapes, on every process and after a resume.

    In a sandwich the largest shape comes first, so that it can teach the others. Only random shapes drop layers.

    Args:
        space: The search space; `None` for `sampling="fixed"`.
        args: The options `sampling`, `random_shapes`, `distribution`, `drop_rate`, `shape` and `seed` are used.
        step: Number of the step.
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
    """Add up the gradients of every shape on every micro-batch, as if all processes together had one large batch.

    For each micro-batch the shapes run one after the other, the largest first, because the others learn from it. Each
    is backpropagated before the next one runs, so that the memory holds the activations of one shape only. Processes
    exchange gradients once, in the last backward pass.

    Args:
        accelerator: Knows the device and the other processes.
        model: A supernet, or a subnet with `shapes=[None]`, as `accelerator.prepare` returned it.
        micro_batches: This process's part of the step, `input_ids`, `attention_mask` and `labels`, (batch, length)
            each.
        shapes: What `step_shapes` returned.
        objective: What the shapes learn from.

    Returns:
        This process's part of each shape's masked-LM loss in nats, (shapes,), without gradients. Added up over all
        processes, it is the mean over all labels of the step.
    """
    full_shape = accelerator.unwrap_model(model).config.hidden_sizes
    losses = torch.zeros(len(shapes), device=accelerator.device)
    shares = shares_of_step(accelerator, micro_batches)
    for number, (batch, (label_share, token_share)) in enumerate(zip(micro_batches, shares)):
        unlabelled = count_positions(batch)[0] == 0
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        outside = objective.teacher(batch) if objective.teacher else None
        largest = None
        for index, shape in enumerate(shapes):
            last = (number, index) == (len(micro_batches) - 1, len(shapes) - 1)
            with nullcontext() if last else accelerator.no_sync(model):  # without it, each backward pass exchanges
                with watch_layers(model, objective.layers(shape or full_shape)) as activations:
                    output = model(**batch, shape=shape, sparse_prediction=True)
                if unlabelled:  # the mean over no labels is undefined; the sum over no logits is 0
                    output.loss = output.logits.sum()
                label_loss = objective.label_loss(output, largest)
                layer_loss = objective.layer_loss(activations, batch["attention_mask"], largest, outside)
                loss = label_share * label_loss + token_share * layer_loss
                accelerator.backward(loss * accelerator.num_processes)  # the exchange takes the mean over processes
            losses[index] += label_share * output.loss.detach()
            if largest is None and objective.in_place:
                largest = Largest.of(output, activations)
    return losses


def shares_of_step(accelerator: Accelerator, micro_batches: Sequence[Batch]) -> torch.Tensor:
    """Return which share of the step's labels and of its tokens each micro-batch has, (micro-batches, 2).

    A loss is a mean over the labels or the tokens of one micro-batch. Weighted with these shares, the losses of all
    micro-batches of all processes add up to the mean over the whole step.
    """
    counts = torch.tensor([count_positions(batch) for batch in micro_batches], device=accelerator.device)
    return counts / accelerator.reduce(counts.sum(dim=0)).clamp(min=1)


def count_positions(batch: Batch) -> tuple[int, int]:
    """Return how many tokens of a batch have a label, and how many are not padding."""
    return int((batch["labels"] != IGNORE_INDEX).sum()), int(batch["attention_mask"].sum())


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW: matrices decay, biases and LayerNorms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
