"""Measure what many shapes of one supernet are worth: masked-LM loss on the same masked text for all."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .modeling_supershaper import IGNORE_INDEX, SuperShaperForMaskedLM


@torch.no_grad()
def evaluate_shapes(
    model: SuperShaperForMaskedLM,
    batches: Sequence[dict[str, torch.Tensor]],
    shapes: Sequence[Sequence[int] | None],
    description: str = "Measuring shapes",
) -> list[dict[str, Any]]:
    """Measure each shape on every labelled token of `batches`.

    Args:
        model: A supernet, or a subnet with `shapes=[None]`. Its training mode is left as it was.
        batches: Masked batches from `data.fixed_masks`.
        shapes: Shapes to measure; `None` is the model's own full shape.
        description: Label of the progress bar.

    Returns:
        One record per shape: `shape`, `loss` in nats per labelled token, `perplexity`, `accuracy` (share of labelled
        tokens predicted exactly).

    Raises:
        ValueError: If no token is labelled, or a shape is not allowed.
    """
    batches = [batch for batch in batches if (batch["labels"] != IGNORE_INDEX).any()]
    if not batches:
        raise ValueError("No token of the batches is labelled. Use more text, or a higher masking rate.")
    was_training = model.training
    model.eval()
    records = []
    for shape in tqdm(shapes, desc=description, disable=len(shapes) < 2):
        loss, correct, tokens = 0.0, 0, 0
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
            output = model(**batch, shape=shape, sparse_prediction=True)
            loss += output.loss.item() * len(labels)
            correct += int((output.logits.argmax(-1) == labels).sum())
            tokens += len(labels)
        mean = loss / tokens
        records.append(
            {
                "shape": model.config.hidden_sizes if shape is None else model.config.normalize_shape(shape),
                "loss": mean,
                "perplexity": math.exp(mean),
                "accuracy": correct / tokens,
            }
        )
    model.train(was_training)
    return records
