"""The tasks of GLUE: read from files of three formats or from a data set, checked, tokenised, scored."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny_tasks import examples, write_csv, write_task
from transformers import EvalPrediction

from supershaper_hf.finetuning.glue import TASKS, glue_task, read_file


NINE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]


def pairs(columns, labels):
    """As many examples as labels; the second column of each has a text of its own."""
    return [
        {column: f"the {'cat' if column == columns[0] else 'dog'} ran {number}" for column in columns}
        | {"label": label}
        for number, label in enumerate(labels)
    ]


@pytest.mark.parametrize("name", NINE)
def test_every_task_of_glue_is_read_from_its_columns(name, tokenizer, tmp_path):
    known = TASKS[name]
    labels = list(range(len(known.labels))) if known.labels else [0.0, 2.5, 5.0]
    file = write_csv(tmp_path / "data.csv", pairs(known.columns, labels))
    task = glue_task(name, tokenizer, file, [file] * len(known.splits))
    assert list(task.evaluation) == list(known.splits)
    assert task.train["labels"] == labels
    texts = [" ".join(row[column] for column in known.columns) for row in pairs(known.columns, labels)]
    separated = tokenizer.decode(task.train[0]["input_ids"]).replace("[CLS] ", "").replace(" [SEP]", "")
    assert separated == texts[0].replace(" 0", " [UNK]")
    assert (1 in task.train[0]["token_type_ids"]) == (len(known.columns) == 2)
    assert task.config["num_labels"] == max(1, len(known.labels))
    assert task.config["problem_type"] == ("single_label_classification" if known.labels else "regression")
    assert set(task.config["id2label"].values()) == (set(known.labels) or {"score"})


def test_labels_have_the_numbers_of_glue():
    """Those of the data set on the Hub: files hold numbers without names."""
    assert {name: TASKS[name].labels for name in NINE} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "qqp": ("not_duplicate", "duplicate"),
        "stsb": (),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "wnli": ("not_entailment", "entailment"),
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_files_of_every_format_hold_the_same(kind, tmp_path):
    rows, file = examples(6, 0), tmp_path / f"data.{kind}"
    if kind == "csv":
        write_csv(file, rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    assert read_file(file).to_list() == rows


def test_words_that_pandas_takes_for_missing_are_text(tmp_path):
    rows = [{"sentence": text, "label": 0} for text in ("NA", "null", "None", "nan")]
    assert read_file(write_csv(tmp_path / "data.csv", rows)).to_list() == rows


def test_data_of_the_hub_is_read_by_the_name_of_the_task(tokenizer, tmp_path):
    """From a folder that is laid out as the data set on the Hub, whose labels have names."""
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    splits = {"train": 8, "validation": 4, "test": 2}
    configs = []
    for split, count in splits.items():
        data = Dataset.from_list(examples(count, len(split))).cast(features)
        data.to_parquet(tmp_path / "glue" / "sst2" / f"{split}-00000.parquet")
        configs.append(f"  - split: {split}\n    path: sst2/{split}-*")
    listed = "\n".join(configs)
    (tmp_path / "glue" / "README.md").write_text(f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{listed}\n---\n")
    task = glue_task("sst2", tokenizer, dataset_name=str(tmp_path / "glue"))
    assert (len(task.train), {split: len(data) for split, data in task.evaluation.items()}) == (8, {"validation": 4})
    assert task.train["labels"] == [0, 1] * 4


def test_labels_with_names_are_put_in_the_order_of_the_task(tokenizer, tmp_path):
    """Whatever indices a file gives them."""
    features = Features({column: Value("string") for column in ("sentence1", "sentence2")})
    features["label"] = ClassLabel(names=["not_entailment", "entailment"])
    rows = pairs(("sentence1", "sentence2"), [0, 1, 1])
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    file = str(tmp_path / "data.parquet")
    assert glue_task("rte", tokenizer, file, [file]).train["labels"] == [1, 0, 0]


def test_names_that_are_not_all_those_of_the_task(tokenizer, tmp_path):
    """If one name is a label of the task, another one is not a label by its number."""
    for names, expected in ((["0", "1"], [0, 1]), (["no", "yes"], [0, 1]), (["positive", "bad"], None)):
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
        rows = [{"sentence": "the cat", "label": label} for label in (0, 1)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{names[0]}.parquet")
        file = str(tmp_path / f"{names[0]}.parquet")
        if expected is not None:
            assert glue_task("sst2", tokenizer, file, [file]).train["labels"][:] == expected
            continue
        with pytest.raises(ValueError, match=r"has the label 'bad' in row 1. Allowed: one of \['negative', 'positive'"):
            glue_task("sst2", tokenizer, file, [file])


def test_own_labels_are_words_of_the_data(tokenizer, tmp_path):
    rows = [{"text": "the cat", "label": label} for label in ("spam", "ham", "spam", "news")]
    train = write_csv(tmp_path / "train.csv", rows[:3])
    validation = write_csv(tmp_path / "val.csv", rows[2:])
    task = glue_task("classification", tokenizer, train, [validation])
    assert task.config["id2label"] == {0: "ham", 1: "news", 2: "spam"}
    assert task.train["labels"] == [2, 0, 2]
    assert task.score == "combined_score"


def test_own_labels_that_are_numbers_are_sorted_by_value(tokenizer, tmp_path):
    rows = [{"text": "the cat", "label": label} for label in (10, 9, 2)]
    file = write_csv(tmp_path / "data.csv", rows)
    task = glue_task("classification", tokenizer, file, [file])
    assert (task.config["id2label"], task.train["labels"]) == ({0: "2", 1: "9", 2: "10"}, [2, 1, 0])


@pytest.mark.parametrize("names", [["1", "2"], ["2", "1"], ["low", "high"]])
def test_own_labels_with_names_have_these_names(names, tokenizer, tmp_path):
    """Also if the names are numbers, which are not the numbers that stand for them."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = [{"text": "the cat", "label": label} for label in (0, 1, 1)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    file = str(tmp_path / "data.parquet")
    task = glue_task("classification", tokenizer, file, [file])
    assert [task.config["id2label"][label] for label in task.train["labels"]] == [names[0], names[1], names[1]]


