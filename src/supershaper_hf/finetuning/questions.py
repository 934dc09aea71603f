"""Questions whose answer is a span of a text: contexts become overlapping windows, and logits become answers.

A window is [CLS] question [SEP] part of the context [SEP]. Its labels are the first and the last token of the answer.
If the window does not hold the whole answer, or there is none, both are [CLS] (Devlin et al., arXiv 1810.04805).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, EvalPrediction, PreTrainedTokenizerBase

from ..checks import check_count, check_number
from .rows import check_tokenizer, split_sources
from .squad import SquadMetric, read_questions
from .task import Task


OUTSIDE = [-1, -1]  # the offsets of tokens that are not of the context
KEPT = ("example", "offsets", "null_position")  # columns that scoring needs and the model does not


def question_task(
    tokenizer: PreTrainedTokenizerBase,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    dataset_name: str | None = None,
    max_length: int = 384,
    stride: int | None = None,
    max_question_length: int | None = None,
    max_answer_length: int = 30,
    null_score_diff_threshold: float = 0.0,
    name: str = "qa",
) -> Task:
    """Return the task of answering questions with a span of a text, tokenised.

    If any question has no answer, the task is of SQuAD's version 2: a model may answer that there is no answer.

    Args:
        tokenizer: The tokenizer of the model.
        train_file: The questions to train on. `read_questions` says what a file may be.
        validation_file: The questions that choose the best epoch.
        dataset_name: Instead of files: Hub id or folder of a data set with the splits train and validation, or either
            with `:configuration`.
        max_length: Tokens of the longest window, question and special tokens included.
        stride: Tokens that two neighbouring windows of a context share. By default a third of `max_length`.
        max_question_length: Tokens after which a question is cut. By default 64, but no more than a quarter of
            `max_length`.
        max_answer_length: Tokens of the longest answer that is given.
        null_score_diff_threshold: In version 2, the answer is that there is none if the score of [CLS] exceeds that of
            the best span by more than this.
        name: What cards and results call the task.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged or missing, `tokenizer` does not fit, or `max_length` is too small.

    Example:
        >>> task = question_task(tokenizer, "train-v2.0.json", "dev-v2.0.json")  # doctest: +SKIP
        >>> task.score  # doctest: +SKIP
        'f1'
    """
    check_tokenizer(tokenizer, max_length)
    check_count("max_answer_length", max_answer_length)
    check_number("null_score_diff_threshold", null_score_diff_threshold)
    lengths = check_lengths(tokenizer, max_length, stride, max_question_length)
    sources = split_sources(train_file, {"validation": validation_file}, dataset_name)
    examples = {split: read_questions(*source) for split, source in sources.items()}
    windows = {split: make_windows(data, tokenizer, *lengths) for split, data in examples.items()}
    scorer = QuestionScorer(
        examples=examples["validation"],
        windows=windows["validation"],
        version_2=any(not answers["text"] for data in examples.values() for answers in data["answers"]),
        max_answer_length=max_answer_length,
        threshold=null_score_diff_threshold,
    )
    return Task(
        name=name,
        auto_class=AutoModelForQuestionAnswering,
        config={"num_labels": 2},
        train=windows["train"].remove_columns(KEPT),
        evaluation={"validation": windows["validation"].remove_columns(KEPT)},
        collator=WindowCollator(tokenizer),
        compute_metrics=scorer,
        score="f1",
        rows="windows",
        options={
            "max_answer_length": max_answer_length,
            "null_score_diff_threshold": null_score_diff_threshold,
        },
    )


def check_lengths(
    tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None, max_question_length: int | None
) -> tuple[int, int, int]:
    """Return the three lengths, or raise a ValueError if windows of the context could not move on."""
    stride = max_length // 3 if stride is None else stride
    question = min(64, max_length // 4) if max_question_length is None else max_question_length
    check_count("stride", stride, 0)
    check_count("max_question_length", question)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = max_length - special - question
    if stride >= room:
        raise ValueError(
            f"stride={stride} must be less than {room}: of max_length={max_length}, {question} are for the question "
            f"and {special} for special tokens. Choose a larger max_length or a smaller stride."
        )
    return max_length, stride, question


# From questions to windows


def make_windows(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int, max_question_length: int
) -> Dataset:
    """Return the windows of all questions, those of a question one after the other, without padding.

    Args:
        examples: What `read_questions` returns.
        tokenizer: A fast tokenizer with [CLS].
        max_length: Tokens of the longest window.
        stride: Tokens that two neighbouring windows share.
        max_question_length: Tokens after which a question is cut.

    Returns:
        A dataset with the inputs of a model, `start_positions` and `end_positions`, and what scoring needs: `example`
        (the row of the question), `offsets` (the characters of the context that each token stands for; -1 if none) and
        `null_position` (the position of [CLS]).
    """

    def tokenize(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
        encoded = tokenizer(
            cut_questions(batch["question"], tokenizer, max_question_length),
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        question_of = encoded.pop("overflow_to_sample_mapping")
        offsets = [
            [list(pair) if part == 1 else OUTSIDE for pair, part in zip(pairs, encoded.sequence_ids(window))]
            for window, pairs in enumerate(encoded.pop("offset_mapping"))
        ]
        nulls = [ids.index(tokenizer.cls_token_id) for ids in encoded["input_ids"]]
        labels = list(answer_positions(offsets, nulls, question_of, batch["answers"]))
        return {
            **encoded,
            "start_positions": [first for first, _ in labels],
            "end_positions": [last for _, last in labels],
            "example": [rows[question] for question in question_of],
            "offsets": offsets,
            "null_position": nulls,
        }

    return examples.map(tokenize, batched=True, with_indices=True, remove_columns=examples.column_names)


def cut_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """Return questions of at most `length` tokens, without white space around them."""
    stripped = [question.strip() for question in questions]
    encoded = tokenizer(
        stripped, add_special_tokens=False, truncation=True, max_length=length, return_offsets_mapping=True
    )
    return [
        question[pairs[0][0] : pairs[-1][1]] if len(pairs) == length else question
        for question, pairs in zip(stripped, encoded["offset_mapping"])
    ]


def answer_positions(
    offsets: Sequence[Sequence[Sequence[int]]],
    nulls: Sequence[int],
    question_of: Sequence[int],
    answers: Sequence[dict[str, list[Any]]],
) -> Iterator[tuple[int, int]]:
    """Yield the first and the last token of the answer in each window; [CLS] twice if it does not hold all of it.

    Args:
        offsets: The characters of each token of each window, as in `make_windows`.
        nulls: The position of [CLS] in each window.
        question_of: The question of each window.
        answers: The answers of each question. The first one counts.
    """
    whole: dict[int, tuple[int, int]] = {}  # the characters of each answer, widened to whole tokens of any window
    inside = []
    for pairs, question in zip(offsets, question_of):
        tokens = tokens_of_answer(pairs, answers[question])
        inside.append(tokens)
        if tokens:
            begin, end = whole.get(question, (pairs[tokens[0]][0], 0))
            whole[question] = min(begin, pairs[tokens[0]][0]), max(end, pairs[tokens[-1]][1])
    for pairs, null, question, tokens in zip(offsets, nulls, question_of, inside):
        if tokens and (pairs[tokens[0]][0], pairs[tokens[-1]][1]) == whole[question]:
            yield tokens[0], tokens[-1]
        else:
            yield null, null


def tokens_of_answer(pairs: Sequence[Sequence[int]], answers: dict[str, list[Any]]) -> list[int]:
    """Return the tokens that share a character with the first answer."""
    if not answers["text"]:
        return []
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    return [token for token, (first, last) in enumerate(pairs) if first < end and last > begin]


class WindowCollator:
    """Makes a batch of windows. Padding is on the right, also for a tokenizer that pads on the left.

    So a position in the logits is a position in the window, whatever batch the window was in.

    Args:
        tokenizer: The tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, windows: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.tokenizer.pad(windows, padding_side="right", return_tensors="pt"))


