"""The method: what one optimiser step of super pre-training computes.

Each step trains the largest shape, the smallest one and some random ones on the same text. This is the sandwich rule
(Yu and Huang, "Universally Slimmable Networks", 2019; section 3 of SuperShaper, arXiv 2110.04711). `step_shapes` draws
the shapes, `sandwich_step` adds up their gradients, `exchange_gradients` averages these over processes, and
`decay_groups` separates the parameters that decay. `loop.py` calls the first two in every step.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import distributed
from transformers.modeling_outputs import MaskedLMOutput

from ..model.elastic import SuperShaperNarrowWidth
from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperForMaskedLM, SuperShaperPreTrainedModel
from ..model.shapes import SearchSpace
from .arguments import SuperPretrainingArguments
from .distillation import Largest, Objective, watch_layers, watch_state


BUCKET = 2**23  # numbers that processes exchange at once: 32 MB in float32
Batch = dict[str, torch.Tensor]
Shape = Sequence[int] | None  # None is the model's own full shape


def step_shapes(space: SearchSpace | None, args: SuperPretrainingArguments, step: int) -> list[Shape]:
    """Return the shapes of a step. Equal (seed, step) give equal shapes, on every process and after a resume.

    In a sandwich the largest shape comes first, so that it can teach the others; "smallest" is a sandwich without it.
    Only random shapes drop layers.

    Args:
        space: The search space; `None` for `sampling="fixed"`.
        args: The options `sampling`, `random_shapes`, `distribution`, `drop_rate`, `shape` and `seed` are used.
        step: Number of the step.
    """
    if space is None:
        return [args.shape]
    drawn = space.sample(args.random_shapes, (args.seed, step), args.distribution, args.drop_rate).tolist()
    ends = {"sandwich": [space.largest, space.smallest], "smallest": [space.smallest], "random": []}
    return [*ends[args.sampling], *drawn]


def sandwich_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Sequence[Batch],
    shapes: Sequence[Shape],
    objective: Objective,
) -> torch.Tensor:
    """Add up the gradients of every shape on every micro-batch, as if all processes together had one large batch.

    For each micro-batch the shapes run one after the other. By the sandwich rule the largest is the first, because the
    others learn from it. Each is backpropagated before the next one runs, so that the memory holds the activations of
    one shape only. Processes exchange gradients once, after the last backward pass, and a parameter that no shape of
    the step has used keeps `grad=None`.

    Args:
        accelerator: Knows the device and the other processes.
        model: A supernet, or a subnet with `shapes=[None]`, as `accelerator.prepare` returned it.
        micro_batches: This process's part of the step, `input_ids`, `attention_mask` and `labels`, (batch, length)
            each.
        shapes: What `step_shapes` returned.
        objective: What the shapes learn from.

    Returns:
        This process's part of each shape's loss, (shapes,), without gradients: the masked-LM loss in nats, or without
        labels the error of the last hidden state (`losses.state_loss`). Added up over all processes, it is the mean
        over all labels, or all tokens, of the step.
    """
    bare = accelerator.unwrap_model(model)
    predict = run_masked_lm if isinstance(bare, SuperShaperForMaskedLM) else run_encoder
    order = order_of_passes(bare, shapes)
    # FSDP2 exchanges gradients in a backward pass, so it has to know the last one. DDP would wait in it for every
    # parameter, so it never exchanges by itself.
    sharded = accelerator.is_fsdp2
    last_pass = (len(micro_batches) - 1, order[-1]) if sharded else None
    losses = torch.zeros(len(shapes), device=accelerator.device)
    shares = shares_of_step(accelerator, micro_batches)
    for number, (batch, (label_share, token_share, sequence_share)) in enumerate(zip(micro_batches, shares)):
        labelled = count_positions(batch)[0] > 0
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        mask = batch["attention_mask"]
        with accelerator.autocast():
            outside = objective.teacher(batch) if objective.teacher else None
        largest = None
        for index in order:
            shape = shapes[index]
            with nullcontext() if (number, index) == last_pass else accelerator.no_sync(model):
                with (
                    watch_layers(model, objective.layers(shape or bare.config.hidden_sizes)) as activations,
                    watch_state(model, objective.compares_outputs) as states,
                ):
                    output = predict(model, batch, shape, labelled)
                state_loss, by_sequence = objective.output_losses(states, mask, outside)
                by_label = objective.label_loss(output, largest)
                by_token = (
                    objective.layer_loss(activations, mask, largest, outside) + objective.state_weight * state_loss
                )
                loss = label_share * by_label + token_share * by_token + sequence_share * by_sequence
                if loss.requires_grad:  # not if the shape uses frozen weights alone
                    accelerator.backward(loss * accelerator.num_processes)  # the exchange takes the mean over processes
            losses[index] += (label_share * output.loss if objective.labels else token_share * state_loss).detach()
            if largest is None and objective.in_place:  # the largest is first in either order
                largest = Largest.of(output, activations)
    if accelerator.num_processes > 1 and not sharded:
        exchange_gradients(model)
    return losses


def run_masked_lm(model: torch.nn.Module, batch: Batch, shape: Shape, labelled: bool) -> MaskedLMOutput:
    """Run a shape of a model with a masked-LM head, which runs on labelled positions only.

    Without a labelled position the loss is 0, because the mean over no labels is undefined. As the sum over no logits
    it still is a function of what the model returned. FSDP2 waits for the gradient of that.
    """
    output: MaskedLMOutput = model(**batch, shape=shape, sparse_prediction=True)
    if not labelled:
        assert output.logits is not None
        output.loss = output.logits.sum()
    return output


def run_encoder(model: torch.nn.Module, batch: Batch, shape: Shape, labelled: bool) -> MaskedLMOutput:
    """Run a shape of a bare model, or of one with another head. The loss is 0: the sum over no part of its output."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return MaskedLMOutput(loss=model(**inputs, shape=shape)[0][:0].sum())