def test_own_labels_are_the_same_whether_a_file_has_them_as_numbers_or_as_words(tokenizer, tmp_path):
    """A column of a CSV file is of numbers only if all of its values are."""
    train = write_csv(tmp_path / "train.csv", [{"text": "cat", "label": label} for label in (1, 2)])
    validation = write_csv(tmp_path / "val.csv", [{"text": "cat", "label": label} for label in (1, "x")])
    task = glue_task("classification", tokenizer, train, [validation])
    assert task.config["id2label"] == {0: "1", 1: "2", 2: "x"}
    assert (task.train["labels"][:], task.evaluation["validation"]["labels"][:]) == ([0, 1], [0, 2])


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("others", [["spam", "ham"], [0, 1], []])
def test_own_label_that_is_missing_is_refused(empty, others, tokenizer, tmp_path):
    if empty == "" and 0 in others:
        pytest.skip("a column has values of one type")
    rows = [{"text": "the cat", "label": label} for label in (*others, empty)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = str(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=rf"has the label {empty!r} in row {len(others)}"):
        glue_task("classification", tokenizer, file, [file])


def test_own_labels_are_two_or_more(tokenizer, tmp_path):
    file = write_csv(tmp_path / "data.csv", [{"text": "the cat", "label": 1}])
    with pytest.raises(ValueError, match=r"have the labels \['1'\]. It needs two different ones"):
        glue_task("classification", tokenizer, file, [file])


def test_long_pairs_are_cut_at_the_longer_sentence(tokenizer, tmp_path):
    rows = [{"sentence1": "cat " * 40, "sentence2": "dog dog", "label": 0}]
    file = write_csv(tmp_path / "data.csv", rows)
    tokens = tokenizer.convert_ids_to_tokens(
        glue_task("rte", tokenizer, file, [file], max_length=10).train[0]["input_ids"]
    )
    assert (len(tokens), tokens.count("dog"), tokens.count("cat")) == (10, 2, 5)


def test_scores_are_those_of_the_highest_logits(tokenizer, tmp_path):
    train, validation = write_task(tmp_path)
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 4.0]])
    task = glue_task("sst2", tokenizer, train, [validation])
    for predictions in (logits, (logits, np.zeros(3))):  # the second one of a model that returns its hidden states
        assert task.compute_metrics(EvalPrediction(predictions, np.array([0, 1, 1, 0]))) == {"accuracy": 0.75}
    file = write_csv(tmp_path / "pairs.csv", pairs(("sentence1", "sentence2"), [0, 1]))
    found = glue_task("mrpc", tokenizer, file, [file]).compute_metrics(EvalPrediction(logits, np.array([0, 1, 1, 0])))
    assert found == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "combined_score": (0.75 + 2 / 3) / 2})


