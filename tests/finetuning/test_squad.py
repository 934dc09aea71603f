"""SQuAD: both formats of its files, the errors of damaged ones, and its scores, computed by hand."""

import json

import pytest
from datasets import Dataset

from supershaper_hf.finetuning.questions import question_task
from supershaper_hf.finetuning.rows import split_sources
from supershaper_hf.finetuning.squad import EXAMPLES, SquadMetric, normalize, read_questions


QUESTIONS = [
    {
        "id": "a",
        "question": "Who?",
        "context": "Zoë and Ann.",
        "answers": {"text": ["Zoë", "Ann"], "answer_start": [0, 8]},
    },
    {"id": "b", "question": "Why?", "context": "Zoë and Ann.", "answers": {"text": [], "answer_start": []}},
    {"id": "c", "question": "What?", "context": "", "answers": {"text": [], "answer_start": []}},
]


def nested():
    """The questions as SQuAD is distributed, version 2."""

    def question(row):
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        more = {} if answers else {"plausible_answers": [{"text": "Ann", "answer_start": 8}]}
        return {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers, **more}

    first = {"context": "Zoë and Ann.", "qas": [question(row) for row in QUESTIONS[:2]]}
    second = {"context": "", "qas": [question(QUESTIONS[2])]}
    articles = [{"title": "One", "paragraphs": [first]}, {"title": "Two", "paragraphs": [second]}]
    return {"version": "v2.0", "data": articles}


def write(folder, content, name="squad.json"):
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.mark.parametrize("form", ["nested", "pretty", "flat", "data", "lines", "parquet", "folder"])
def test_formats(tmp_path, form):
    if form in ("parquet", "folder"):
        file = tmp_path / "train.parquet"
        Dataset.from_list(QUESTIONS, features=EXAMPLES).to_parquet(file)
        Dataset.from_list(QUESTIONS[:1], features=EXAMPLES).to_parquet(tmp_path / "validation.parquet")
        source = split_sources(None, {"validation": None}, str(tmp_path))["train"] if form == "folder" else (file,)
    elif form == "lines":
        source = (write(tmp_path, "\n".join(map(json.dumps, QUESTIONS)), "squad.jsonl"),)
    elif form == "pretty":
        source = (write(tmp_path, json.dumps(nested(), indent=2)),)
    else:
        source = (write(tmp_path, {"nested": nested(), "flat": QUESTIONS, "data": {"data": QUESTIONS}}[form]),)
    assert list(read_questions(*source)) == QUESTIONS


@pytest.mark.parametrize(("start", "found"), [(12, 12), (11, 12), (14, 12), (0, 2), (99, 17)])
def test_answer_that_stands_a_little_beside(tmp_path, start, found):
    row = {"id": "a", "question": "", "context": "A rose is a rose rose.", "answers": {"text": ["rose"]}}
    row["answers"]["answer_start"] = [start]
    assert read_questions(write(tmp_path, [row]))[0]["answers"]["answer_start"] == [found]


@pytest.mark.parametrize(
    ("context", "text", "start", "found"),
    [("axb a.b", "a.b", 0, 4), ("aaa", "aa", 1, 1), ("a (b", "(b", 0, 2)],
    ids=["no pattern", "places that overlap", "parenthesis"],
)
def test_answer_is_found_letter_by_letter(tmp_path, context, text, start, found):
    row = {"id": "a", "question": "", "context": context, "answers": {"text": [text], "answer_start": [start]}}
    assert read_questions(write(tmp_path, [row]))[0]["answers"]["answer_start"] == [found]


def changed(**changes):
    return [QUESTIONS[1], {**QUESTIONS[0], **changes}]


