"""Named entities, or other spans of words: sentences become tokens with labels, and entities are scored, not tokens.

The scores are those of seqeval in its default mode, which are those of CoNLL's script `conlleval`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from ..checks import check_count
from .labelled_words import read_sentences
from .task import Task


IGNORED = -100  # the label of tokens that are not scored
Entity = tuple[str, int, int]  # type, first and last word


def entity_task(
    tokenizer: PreTrainedTokenizerBase,
    train: str | Path,
    evaluation: dict[str, str | Path],
    *,
    name: str = "ner",
    dataset: bool = False,
    max_length: int = 128,
    token_column: int = 0,
    label_column: int = -1,
) -> Task:
    """Return the task of labelling words, with its sentences tokenised.

    The first token of a word has the label of the word, the others have none. A sentence of more than `max_length`
    tokens is divided, so that every word is learned from and scored once; an entity that is divided counts as two.

    Args:
        tokenizer: The tokenizer of the model, a fast one.
        train: The file of the sentences to train on. `read_sentences` says which files it reads.
        evaluation: The file of each split that is scored. The first split chooses the best epoch.
        name: What cards and results call the task.
        dataset: Whether `train` and the values of `evaluation` are splits, written as `source#split`.
        max_length: Tokens of the longest sequence, [CLS] and [SEP] included.
        token_column: The column of the word in a CoNLL file, from 0; -1 is the last one.
        label_column: The column of the label in a CoNLL file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged, or the tokenizer cannot say to which word a token belongs.
    """
