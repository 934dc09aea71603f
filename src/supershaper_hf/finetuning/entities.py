"""Named entities, or other spans of words: sentences become tokens with labels, and whole entities are scored.

The scores are those of seqeval in its default mode, which are those of `conlleval`, the script of CoNLL 2000 and 2003.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import (
    AutoModelForTokenClassification,
    BatchEncoding,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from ..model.modeling_supershaper import IGNORE_INDEX
from .labelled_words import read_sentences
from .rows import check_tokenizer, split_sources
from .task import Task


def entity_task(
    tokenizer: PreTrainedTokenizerBase,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    dataset_name: str | None = None,
    max_length: int = 128,
    token_column: int = 0,
    label_column: int = -1,
    name: str = "ner",
) -> Task:
    """Return the task of labelling the words of sentences, tokenised.

    The first token of a word has the label of the word, its other tokens have none. Sentences of more than `max_length`
    tokens are divided, not cut off: every word is scored once, and an entity that is divided counts as two.

    Args:
        tokenizer: The tokenizer of the model.
        train_file: The sentences to train on. `read_sentences` says what a file may be.
        validation_file: The sentences that choose the best epoch.
        test_file: Further sentences that are scored.
        dataset_name: Instead of files: Hub id or folder of a data set with the splits train, validation and maybe test,
            or either with `:configuration`.
        max_length: Tokens of the longest sequence, [CLS] and [SEP] included.
        token_column: The column of the word in CoNLL files, from 0; -1 is the last one.
        label_column: The column of the label in CoNLL files.
        name: What cards and results call the task.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged or missing, or `tokenizer` does not fit.

    Example:
        >>> task = entity_task(tokenizer, "train.conll", "validation.conll")  # doctest: +SKIP
        >>> task.config["id2label"]  # doctest: +SKIP
        {0: 'B-LOC', 1: 'B-PER', 2: 'I-LOC', 3: 'I-PER', 4: 'O'}
    """
    check_tokenizer(tokenizer, max_length)
    sources = split_sources(train_file, {"validation": validation_file, "test": test_file}, dataset_name)
    splits = {split: read_sentences(*source, token_column, label_column) for split, source in sources.items()}
    labels = sorted({label for data in splits.values() for sentence in data["labels"] for label in sentence})
    numbers = {label: number for number, label in enumerate(labels)}
    tokenized = {split: tokenize_sentences(data, tokenizer, numbers, max_length) for split, data in splits.items()}
    return Task(
        name=name,
        auto_class=AutoModelForTokenClassification,
        config={"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers},
        train=tokenized.pop("train"),
        evaluation=tokenized,
        collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=partial(compute_metrics, labels),
        score="f1",
    )


# Tokens


def tokenize_sentences(
    sentences: Dataset, tokenizer: PreTrainedTokenizerBase, numbers: dict[str, int], max_length: int
) -> Dataset:
    """Return sentences as token ids with `labels`, one number for each token and -100 where there is none.

    A word that the tokenizer makes no token of, such as a zero-width space, becomes the unknown token.

    Args:
        sentences: What `read_sentences` returns.
        tokenizer: A tokenizer that knows which word a token belongs to.
        numbers: The number of each label.
        max_length: Tokens of the longest sequence.
    """

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            visible_words(batch["tokens"], tokenizer),
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
        )
        sentence_of = encoded.pop("overflow_to_sample_mapping")
        firsts = first_tokens(encoded, sentence_of, reverse=tokenizer.truncation_side == "left")
        labels = [[IGNORE_INDEX] * len(ids) for ids in encoded["input_ids"]]
        for sequence, position, word in firsts:
            labels[sequence][position] = numbers[batch["labels"][sentence_of[sequence]][word]]
        return {**encoded, "labels": labels}

    return sentences.map(tokenize, batched=True, remove_columns=sentences.column_names)


def visible_words(sentences: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Return sentences with the unknown token in place of words that have no token."""
    encoded = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False, verbose=False)
    seen = [set(encoded.word_ids(number)) for number in range(len(sentences))]
    unknown = str(tokenizer.unk_token)
    return [
        [word if number in visible else unknown for number, word in enumerate(words)]
        for words, visible in zip(sentences, seen)
    ]


def first_tokens(encoded: BatchEncoding, sentence_of: Sequence[int], reverse: bool) -> Iterator[tuple[int, int, int]]:
    """Yield the sequence, the position and the word of each word's first token.

    Args:
        encoded: Sentences of words, as sequences of tokens. A long sentence has several sequences, one after the other.
        sentence_of: The sentence of each sequence.
        reverse: Whether the sequences of a sentence are in reverse order, as with truncation on the left.
    """
    before = None  # the sentence and word of the token before
    order = range(len(sentence_of))
    for sequence in reversed(order) if reverse else order:
        for position, word in enumerate(encoded.word_ids(sequence)):
            if word is not None and (sentence_of[sequence], word) != before:
                before = sentence_of[sequence], word
                yield sequence, position, word


