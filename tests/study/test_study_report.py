"""The documents say what the files of results hold; the report writes them."""

import importlib
import itertools
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from supershaper_hf.files import write_json


ROOT = Path(__file__).parents[2]
COMMAND = "Run `python -m benchmarks.study.report`, and commit what it writes."


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.study.report")


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is what takes time."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


# What is committed


def test_documents_say_what_the_results_hold(report, no_pictures, tmp_path):
    """All of it but the versions of the libraries."""
    made = re.compile(r"^\| made with .*$", re.MULTILINE)
    found = report.documents(ROOT, report.RESULTS, tmp_path / report.PICTURES)
    assert {"README.md", "MODEL_CARD.md", "results.md", "modeling_supershaper.py"} <= {file.name for file in found}
    for file, text in found.items():
        written = made.sub("", file.read_text(encoding="utf-8"))
        assert written == made.sub("", text), f"{file.name} is not what the results say. {COMMAND}"


def test_pictures_are_there_and_are_shown():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(study/([^)]+)\)", text))
    assert shown == {file.name for file in (ROOT / "docs" / "study").glob("*")}, COMMAND


def test_the_card_of_the_project_is_that_of_the_released_supernet(report):
    card = (ROOT / report.SUPERNET / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8") == card
    assert report.card_table(report.RESULTS) in card


def test_lines_that_are_broken_start_no_list(report, no_pictures, tmp_path):
    text = report.study_section(report.RESULTS, tmp_path)
    for paragraph in text.split("\n\n"):
        if not re.match(r"[#|`!]", paragraph):
            assert not [line for line in paragraph.splitlines()[1:] if re.match(r"([-*+#>|]|\d+[.)]) ", line)]


# What is written


def model(kind, share, parameters, encoder):
    shape = None if kind == "original" else [parameters]
    return {
        "model": kind if share is None else f"{kind} {share:.0%}",
        "kind": kind,
        "share": share,
        "parameters": parameters,
        "encoder": encoder,
        "shape": shape,
    }


MODELS = [
    model("original", None, 1000, 1.0),
    model("searched", 0.6, 700, 0.598),
    model("rectangle", 0.6, 690, 0.58),
    model("searched", 0.3, 400, 0.3),
]


def write_rows(folder, question, rows, **settings):
    folder.mkdir(exist_ok=True)
    machine = {"device": "a processor", "threads": 1, "torch": "2.13.0"}
    content = {"settings": settings, "machine": machine, "rows": rows}
    write_json(folder / f"{question}.json", "supershaper-hf study 1", content)


def write_embeddings(folder):
    scores = {1000: (80.0, 79.0), 700: (78.0, 76.0), 690: (60.0, 59.0), 400: (72.0, 70.0)}
    rows = [
        {**each, "pytorch": scores[each["parameters"]][0], "int8": scores[each["parameters"]][1], "pairs": 750}
        for each in MODELS
    ]
    write_rows(folder, "sentence_embeddings", rows)


def write_tasks(folder, tasks=("cola", "sst2", "mrpc", "rte", "stsb")):
    """Scores of two seeds: 80 of the original, 76 of the searched shape for 60 %; that of 30 % has one task only."""
    rows = []
    for each in MODELS:
        score = {1000: 80.0, 700: 76.0, 690: 60.0, 400: 70.0}[each["parameters"]]
        for task in tasks if each["share"] != 0.3 else tasks[:1]:
            for seed in (0, 1):
                values = {"score": score + seed, "int8": score + seed - 1, "seconds": 1.0}
                rows.append({**each, "task": task, "seed": seed, "way": "fine-tuned", **values})
                rows.append({**each, "task": task, "seed": seed, "way": "untaught", **values, "score": 1.0})
    recipe = {"steps": 400, "learning_rate": 2e-4, "batch_size": 16, "max_length": 128}
    write_rows(folder, "tasks", rows, recipe=recipe)


def write_latency(folder):
    """Seconds of three sweeps, whose median is twice the least; files of 4,000 and 1,000 bytes for each parameter."""
    rows = []
    for each, size in itertools.product(MODELS, (1, 32)):
        for kind, pace, per_parameter in (("pytorch", 1e-5, 4000), ("onnx", 4e-6, 4000), ("int8", 1e-6, 1000)):
            key = {"what": "models", "format": kind, "batch_size": size}
            seconds = [each["parameters"] * pace * size * factor for factor in (1, 2, 9)]
            rows.append({**each, **key, "seconds": seconds, "bytes": each["parameters"] * per_parameter})
    settings = {"repeats": {"1": 3, "32": 3}, "processor": "a processor", "threads": 1, "sequence_length": 128}
    write_rows(folder, "latency_of_shapes", rows, **settings, equal_repeats=3)


def table_cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_the_table_has_what_was_measured(report, tmp_path):
    assert report.summary_table(tmp_path) == report.card_table(tmp_path) == report.NO_TABLE
    write_rows(tmp_path, "sentence_embeddings", [{**MODELS[0], "pytorch": 80.0, "int8": 79.0, "pairs": 750}])
    assert report.summary_table(tmp_path) == report.NO_TABLE  # the original alone says nothing of the supernet
    write_embeddings(tmp_path)
    header, _, *rows = table_cells(report.summary_table(tmp_path))
    assert header == ["model", "parameters", "shape", "STS", "STS, int8", "STS of the rectangle"]
    assert rows == [
        ["original", "1,000", "-", "80.0", "79.0 (98.8 %)", "-"],
        ["subnet, 60 %", "700 (70 %)", "[700]", "78.0 (97.5 %)", "76.0 (95.0 %)", "60.0 (75.0 %)"],
        ["subnet, 30 %", "400 (40 %)", "[400]", "72.0 (90.0 %)", "70.0 (87.5 %)", "-"],
    ]
    text = " ".join(report.summary_table(tmp_path).split())
    assert "Milliseconds" not in text
    assert "its STS is higher at 0 of 1 sizes" in text
    assert "The score of each task" not in text

    write_tasks(tmp_path)
    first, by_task = report.summary_table(tmp_path).split("The score of each task")
    scores = [f"{score:.1f} ± 0.7" for score in (80.5, 76.5)]
    assert table_cells(by_task) == [
        ["model", "cola", "sst2", "mrpc", "stsb", "mean"],
        ["---"] * 6,
        ["original", *[scores[0]] * 5],
        ["subnet, 60 %", *[scores[1]] * 5],
        ["subnet, 30 %", "70.5 ± 0.7", *"----"],
    ]
    header, _, *rows = table_cells(first)
    assert header[6:] == ["task score", "task score, int8"]
    assert [row[6:] for row in rows] == [["80.5", "79.5 (98.8 %)"], ["76.5 (95.0 %)", "75.5 (93.8 %)"], ["-", "-"]]

    write_latency(tmp_path)
    header, _, *rows = table_cells(report.summary_table(tmp_path).split("The score of each task")[0])
    assert header[8:] == ["ms", "ms, int8", "MB, int8"]
    assert [row[8:] for row in rows] == [["20.0", "2.0", "1.0"], ["14.0", "1.4", "0.7"], ["8.0", "0.8", "0.4"]]
    card = report.card_table(tmp_path)
    assert card.startswith("Subnets of this supernet")
    assert table_cells(card.split("The score of each task")[0]) == [header, ["---"] * 11, *rows]
    assert "whose quartiles are up to 200% apart" in " ".join(card.split())  # 1, 2 and 9: from 1.5 to 5.5
    assert "masked-LM head" not in card
    heads = [{"model": "head alone", "width": 384, "loss": 6.641, "accuracy": 0.1214, "distance": 0.1, "sts": 0.7}]
    write_rows(tmp_path, "masked_lm", heads)
    assert "its loss is 6.64 nats on held-out text, and it finds 12% of" in " ".join(
        report.card_table(tmp_path).split()
    )


def test_every_question_has_its_section_in_order(report, no_pictures, tmp_path):
    write_embeddings(tmp_path / "results")
    text = report.study_section(tmp_path / "results", tmp_path / "study")
    titles = re.findall(r"^### (\d)\. (.+)\n\n(.+)", text, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in titles] == list(range(1, 10))
    assert [title for _, title, _ in titles] == list(report.QUESTIONS.values())
    assert all(asked[0].isupper() and not asked.startswith("Question") for _, _, asked in titles)
    assert text.count(report.NOT_MEASURED) == 8
    embeddings = text.split("### 7.")[1].split("### 8.")[0]
    assert "| searched 60% | [700] | 59.8% | 78.00 | 97.5% |" in embeddings
    assert "](study/sentence_embeddings.png)" in embeddings


def test_the_command_changes_what_is_between_the_comments_and_nothing_the_second_time(report, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    before = {}
    for name in ("README.md", "docs/results.md"):
        before[name] = (ROOT / name).read_text(encoding="utf-8")
        shutil.copyfile(ROOT / name, tmp_path / name)
    write_embeddings(tmp_path / "results")
    write_latency(tmp_path / "results")
    options = [f"--root={tmp_path}", f"--results={tmp_path / 'results'}"]

    def state():
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    report.main(options)
    first = state()
    assert {file.name for file in (tmp_path / "docs" / "study").iterdir()} == {
        "sentence_embeddings.png",
        "latency_of_shapes.png",
    }
    for name, old in before.items():
        new = (tmp_path / name).read_text(encoding="utf-8")
        outside = [text.split(report.BEGIN)[0] + text.split(report.END)[1] for text in (old, new)]
        assert outside[0] == outside[1]
        assert "97.5" in new.split(report.BEGIN)[1].split(report.END)[0]
    report.main(options)
    assert state() == first
    assert str(tmp_path / "README.md") in capsys.readouterr().out


def test_a_document_without_its_comments_is_refused(report):
    begin, end = report.BEGIN, report.END
    assert report.put_between_markers(f"a\n{begin}\nold\n{end}\nb", "new", "x") == f"a\n{begin}\n\nnew\n\n{end}\nb"
    for document in ("a", f"{begin} a", f"{end} {begin}", f"{begin} {begin} {end}", f"{begin} {end} {end}"):
        with pytest.raises(
            ValueError, match=r"guide\.md needs the two lines, once each and in this order:\n<!-- Written"
        ):
            report.put_between_markers(document, "new", "guide.md")


def test_lines_are_broken_where_markdown_allows_it(report):
    prose = "word " * 23 + "- 1. # end " + "word " * 30
    table, code = f"| {'a' * 130} |\n| --- |", f"```\n{'b ' * 80}\n\n{'c ' * 80}\n```"
    text = report.wrapped(f"## {'d ' * 70}\n\n{prose}\n\n{table}\n\n{code}\n\n![{'e ' * 70}](study/f.png)")
    lines = text.split("\n\n")
    assert lines[0] == f"## {'d ' * 70}"
    assert lines[2] == table
    assert code in text
    assert lines[-1].startswith("![")
    assert len(lines[1].splitlines()) == 3
    assert " ".join(lines[1].split()) == prose.strip()
    assert not [line for line in lines[1].splitlines() if re.match(r"(-|1\.|#) ", line)]