def test_numbers_are_scored_by_correlations(tokenizer, tmp_path):
    file = write_csv(tmp_path / "pairs.csv", pairs(("sentence1", "sentence2"), [0.5, 1.0]))
    task = glue_task("stsb", tokenizer, file, [file])
    found = task.compute_metrics(EvalPrediction(np.array([[0.1], [0.2], [0.4]]), np.array([1.0, 2.0, 4.0])))
    assert found == pytest.approx({"pearson": 1.0, "spearmanr": 1.0, "combined_score": 1.0})


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([{"sentence": "a", "label": 2}], "sst2", r"has the label 2 in row 0\. Allowed: one of \['negative', "),
        ([{"sentence": "a", "label": -1}], "sst2", r"has the label -1 in row 0"),
        ([{"text": "a", "label": 0}], "sst2", r"lacks the columns \['sentence'\]; it has \['text', 'label'\]"),
        ([{"sentence": "a"}], "sst2", r"lacks the columns \['label'\]"),
        ([{"sentence1": "a", "sentence2": "b", "label": "high"}], "stsb", r"has the label 'high'.*a finite number"),
        ([{"sentence1": "a", "sentence2": "b", "label": "inf"}], "stsb", r"has the label inf.*a finite number"),
        ([{"sentence": 7, "label": 0}], "sst2", r"no text in column 'sentence' of row 0"),
        ([{"text": "a"}], "classification", r"lacks the columns \['label'\]; it has \['text'\]"),
        ([{"words": "a", "label": 0}], "classification", r"data.csv has the columns .* Its text must be in one of"),
    ],
)  # fmt: skip
def test_wrong_data_is_refused_by_what_is_wrong(rows, name, message, tokenizer, tmp_path):
    file = write_csv(tmp_path / "data.csv", rows)
    with pytest.raises(ValueError, match=message):
        glue_task(name, tokenizer, file, [file])


def test_example_without_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"sentence": "a", "label": 0}\n{"sentence": null, "label": 1}\n')
    file = str(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"no text in column 'sentence' of row 1"):
        glue_task("sst2", tokenizer, file, [file])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "sentence,label\n", r"a\.csv has no row"),
        ("a.jsonl", "\n", r"a\.jsonl has no row"),
        ("a.csv", "sentence,label\na, b,1\nc,2\n", r"a\.csv is damaged.*Text that holds a comma must stand in quotes"),
        ("a.csv", "sentence,label\nc,2\na, b,1\n", r"a\.csv is damaged.*line 3, saw 3.*must stand in quotes"),
        ("a.csv", b"sentence,label\nZ\xfcrich,1\n", r"a\.csv is damaged.*0xfc"),
        (
            "a.jsonl",
            '{"sentence": "a", "label": 1}\n{',
            r"a\.jsonl is damaged, or is no \.jsonl file: .*JSON parse error",
        ),
        ("a.parquet", "PAR", r"a\.parquet is damaged, or is no \.parquet file"),
    ],
)
def test_damaged_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name)


def test_wrong_options_are_refused(tokenizer, tmp_path):
    file = write_csv(tmp_path / "data.csv", examples(4, 0))
    with pytest.raises(ValueError, match=r"task='sst3' is unknown"):
        glue_task("sst3", tokenizer, file, [file])
    with pytest.raises(ValueError, match=r"needs one training file and 2 for validation \(validation_matched"):
        glue_task("mnli", tokenizer, file, [file])
    with pytest.raises(ValueError, match=r"'classification' has no data on the Hub"):
        glue_task("classification", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        glue_task("sst2", tokenizer, str(tmp_path / "none.csv"), [file])
    with pytest.raises(ValueError, match=r"data\.txt has an unknown format\. Allowed: \.csv"):
        glue_task("sst2", tokenizer, str(tmp_path / "data.txt"), [file])
    tokenizer.model_max_length = 32
    for length in (2, 33):
        with pytest.raises(ValueError, match=rf"max_length={length} must be between 8 and 32"):
            glue_task("sst2", tokenizer, file, [file], max_length=length)
