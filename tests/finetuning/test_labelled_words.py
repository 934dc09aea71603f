"""Sentences of labelled words from CoNLL, JSON and Parquet files: what is read, and which errors damaged ones give."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from supershaper_hf.finetuning.labelled_words import read_sentences
from supershaper_hf.finetuning.rows import read_rows, split_sources


CONLL = "-DOCSTART- -X- -X- O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\nBlackburn NNP I-NP B-PER"
SENTENCES = [
    {"tokens": ["EU", "rejects"], "labels": ["B-ORG", "O"]},
    {"tokens": ["Blackburn"], "labels": ["B-PER"]},
]


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    "content",
    [
        CONLL,
        CONLL.replace(" ", "\t"),
        CONLL.replace(" ", " \t "),
        CONLL.replace("\n", "\r\n"),
        CONLL + "\n\n",
        "\ufeff" + CONLL,
        CONLL.replace("\n\n\n", "\n-DOCSTART- -X- O O\n"),
    ],
    ids=["blanks", "tabs", "both", "Windows", "empty lines at the end", "byte order mark", "next document"],
)
def test_conll(tmp_path, content):
    assert list(read_sentences(write(tmp_path, "train.conll", content))) == SENTENCES


def test_columns_are_chosen(tmp_path):
    file = write(tmp_path, "train.tsv", "1\tEU\tB-ORG\tO\n2\trejects\tO\tO\n\n1\tBlackburn\tB-PER\tO\n")
    assert list(read_sentences(file, token_column=1, label_column=2)) == SENTENCES


def test_only_blanks_and_tabs_separate_columns_and_only_line_feeds_separate_lines(tmp_path):
    words = ["1\u00a0000", "a\u2028b", "\u200b", "\x85"]
    file = write(tmp_path, "train.txt", "".join(f"{word} O\n" for word in words))
    assert read_sentences(file)[0]["tokens"] == words


@pytest.mark.parametrize("column", ["ner_tags", "tags", "labels"])
@pytest.mark.parametrize("form", ["lines.jsonl", "lines.json", "list.json", "data.json", "pretty.json"])
def test_json(tmp_path, column, form):
    rows = [{"tokens": row["tokens"], column: row["labels"], "id": 7} for row in SENTENCES]
    if form.startswith("lines"):
        text = "\n".join(map(json.dumps, rows)) + "\n\n"
    else:
        text = json.dumps({"data": rows} if form.startswith("data") else rows, indent=1 if "pretty" in form else None)
    assert list(read_sentences(write(tmp_path, form, text))) == SENTENCES


def classes(names=("O", "B-PER", "B-ORG")):
    """The two sentences with numbers in place of labels."""
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(names)))})
    numbers = [[names.index(label) for label in row["labels"]] for row in SENTENCES]
    return Dataset.from_dict({"tokens": [row["tokens"] for row in SENTENCES], "ner_tags": numbers}, features=features)


def test_class_labels_of_parquet_become_their_names(tmp_path):
    classes().to_parquet(tmp_path / "train.parquet")
    assert list(read_sentences(tmp_path / "train.parquet")) == SENTENCES


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], r"row 2 has the label -1. Allowed: 0 to 1, which stand for O, B-PER. Use a split that has labels"),
        ([0, None], r"row 2 has the label None. Allowed: 0 to 1"),
        (None, r"row 2: 'ner_tags' must be of the type list, got 'None'"),
    ],
)
def test_class_labels_without_a_name_are_refused(tmp_path, labels, message):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    rows = {"tokens": [["EU", "rejects"]] * 2, "ner_tags": [[0, 1], labels]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=rf"test\.parquet, {message}"):
        read_sentences(tmp_path / "test.parquet")


def test_folder_of_a_data_set(tmp_path):
    for split in ("train", "validation", "test"):
        classes().to_parquet(tmp_path / f"{split}.parquet")
    sources = split_sources(None, {"validation": None, "test": None}, str(tmp_path))
    assert sources == {split: (str(tmp_path), split) for split in ("train", "validation", "test")}
    assert [list(read_sentences(*source)) for source in sources.values()] == [SENTENCES] * 3


def test_data_set_without_a_test_split(tmp_path):
    for split in ("train", "validation"):
        classes().to_parquet(tmp_path / f"{split}.parquet")
    sources = split_sources(None, {"validation": None, "test": None}, str(tmp_path))
    assert list(sources) == ["train", "validation"]


def test_data_set_without_a_validation_split(tmp_path):
    classes().to_parquet(tmp_path / "train.parquet")
    sources = split_sources(None, {"validation": None, "test": None}, str(tmp_path))
    with pytest.raises(ValueError, match=r"Unknown split .validation.. Should be one of \['train'\]"):
        read_sentences(*sources["validation"])


def test_configuration_of_a_data_set(tmp_path):
    """Both have a training split; the second one alone has a test split."""
    classes().select([0]).to_parquet(tmp_path / "one.parquet")
    classes().to_parquet(tmp_path / "two.parquet")
    second = "\n".join(f"  - split: {split}\n    path: two.parquet" for split in ("train", "validation", "test"))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: train\n    path: one.parquet\n"
        f"- config_name: second\n  data_files:\n{second}\n---\n"
    )
    sources = split_sources(None, {"validation": None, "test": None}, f"{tmp_path}:second")
    assert list(sources) == ["train", "validation", "test"]
    assert list(read_sentences(*sources["train"])) == SENTENCES
    assert list(read_sentences(f"{tmp_path}:first", "train")) == SENTENCES[:1]


def test_words_that_begin_with_a_dash_are_words(tmp_path):
    file = write(tmp_path, "train.conll", "-LRB- O\n- O\n-DOCSTART O\n")
    assert read_sentences(file)["tokens"][:] == [["-LRB-", "-", "-DOCSTART"]]


def test_byte_order_mark_before_json(tmp_path):
    for name in ("train.json", "train.jsonl"):
        text = "\ufeff" + "\n".join(map(json.dumps, SENTENCES))
        assert list(read_sentences(write(tmp_path, name, text))) == SENTENCES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "", "a.conll is empty"),
        ("a.conll", "\n \n", "a.conll holds no sentence"),
        ("a.conll", "EU B-ORG\nrejects\n", "a.conll, line 2 has 1 columns, but the first line has 2: 'rejects'"),
        ("a.conll", "EU\n", "a.conll, line 1 has 1 columns"),
        ("a.conll", "EU ORG\n", "a.conll, line 1 has the label 'ORG'. Allowed: 'O', and 'B-'"),
        ("a.conll", b"EU O\nZ\xfcrich O\n", "a.conll, line 2 is not UTF-8: byte 0xfc"),
        ("a.jsonl", '{"tokens": ["EU"], "tags": ["O"]}\n{"tokens"\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"words": ["EU"], "tags": ["O"]}', r"a.jsonl, line 1 has no 'tokens', only \['tags', 'words'\]"),
        ("a.jsonl", '{"tokens": ["EU"]}', "a.jsonl, line 1 has no 'ner_tags'"),
        ("a.jsonl", '{"tokens": ["EU"], "tags": []}', "a.jsonl, line 1 has 1 tokens, but 0 labels"),
        ("a.jsonl", '{"tokens": ["EU"], "tags": [3]}', "a.jsonl, line 1 has the label 3.*ClassLabel"),
        ("a.jsonl", '{"tokens": [null], "tags": ["O"]}', "a.jsonl, line 1 has None among its tokens"),
        ("a.jsonl", '{"tokens": "EU", "tags": ["O"]}', "a.jsonl, line 1: 'tokens' must be of the type list, got 'EU'"),
        ("a.jsonl", '["EU"]', r"a.jsonl, line 1 must be a JSON object, got \"\['EU'\]\""),
        ("a.json", "[{]", "a.json is not JSON"),
        ("a.json", "[]", "a.json holds no sentence"),
        ("a.json", " \n", "a.json is empty"),
        ("a.parquet", "PAR", "a.parquet is not a Parquet file, or is damaged"),
    ],
)
def test_damaged_file_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(write(tmp_path, name, content))


def test_file_that_is_not_there(tmp_path):
    for name in ("a.conll", "a.jsonl", "a.parquet"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            read_sentences(tmp_path / name)


@pytest.mark.parametrize("columns", [(0, 2), (-3, 1), (1, 1), (1, -1)])
def test_columns_that_are_not_there_or_equal(tmp_path, columns):
    with pytest.raises(ValueError, match=f"2 columns, 0 to 1: token_column={columns[0]}"):
        read_sentences(write(tmp_path, "a.conll", "EU O\n"), None, *columns)


def test_unknown_format_of_rows(tmp_path):
    with pytest.raises(ValueError, match=r"a.csv has an unknown format. Allowed: .jsonl, .json, .parquet"):
        list(read_rows(tmp_path / "a.csv"))


def test_files_that_are_missing_and_data_sets_besides_files():
    with pytest.raises(ValueError, match="train_file and validation_file missing"):
        split_sources(None, {"validation": None, "test": "a"}, None)
    with pytest.raises(ValueError, match="validation_file missing"):
        split_sources("a", {"validation": None}, None)
    with pytest.raises(ValueError, match="Give dataset_name or files, not both"):
        split_sources("a", {"validation": None}, "conll2003")