def broken(change):
    content = nested()
    change(content["data"][0])
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "squad.json is empty"),
        ("[", "squad.json is not JSON"),
        ("[]", "squad.json holds no question"),
        ([7], "squad.json, row 1 must be a JSON object, got '7'"),
        (changed(context=None), "squad.json, row 2: 'context' must be of the type str, got 'None'"),
        (changed(id=7), "squad.json, row 2: 'id' must be of the type str, got '7'"),
        (changed(id="b"), "squad.json, row 2 has the id 'b', which .*squad.json, row 1 has too"),
        (changed(answers=None), "squad.json, row 2: 'answers' must be of the type dict"),
        (changed(answers={"text": ["Ann"]}), "row 2: 'answers' must be lists of equal length"),
        (changed(answers={"text": ["Ann"], "answer_start": []}), "row 2: 'answers' must be lists of equal length"),
        (changed(answers={"text": ["Ann"], "answer_start": ["8"]}), "row 2: 'answers' must be lists of equal length"),
        (
            changed(answers={"text": ["Bob"], "answer_start": [8]}),
            r"squad.json, row 2 \(id 'a'\): the answer 'Bob' does not occur in the context",
        ),
        (broken(lambda article: article.update(paragraphs={})), "row 1: 'paragraphs' must be of the type list"),
        (broken(lambda article: article["paragraphs"][0].pop("context")), "row 1, paragraph 1 has no 'context'"),
        (
            broken(lambda article: article["paragraphs"][0]["qas"][1].pop("answers")),
            "squad.json, row 1, paragraph 1, question 2 has no 'answers'",
        ),
        (
            broken(lambda article: article["paragraphs"][0]["qas"][0]["answers"][0].pop("answer_start")),
            "row 1, paragraph 1, question 1 has no 'answer_start'",
        ),
    ],
)
def test_damaged_file_is_named_with_its_place(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path, content))


def test_broken_line_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"squad.jsonl, line 2 is not JSON"):
        read_questions(write(tmp_path, json.dumps(QUESTIONS[0]) + "\n{", "squad.jsonl"))


def test_version_is_that_of_the_data(tokenizer, tmp_path):
    answered = write(tmp_path, QUESTIONS[:1], "first.json")
    both = write(tmp_path, nested(), "second.json")
    versions = [
        question_task(tokenizer, train, scored, max_length=32).compute_metrics.version_2
        for train in (answered, both)
        for scored in (answered, both)
    ]
    assert versions == [False, True, True, True]


# Scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S. Congress", "us congress"),
        ("an apple, a  day", "apple day"),
        ("a-b", "ab"),
        ("Theatre", "theatre"),
        ("the", ""),
        ("Zoë\u2019s", "zoë\u2019s"),  # only punctuation of ASCII is removed
        ("tab\tand\u00a0blank", "tab and blank"),
    ],
)
def test_normalised_text(text, expected):
    assert normalize(text) == expected


def compute(pairs, version_2=False, **options):
    """The scores of predicted texts, each with the texts of the right answers and, in version 2, a doubt."""
    predictions = [{"id": str(row), "prediction_text": pair[0]} for row, pair in enumerate(pairs)]
    references = [
        {"id": str(row), "answers": {"text": pair[1], "answer_start": [0] * len(pair[1])}}
        for row, pair in enumerate(pairs)
    ]
    if version_2:
        for prediction, pair in zip(predictions, pairs, strict=True):
            prediction["no_answer_probability"] = pair[2]
    metric = SquadMetric(version_2, keep_in_memory=True)
    return metric.compute(predictions=predictions[::-1], references=references[::-1], **options)


@pytest.mark.parametrize(
    ("predicted", "texts", "exact", "f1"),
    [
        ("the Potomac", ["Potomac river", "potomac"], 100, 100),  # the answer that fits best counts
        ("a big dog", ["big red dog"], 0, 100 * 2 * 2 / 5),
        ("dog dog", ["dog"], 0, 100 * 2 * 1 / 3),  # a word counts as often as it occurs in both
        ("cat", ["dog"], 0, 0),
        ("", ["dog"], 0, 0),
        ("a", ["the"], 100, 0),  # as the script of version 1 has it: nothing is left, so no word is shared
    ],
)
def test_version_1(predicted, texts, exact, f1):
    assert compute([(predicted, texts)]) == pytest.approx({"exact_match": exact, "f1": f1})
    assert compute([(predicted, texts), ("x", ["x"])]) == pytest.approx(
        {"exact_match": (exact + 100) / 2, "f1": (f1 + 100) / 2}
    )


