"""What one task consists of, once its text has been tokenised: the same for GLUE, named entities and questions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import EvalPrediction


@dataclass(frozen=True)
class Task:
    """A task, ready to be trained on and to be scored.

    Attributes:
        name: What cards and results call it, such as `"sst2"`.
        auto_class: The Auto class of its head, such as `AutoModelForSequenceClassification`.
        config: What the configuration of a model for this task says, such as `num_labels`, `id2label`, `label2id` and
            `problem_type`.
        train: The tokenised training examples, with labels.
        evaluation: The tokenised examples of each split that is scored. The first split chooses the best epoch.
        collator: Makes a batch of examples.
        compute_metrics: Computes all scores of a split, as `Trainer` calls it. Predictions and labels are arrays.
        score: The one score that the best epoch has the highest value of, such as `"accuracy"`.
        options: What else decides the scores, such as the longest answer, by its name. It may not change in a folder.
        rows: What the rows of `train` are. Those of questions are windows of a context: one question has several.
    """

    name: str
    auto_class: Any
    config: dict[str, Any]
    train: Dataset
    evaluation: dict[str, Dataset]
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    score: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: str = "examples"
