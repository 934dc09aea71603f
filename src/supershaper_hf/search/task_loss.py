"""How good a shape is at a task: the loss and the score of its head on labelled examples.

The loss is that of the head itself, as it is trained: the mean over all labels of all examples. These are one per
sequence, one per token that has a label, a start and an end per question, or one per choice. A batch counts by its
labels, so the loss does not depend on how the examples are divided into batches.

The score is what a function makes of the logits and the labels of all examples, such as an accuracy.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import nested_concat

from ..model.modeling_supershaper import (
    IGNORE_INDEX,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperPreTrainedModel,
)


HEADS = (
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperForQuestionAnswering,
    SuperShaperForMultipleChoice,
)
SPAN = ("start_positions", "end_positions")
LOGITS = ("logits", "start_logits", "end_logits")

Batch = dict[str, torch.Tensor]
# From logits and labels of all examples, as `Trainer` gives them to `compute_metrics`: an array each, or a tuple of
# arrays for the starts and the ends of answers. Shorter sequences are filled up with -100.
Score = Callable[[Any, Any], float]


def check_task_head(model: SuperShaperPreTrainedModel) -> None:
    """Raise an error unless a model has the head of a task."""
    if not isinstance(model, HEADS):
        raise ValueError(
            f"{type(model).__name__} has no head of a task, so it has no loss on one. Allowed: "
            f'{", ".join(head.__name__ for head in HEADS)}. Use measure="distance", which needs no head.'
        )


def count_labels(batch: Batch) -> float:
    """Return the number of labels in a batch. The start and the end of an answer count half each.

    Raises:
        ValueError: If the batch has no labels.

    Example:
        >>> count_labels({"labels": torch.tensor([[1, 0, -100], [2, -100, -100]])})
        3
    """
    if "labels" in batch:
        return int((batch["labels"] != IGNORE_INDEX).sum())
    if not all(name in batch for name in SPAN):
        raise ValueError(
            f"A batch has {sorted(batch)}, but no labels. The loss on a task needs labels, or start_positions and "
            "end_positions."
        )
    length = batch["input_ids"].shape[1]
    return sum(int((batch[name] < length).sum()) for name in SPAN) / 2  # the head ignores what the text has lost


def task_losses(
    model: SuperShaperPreTrainedModel,
    batches: Sequence[Batch],
    shape: Sequence[int] | None,
    predictions: list[Any] | None = None,
) -> torch.Tensor:
    """Return the sum of the losses of all labels of each batch, (batches, 1).

    Args:
        model: A model with the head of a task.
        batches: Batches with labels, on the device of `model`.
        shape: The shape, or `None` for the largest.
        predictions: A list that gets the logits of each batch as NumPy arrays. By default none are kept.
    """
    sums = []
    for batch in batches:
        output: Any = model(**batch, shape=shape, num_items_in_batch=1)  # a mean over one label: the sum
        sums.append(output.loss.float())
        if predictions is not None:
            predictions.append(_join(output[name].float().cpu().numpy() for name in LOGITS if name in output))
    return torch.stack(sums)[:, None]


def compute_score(score: Score, predictions: Sequence[Any], batches: Sequence[Batch]) -> float | None:
    """Return the score of the predictions for all batches. One that is not finite is None.

    Raises:
        TypeError: If the function does not return a number.
    """
    labels = [
        _join(batch[name].cpu().numpy() for name in (("labels",) if "labels" in batch else SPAN)) for batch in batches
    ]
    everything = []
    for parts in (predictions, labels):
        whole = parts[0]
        for part in parts[1:]:
            whole = nested_concat(whole, part, padding_index=IGNORE_INDEX)
        everything.append(whole)
    found = score(*everything)
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise TypeError(f"score must return one number, not {found!r}.") from None
    return value if math.isfinite(value) else None


def score_name(score: Score | None) -> str | None:
    """Return the name of a score, which a records file keeps: that of the function."""
    return None if score is None else getattr(score, "__name__", type(score).__name__)


def _join(arrays: Any) -> Any:
    """Return one array alone, and several as a tuple."""
    first, *others = arrays
    return (first, *others) if others else first
