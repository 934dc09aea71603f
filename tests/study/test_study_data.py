"""The study lists the files that it reads, and notices others."""

import hashlib
import importlib
import lzma
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.study.data")


@pytest.fixture
def options(script, tmp_path):
    """The command line for data of two paragraphs and of three examples in each file."""
    for name in script.CORPUS:
        file = tmp_path / "data" / "corpus" / f"{name}.txt.xz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lzma.compress(f"A paragraph of {name}.\n\nAnother one.\n".encode()))
    for task in script.TASK:
        folder = tmp_path / "data" / "tasks" / task
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            (folder / f"{split}.csv").write_text('sentence,label\n"one\ntwo",1\nthree,0\nfour,1\n', encoding="utf-8")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"weights")
    folders = {"data": "data", "bert": "bert", "results": "results"}
    return [f"--{name}={tmp_path / folder}" for name, folder in folders.items()]


def test_files_are_listed_and_a_changed_one_is_named(script, options, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    assert script.answer(tmp_path / "results") == ""
    script.main(options)
    script.main(options)
    assert capsys.readouterr().out.count("19 files are those") == 2

    text = script.answer(tmp_path / "results")
    weights = hashlib.sha256(b"weights").hexdigest()[:12]
    assert f"| model.safetensors | {script.WEIGHTS[0]} | Apache-2.0 | - | 7 | {weights} |" in text
    assert "| corpus/wiki.txt.xz | first paragraphs of Wikipedia articles | CC BY-SA 4.0 | 2 |" in text
    assert f"| tasks/rte/train.csv | {script.TASK['rte']} | {script.TASK_LICENCE} | 3 |" in text

    rows = {row["file"]: row["guess"] for row in script.read_rows(tmp_path / "results", "data")}
    assert rows["corpus/wiki.txt.xz"] is None
    guesses = {task: rows[f"tasks/{task}/validation.csv"] for task in script.TASK}
    expected = {"cola": 0, "sst2": 200 / 3, "mrpc": (200 / 3 + 80) / 2, "rte": 200 / 3, "stsb": 0}
    assert guesses == pytest.approx(expected, abs=1e-3)

    (tmp_path / "data" / "corpus" / "wiki.txt.xz").write_bytes(lzma.compress(b"Something else.\n"))
    with pytest.raises(SystemExit, match=r"lists: corpus/wiki\.txt\.xz\.$"):
        script.main(options)


def test_every_file_of_the_study_is_in_the_committed_list(script):
    listed = {row["file"] for row in script.read_rows(ROOT / "benchmarks" / "study" / "results", script.QUESTION)}
    assert {f"corpus/{name}.txt.xz" for name in script.CORPUS} < listed
    assert {f"tasks/{task}/train.csv" for task in script.TASK} < listed
