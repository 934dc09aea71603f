"""Measure what many shapes of one supernet are worth: masked-LM loss on the same masked text for all."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .modeling_supershaper import IGNORE_INDEX, SuperShaperForMaskedLM


@torch.no_grad()
def evaluate_shapes(
    model: SuperShaperForMaskedLM,
    batches: Sequence[dict[str, torch.Tensor]],
    shapes: Sequence[Sequence[int] | None],
    description: str = "Measuring shapes",
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Measure each shape on every labelled token of `batches`.

    Args:
        model: A supernet, or a subnet with `shapes=[None]`. Its training mode is left as it was.
        batches: Masked batches from `batches.fixed_masks`.
        shapes: Shapes to measure; `None` is the model's own full shape.
        description: Label of the progress bar.
        accelerator: If given, its processes share the batches; each returns the same records.

    Returns:
        One record per shape: `shape`, `loss` in nats per labelled token, `perplexity` (infinite where it overflows),
        `accuracy` (share of labelled tokens predicted exactly).

    Raises:
        ValueError: If no token is labelled, or a shape is not allowed.
    """
    batches = [batch for batch in batches if (batch["labels"] != IGNORE_INDEX).any()]
    if not batches:
        raise ValueError("No token of the batches is labelled. Use more text, or a higher masking rate.")
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    # Under FSDP every forward pass takes all processes: one without a batch left runs the last batch for nothing.
    rounds = math.ceil(len(batches) / processes)
    share = [(batches[min(i, len(batches) - 1)], i < len(batches)) for i in range(rank, rounds * processes, processes)]
    was_training = model.training
    model.eval()
    records = []
    try:
        for shape in tqdm(shapes, desc=description, disable=len(shapes) < 2 or rank > 0, leave=accelerator is None):
            sums = torch.zeros(3, dtype=torch.float64)
            for batch, counts in share:
                sums += counts * measure(model, batch, shape)
            if accelerator is not None:
                sums = accelerator.reduce(sums.to(accelerator.device))
            loss, correct, tokens = sums.tolist()
            widths = model.config.hidden_sizes if shape is None else model.config.normalize_shape(shape)
            perplexity = math.exp(loss / tokens) if loss / tokens < 709 else math.inf
            records.append(
                {"shape": widths, "loss": loss / tokens, "perplexity": perplexity, "accuracy": correct / tokens}
            )
    finally:
        model.train(was_training)
    return records


def measure(model: SuperShaperForMaskedLM, batch: dict[str, torch.Tensor], shape: Sequence[int] | None) -> torch.Tensor:
    """Return, as float64 on the CPU, a batch's summed loss in nats, right predictions, and number of labels."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    output = model(**batch, shape=shape, sparse_prediction=True)
    correct = (output.logits.argmax(-1) == labels).sum()
    return torch.tensor([output.loss.item() * len(labels), correct.item(), len(labels)], dtype=torch.float64)