# From logits to answers


@dataclass(frozen=True)
class Answers:
    """The best answers to a question.

    Attributes:
        texts: Different spans of the context, the best one first. There is none if the context is empty.
        scores: The logit of the first token plus that of the last one.
        null_score: The same for [CLS], of the window where it is lowest.
    """

    texts: list[str]
    scores: list[float]
    null_score: float

    def doubt(self) -> float:
        """Return by how much the score of [CLS] exceeds that of the best span."""
        return self.null_score - self.scores[0] if self.scores else float("inf")


@dataclass(frozen=True)
class QuestionScorer:
    """Computes exact match and F1 of a model's logits on one split, as `Trainer` calls it.

    Attributes:
        examples: The questions, from `read_questions`.
        windows: Their windows, from `make_windows`.
        version_2: Whether a question may have no answer.
        max_answer_length: Tokens of the longest answer.
        threshold: By how much the score of [CLS] may exceed that of the best span before there is no answer.
    """

    examples: Dataset
    windows: Dataset
    version_2: bool
    max_answer_length: int = 30
    threshold: float = 0.0

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the scores that `SquadMetric` computes.

        Raises:
            ValueError: If the predictions are not those of this split in its order.
        """
        starts, ends = np.asarray(prediction.label_ids)
        expected = [self.windows[name][:] for name in ("start_positions", "end_positions")]
        if not (np.array_equal(starts, expected[0]) and np.array_equal(ends, expected[1])):
            raise ValueError("The predictions are not those of the validation split, in its order.")
        return self.score(self.answers(*prediction.predictions))

    def answers(self, start_logits: np.ndarray, end_logits: np.ndarray, count: int = 1) -> list[Answers]:
        """Return the best `count` answers to every question.

        Args:
            start_logits: (windows, length), padded on the right.
            end_logits: (windows, length).
            count: Number of answers to a question.
        """
        best: list[dict[str, float]] = [{} for _ in range(len(self.examples))]
        nulls = [float("inf")] * len(best)
        contexts = self.examples["context"][:]
        for window, start, end in zip(self.windows.select_columns(list(KEPT)), start_logits, end_logits, strict=True):
            question, null = window["example"], window["null_position"]
            nulls[question] = min(nulls[question], float(start[null]) + float(end[null]))
            for score, first, last in best_spans(start, end, window["offsets"], self.max_answer_length, count):
                text = contexts[question][first:last]
                best[question][text] = max(score, best[question].get(text, score))
        found = []
        for texts, null in zip(best, nulls):
            order = sorted(texts, key=lambda text: -texts[text])[:count]
            found.append(Answers(order, [texts[text] for text in order], null))
        return found

    def score(self, found: Sequence[Answers]) -> dict[str, float]:
        """Return the scores of answers to all questions."""
        predictions: list[dict[str, Any]] = [
            {"id": name, "prediction_text": answers.texts[0] if answers.texts else ""}
            for name, answers in zip(self.examples["id"], found, strict=True)
        ]
        options = {}
        if self.version_2:
            options["no_answer_threshold"] = self.threshold
            for prediction, answers in zip(predictions, found):
                prediction["no_answer_probability"] = answers.doubt()
        references = [{"id": row["id"], "answers": row["answers"]} for row in self.examples]
        metric = SquadMetric(self.version_2, keep_in_memory=True)
        return metric.compute(predictions=predictions, references=references, **options)


def best_spans(
    start: np.ndarray, end: np.ndarray, offsets: Sequence[Sequence[int]], longest: int, count: int
) -> list[tuple[float, int, int]]:
    """Return the `count` best spans of one window, as score, first character and the one after the last.

    All spans are compared, not only those of the best first and the best last tokens.

    Args:
        start: The logits of the first token (length).
        end: The logits of the last token (length).
        offsets: The characters of each token, as in `make_windows`.
        longest: Tokens of the longest span.
        count: Number of spans.

    Example:
        >>> offsets = [[-1, -1], [0, 4], [5, 7], [8, 13]]
        >>> best_spans(np.array([9.0, 1, 2, 0]), np.array([9.0, 0, 0, 3]), offsets, longest=2, count=2)
        [(5.0, 5, 13), (3.0, 8, 13)]
    """
    context = [token for token, pair in enumerate(offsets) if pair[0] >= 0]
    lengths = range(1, min(longest, len(context)) + 1)
    if not context:
        return []
    first = np.concatenate([np.arange(len(context) - length + 1) for length in lengths])
    last = np.concatenate([np.arange(length - 1, len(context)) for length in lengths])
    scores = np.asarray(start, np.float64)[context][first] + np.asarray(end, np.float64)[context][last]
    order = np.argsort(-scores, kind="stable")
    spans = ((scores[span], offsets[context[first[span]]][0], offsets[context[last[span]]][1]) for span in order)
    written = ((float(score), begin, finish) for score, begin, finish in spans if begin < finish)
    return list(islice(written, count))