# Scores


def compute_metrics(names: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    """Return precision, recall and F1 of all entities, F1 of each type, and the accuracy of labels.

    Args:
        names: The labels, by number.
        prediction: Logits (sequences, length, labels) and labels (sequences, length), as `Trainer` has them.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    expected = np.asarray(prediction.label_ids)
    scored = expected != IGNORE_INDEX
    predicted = logits.argmax(axis=-1)
    words = [
        [[names[number] for number in row[mask]] for row, mask in zip(rows, scored)] for rows in (predicted, expected)
    ]
    found = SeqevalMetric(keep_in_memory=True).compute(predictions=words[0], references=words[1])
    overall = {name: found.pop(f"overall_{name}") for name in ("precision", "recall", "f1", "accuracy")}
    return overall | {f"f1_{kind}": scores["f1"] for kind, scores in found.items()}


class SeqevalMetric(evaluate.Metric):
    """Scores of entities, each of which is right only as a whole: type, first and last word.

    They are computed here, because seqeval is no longer maintained and would bring scikit-learn to every installation.
    A test compares both. Keys and values are those of `evaluate.load("seqeval")`, which needs the network.

    Example:
        >>> metric = SeqevalMetric(keep_in_memory=True)
        >>> found = metric.compute(predictions=[["B-PER", "O", "B-LOC"]], references=[["B-PER", "I-PER", "B-LOC"]])
        >>> found["LOC"]
        {'precision': 1.0, 'recall': 1.0, 'f1': 1.0, 'number': 1}
        >>> found["overall_f1"]
        0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Scores of entities, as conlleval (CoNLL 2000) and seqeval define them.",
            citation="",
            inputs_description="predictions and references: for each sentence, the labels of its words",
            features=Features({"predictions": List(Value("string")), "references": List(Value("string"))}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, Any]:
        if [len(labels) for labels in predictions] != [len(labels) for labels in references]:
            raise ValueError("Predictions and references must have the same number of labels in every sentence.")
        found, expected = set(find_entities(predictions)), set(find_entities(references))
        kinds = sorted({entity[0] for entity in found | expected})
        by_kind = {
            kind: entity_scores(
                *({entity for entity in entities if entity[0] == kind} for entities in (found, expected))
            )
            for kind in kinds
        }
        overall = entity_scores(found, expected)
        pairs = [pair for sentence in zip(predictions, references) for pair in zip(*sentence)]
        accuracy = sum(first == second for first, second in pairs) / len(pairs) if pairs else 0.0
        return {
            **by_kind,
            **{f"overall_{name}": overall[name] for name in ("precision", "recall", "f1")},
            "overall_accuracy": accuracy,
        }


Entity = tuple[str, int, int, int]  # type, sentence, first and last word


def entity_scores(found: set[Entity], expected: set[Entity]) -> dict[str, Any]:
    """Return precision, recall, F1, and the number of expected entities. A ratio over nothing is 0."""
    right = len(found & expected)
    return {
        "precision": right / len(found) if found else 0.0,
        "recall": right / len(expected) if expected else 0.0,
        "f1": 2 * right / (len(found) + len(expected)) if found or expected else 0.0,
        "number": len(expected),
    }


def find_entities(sentences: Iterable[Sequence[str]]) -> Iterator[Entity]:
    """Yield the entities of labelled sentences, in the schemes IOB1, IOB2, IOE and IOBES.

    Labels that do not follow a scheme count as in conlleval: I-PER begins an entity after O, and after another type.

    Example:
        >>> list(find_entities([["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]]))
        [('PER', 0, 0, 1), ('LOC', 0, 3, 3), ('LOC', 0, 4, 4)]
    """
    for number, labels in enumerate(sentences):
        first = 0
        tags = [("O", ""), *((label[0], label[2:] or "_") for label in labels), ("O", "")]
        for position, (before, here) in enumerate(pairwise(tags)):
            if ends_between(before, here):
                yield before[1], number, first, position - 1
            if begins_between(before, here):
                first = position


def ends_between(before: tuple[str, str], here: tuple[str, str]) -> bool:
    """Return whether an entity ends before the word `here`: pairs of B, I, E, S or O, and the type."""
    return before[0] != "O" and (before[0] in "ES" or here[0] in "BSO" or before[1] != here[1])


def begins_between(before: tuple[str, str], here: tuple[str, str]) -> bool:
    """Return whether an entity begins at the word `here`."""
    return here[0] != "O" and (here[0] in "BS" or before[0] in "ESO" or before[1] != here[1])