def test_version_2():
    """Of 5 questions 3 have an answer. Doubts above 1 mean that there is none."""
    pairs = [
        ("big dog", ["big red dog"], 0.0),  # F1 4/5
        ("cat", ["cat"], 2.0),  # right, but held back
        ("", ["cat"], 1.0),
        ("cat", [], 0.5),  # wrong
        ("cat", [], 1.5),  # right, because held back
    ]
    expected = {"exact": 20, "f1": 100 * (0.8 + 1) / 5, "total": 5}
    expected |= {"HasAns_exact": 0, "HasAns_f1": 80 / 3, "HasAns_total": 3}
    expected |= {"NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2}
    # With no answer at all 2 of 5 are right. In the order of doubts: F1 +.8, then -1, 0, -1, +1.
    expected |= {"best_exact": 40, "best_exact_thresh": 0, "best_f1": 56, "best_f1_thresh": 0}
    assert compute(pairs, version_2=True) == pytest.approx(expected)
    assert compute(pairs, version_2=True, no_answer_threshold=2.0)["exact"] == 20
    assert compute(pairs[:3], version_2=True).keys() & {"NoAns_exact", "HasAns_exact"} == {"HasAns_exact"}
    assert compute([("a", ["the"], 0.0)], version_2=True)["f1"] == 100  # in version 2, nothing is nothing


def test_best_threshold():
    """Answering up to a doubt of .4 gains two right answers and loses one question that has none."""
    found = compute([("x", ["x"], 0.3), ("x", [], 0.1), ("x", ["x"], 0.4), ("x", [], 0.9)], version_2=True)
    assert (found["best_exact"], found["best_exact_thresh"]) == (75, pytest.approx(0.4))


def test_first_of_equally_good_thresholds_is_the_best():
    pairs = [("x", ["x"], 0.25), ("y", [], 0.5), ("z", ["z"], 0.75)]  # 1 right without answers, then 2, 1 and 2
    found = compute(pairs, version_2=True)
    assert (found["best_exact"], found["best_exact_thresh"]) == (pytest.approx(200 / 3), 0.25)
    assert compute([("x", [], 0.25)], version_2=True)["best_f1_thresh"] == 0


def test_answer_without_a_word_is_that_there_is_none():
    """It is right whatever the threshold, where a question has no answer."""
    found = compute([("", [], 0.25), ("x", ["x"], 0.5)], version_2=True)
    assert (found["best_exact"], found["best_exact_thresh"]) == (100, 0.5)


def test_right_answers_of_which_nothing_is_left_do_not_count_in_version_2():
    assert compute([("", ["the", "cat"], 0.0)], version_2=True)["exact"] == 0
    assert compute([("an", ["the"], 0.0)], version_2=True)["exact"] == 100  # unless there is no other


def test_answer_is_given_up_to_the_threshold_1():
    assert compute([("x", ["x"], 1.0)], version_2=True)["exact"] == 100
    assert compute([("x", ["x"], 1.0)], version_2=True, no_answer_threshold=0.5)["exact"] == 0


def test_missing_predictions_are_refused():
    metric = SquadMetric(keep_in_memory=True)
    predictions = [{"id": "b", "prediction_text": "x"}]
    with pytest.raises(ValueError, match=r"1 of 1 questions have no prediction: \['a'\]"):
        metric.compute(
            predictions=predictions, references=[{"id": "a", "answers": {"text": ["x"], "answer_start": [0]}}]
        )