def shares_of_step(accelerator: Accelerator, micro_batches: Sequence[Batch]) -> torch.Tensor:
    """Return which share of the step's labels, tokens and sequences each micro-batch has, (micro-batches, 3).

    A loss is a mean over the labels, the tokens or the sequences of one micro-batch. Weighted with these shares, the
    losses of all micro-batches of all processes add up to the mean over the whole step.
    """
    counts = [[*count_positions(batch), len(batch["input_ids"])] for batch in micro_batches]
    counted = torch.tensor(counts, device=accelerator.device)
    return counted / accelerator.reduce(counted.sum(dim=0)).clamp(min=1)


def exchange_gradients(model: torch.nn.Module) -> None:
    """Replace every gradient by its mean over all processes. A parameter without a gradient keeps none.

    All processes have to have gradients of the same parameters. They have, because they train the same shapes.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    while gradients:
        bucket = [gradients.pop()]
        while gradients and sum(gradient.numel() for gradient in bucket) < BUCKET:
            bucket.append(gradients.pop())
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(mean.view_as(gradient))


def count_positions(batch: Batch) -> tuple[int, int]:
    """Return how many tokens of a batch have a label, and how many are not padding."""
    return int((batch["labels"] != IGNORE_INDEX).sum()), int(batch["attention_mask"].sum())


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW: matrices decay, biases and LayerNorms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def parameters_by_width(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Return the parameters that one width of one layer uses alone; none without `bottlenecks="by_width"`."""
    return {p for module in model.modules() if isinstance(module, SuperShaperNarrowWidth) for p in module.parameters()}


def order_of_passes(model: SuperShaperPreTrainedModel, shapes: Sequence[Shape]) -> list[int]:
    """Return the indices of the shapes in the order in which they run: as given, but those that learn nothing first.

    If what all widths share is frozen, a shape without a narrow width learns nothing. FSDP2 exchanges gradients in the
    last backward pass, so the last shape has to have one.
    """
    own = parameters_by_width(model)
    if any(parameter.requires_grad and parameter not in own for parameter in model.parameters()):
        return list(range(len(shapes)))
    config = model.config
    full: Sequence[int] = config.hidden_sizes or []  # a model always has them
    learns = [any(width and config.has_own_maps(width) for width in shape or full) for shape in shapes]
    return sorted(range(len(shapes)), key=learns.__getitem__)
