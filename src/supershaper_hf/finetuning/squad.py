"""SQuAD: questions about paragraphs whose answers are spans of them (version 1), or that have none (version 2).

Source: arXiv 1606.05250 and 1806.03822. The scores are those of the two scripts that the authors distribute.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
from datasets import Dataset, Features, List, Value

from .rows import Row, check_row, read_rows, read_split


ANSWERS = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
EXAMPLES = Features({name: Value("string") for name in ("id", "question", "context")} | {"answers": ANSWERS})


def read_questions(source: str | Path, split: str | None = None) -> Dataset:
    """Read questions with their contexts and answers.

    A file has the format that SQuAD is distributed in, articles of paragraphs of questions, or a row for each question
    with `id`, `context`, `question` and `answers`, as `datasets` has it. A question without an answer has no text in
    `answers`. If an answer does not stand where `answer_start` says, it is looked for nearby.

    Args:
        source: A .json, .jsonl or .parquet file. Or, with `split`, a data set.
        split: The split of the data set whose Hub id or folder is `source`, or either with `:configuration`.

    Returns:
        A dataset with the columns `id`, `question`, `context` and `answers`, which is {"text": [...],
        "answer_start": [...]}.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file or a row is damaged, an id occurs twice, or an answer does not occur in its context.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "train.jsonl")
        ...     _ = file.write_text('{"id": "7", "question": "Who?", "context": "I.", '
        ...                         '"answers": {"text": ["I"], "answer_start": [0]}}')
        ...     read_questions(file)[0]["answers"]
        {'text': ['I'], 'answer_start': [0]}
    """
    rows = read_rows(source) if split is None else read_split(str(source), split)
    places: dict[str, str] = {}
    examples = []
    for place, row in rows:
        for where, example in questions_of(place, row):
            name = example["id"]
            if name in places:
                raise ValueError(f"{where} has the id {name!r}, which {places[name]} has too. Each id must be its own.")
            places[name] = where
            examples.append(example)
    if not examples:
        raise ValueError(f"{source} holds no question.")
    return Dataset.from_list(examples, features=EXAMPLES)


def questions_of(place: str, row: Any) -> Iterator[Row]:
    """Yield the questions of a row, which is an article of SQuAD or a single question."""
    if not isinstance(row, dict) or "paragraphs" not in row:
        check_row(place, row, {"answers": dict})
        yield place, checked_question(place, row, row["answers"].get("text"), row["answers"].get("answer_start"))
        return
    check_row(place, row, {"paragraphs": list})
    for number, paragraph in enumerate(row["paragraphs"], start=1):
        where = f"{place}, paragraph {number}"
        check_row(where, paragraph, {"context": str, "qas": list})
        for count, question in enumerate(paragraph["qas"], start=1):
            here = f"{where}, question {count}"
            check_row(here, question, {"answers": list})
            for answer in question["answers"]:
                check_row(here, answer, {"text": str, "answer_start": int})
            texts, starts = ([answer[key] for answer in question["answers"]] for key in ("text", "answer_start"))
            yield here, checked_question(here, {**question, "context": paragraph["context"]}, texts, starts)


def checked_question(place: str, row: dict[str, Any], texts: Any, starts: Any) -> dict[str, Any]:
    """Return a question with the columns of `EXAMPLES`, or raise a ValueError that names its place."""
    check_row(place, row, {"id": str, "question": str, "context": str})
    lists = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not lists or not all(isinstance(text, str) and isinstance(start, int) for text, start in zip(texts, starts)):
        raise ValueError(
            f"{place}: 'answers' must be lists of equal length, 'text' of text and 'answer_start' of integers, got "
            f"{str({'text': texts, 'answer_start': starts})[:80]}."
        )
    found = [locate(row["context"], text, start) for text, start in zip(texts, starts)]
    if None in found:
        text = texts[found.index(None)]
        raise ValueError(f"{place} (id {row['id']!r}): the answer {text[:80]!r} does not occur in the context.")
    kept = {name: row[name] for name in ("id", "question", "context")}
    return {**kept, "answers": {"text": texts, "answer_start": found}}


def locate(context: str, text: str, start: int) -> int | None:
    """Return where `text` stands in `context`, the place next to `start` if there are several; None if it does not.

    Example:
        >>> locate("A rose is a rose.", "rose", 11)
        12
    """
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    return min(places, key=lambda place: abs(place - start), default=None)


# Scores


class SquadMetric(evaluate.Metric):
    """Exact match and F1 of answers in percent, as the scripts of SQuAD compute them.

    The arguments and results of `compute` are those of `evaluate.load("squad")` and `evaluate.load("squad_v2")`, which
    need the network. For version 2, a prediction also has a `no_answer_probability`, on any scale. Where it is above
    `no_answer_threshold` (1.0 if nothing is given), the answer is that there is none. `HasAns_` and `NoAns_` begin the
    scores of the questions with and without an answer; `best_f1` is the F1 at the best threshold, `best_f1_thresh`.

    Args:
        version_2: Whether questions may have no answer.
        **options: Further arguments of `evaluate.Metric`.

    Example:
        >>> predictions = [{"id": "1", "prediction_text": "the Potomac river"}]
        >>> references = [{"id": "1", "answers": {"text": ["Potomac", "the Ohio"], "answer_start": [4, 30]}}]
        >>> scores = SquadMetric(keep_in_memory=True).compute(predictions=predictions, references=references)
        >>> {name: round(score, 1) for name, score in scores.items()}
        {'exact_match': 0.0, 'f1': 66.7}
    """

    def __init__(self, version_2: bool = False, **options: Any) -> None:
        self.version_2 = version_2
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        prediction = {"id": Value("string"), "prediction_text": Value("string")}
        if self.version_2:
            prediction["no_answer_probability"] = Value("float32")
        return evaluate.MetricInfo(
            description="Exact match and F1 of SQuAD (arXiv 1606.05250, 1806.03822).",
            citation="",
            inputs_description="predictions: id and text; references: id and answers",
            features=Features({"predictions": prediction, "references": {"id": Value("string"), "answers": ANSWERS}}),
        )

    def _compute(
        self,
        predictions: Sequence[Mapping[str, Any]],
        references: Sequence[Mapping[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        by_id = {prediction["id"]: prediction for prediction in predictions}
        missing = [reference["id"] for reference in references if reference["id"] not in by_id]
        if missing or not references:
            raise ValueError(f"{len(missing)} of {len(references)} questions have no prediction: {missing[:3]}.")
        pairs = [(by_id[reference["id"]], list(reference["answers"]["text"])) for reference in references]
        if not self.version_2:
            scores = {"exact_match": exact_match, "f1": f1_of_version_1}
            return {
                name: percent([best_of(score, prediction["prediction_text"], texts) for prediction, texts in pairs])
                for name, score in scores.items()
            }
        return version_2_scores(pairs, no_answer_threshold)


def version_2_scores(pairs: Sequence[tuple[Mapping[str, Any], list[str]]], threshold: float) -> dict[str, float]:
    """Return the scores of predictions, each with the texts of its right answers, at a threshold and at the best."""
    answered = [bool(texts) for _, texts in pairs]
    doubts = [prediction["no_answer_probability"] for prediction, _ in pairs]
    found: dict[str, float] = {}
    best: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {"HasAns": {}, "NoAns": {}}
    for name, score in (("exact", exact_match), ("f1", f1)):
        raw = [
            best_of(score, prediction["prediction_text"], [text for text in texts if normalize(text)] or [""])
            for prediction, texts in pairs
        ]
        final = [
            float(not has_answer) if doubt > threshold else value
            for value, doubt, has_answer in zip(raw, doubts, answered)
        ]
        found[name] = percent(final)
        for part, wanted in (("HasAns", True), ("NoAns", False)):
            values = [value for value, has_answer in zip(final, answered) if has_answer is wanted]
            if values:
                parts[part] |= {f"{part}_{name}": percent(values), f"{part}_total": len(values)}
        silent = [not prediction["prediction_text"] for prediction, _ in pairs]
        best[f"best_{name}"], best[f"best_{name}_thresh"] = best_threshold(raw, doubts, answered, silent)
    return {**found, "total": len(pairs), **parts["HasAns"], **parts["NoAns"], **best}


def best_threshold(
    raw: Sequence[float], doubts: Sequence[float], answered: Sequence[bool], silent: Sequence[bool]
) -> tuple[float, float]:
    """Return the best mean score in percent that a threshold gives, and the threshold.

    Args:
        raw: The score of the answer to each question.
        doubts: Its `no_answer_probability`. Up to the threshold, the answer is given.
        answered: Whether the question has an answer.
        silent: Whether the answer that would be given is that there is none.
    """
    total = best = float(len(answered) - sum(answered))  # below every doubt, no answer is given
    threshold = 0.0
    for index in sorted(range(len(raw)), key=lambda index: doubts[index]):
        total += raw[index] if answered[index] else -float(not silent[index])
        if total > best:
            best, threshold = total, doubts[index]
    return 100 * best / len(raw), threshold


def percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def best_of(score: Callable[[str, str], float], predicted: str, texts: Sequence[str]) -> float:
    """Return the score of the right answer that fits best."""
    return max((score(predicted, text) for text in texts), default=0.0)


ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Return lower-case text without punctuation (of ASCII), English articles and superfluous white space.

    Example:
        >>> normalize("The  U.S. Congress")
        'us congress'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(predicted: str, text: str) -> float:
    """Return 1.0 if two normalised texts are equal, else 0.0."""
    return float(normalize(predicted) == normalize(text))


def f1(predicted: str, text: str) -> float:
    """Return the F1 of the words of two normalised texts; if one has none, 1.0 or 0.0 as the other has none or some."""
    words, expected = normalize(predicted).split(), normalize(text).split()
    if not words or not expected:
        return float(words == expected)
    return f1_of_words(words, expected)


def f1_of_version_1(predicted: str, text: str) -> float:
    """Return the F1 of the words of two normalised texts, as version 1 has it: 0.0 if both have none."""
    return f1_of_words(normalize(predicted).split(), normalize(text).split())


def f1_of_words(words: Sequence[str], expected: Sequence[str]) -> float:
    shared = sum((Counter(words) & Counter(expected)).values())
    return 2 * shared / (len(words) + len(expected)) if shared else 0.0
