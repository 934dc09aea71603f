"""Write what the results of the study say: docs/results.md with its pictures, the table of README.md, and the card.

    python -m benchmarks.study.report

It reads the JSON files in benchmarks/study/results and measures nothing. What it writes into the two documents stands
between two comments; the rest of them stays as it is. The card of the released supernet, which is MODEL_CARD.md too,
has the same table before the results of its search, and the code in its folder is that of the package. A second run
changes nothing.
"""

import argparse
import re
import statistics
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from supershaper_hf import markdown_table
from supershaper_hf.files import write_file
from supershaper_hf.publish.__main__ import main as write_card

from . import data
from .compared import INT8, ORIGINAL
from .latency_answer import MODELS
from .latency_answer import QUESTION as LATENCY
from .masked_lm import FROZEN, WIDTHS
from .masked_lm import QUESTION as MASKED_LM
from .sentence_embeddings import PYTORCH
from .sentence_embeddings import QUESTION as EMBEDDINGS
from .shapes import RECTANGLE, SEARCHED, SHARES
from .study import RESULTS, SUPERNET, Row, percent, rank_correlation_error, read_rows
from .tasks_answer import QUESTION as TASKS
from .tasks_answer import fine_tuned, guess_cells, mean_scores, model_named, score_cells, scores_of_guesses


ROOT = Path(__file__).parents[2]
PICTURES = "study"  # the folder of the pictures, beside results.md
BEGIN = "<!-- Written by `python -m benchmarks.study.report`: change the scripts of benchmarks/study instead. -->"
END = "<!-- End of what the report has written. -->"
WIDTH = 120

QUESTIONS = {  # module of benchmarks.study -> title of its section
    "start_and_recipe": "Start and recipe",
    "bottlenecks": "Bottlenecks",
    "losses": "Losses and sampling",
    "shape_search": "Search",
    "sharing": "Sharing",
    "tasks": "Tasks",
    "sentence_embeddings": "Sentence embeddings of subnets",
    "latency_of_shapes": "Latency",
    "masked_lm": "The masked-LM head",
}
INTRODUCTION = """\
Nine questions about the method and the released supernet, on real text and real tasks. Each is answered by a script of
benchmarks/study, which writes what it measures into a JSON file. `python -m benchmarks.study.report` writes this
section, its pictures and the table of the README out of these files. DATA is a folder with the folders `corpus` and
`tasks`, whose files are listed after the questions; MINILM is that of all-MiniLM-L6-v2, which is called the original.
Its six layers, the encoder, have 10,646,784 parameters; the share of a subnet is relative to them."""
TARGETS = """\
What was to be reached, before anything was measured, and what came out. The questions below say how each figure was
measured, and what was tried where a target is missed:"""
NOT_MEASURED = "This question has not been measured yet."
OF_RECTANGLE, COSTS = "STS of the rectangle", ("ms", "ms, int8", "MB, int8")
COLUMNS = ("model", "parameters", "shape", "STS", "STS, int8", OF_RECTANGLE, "task score", "task score, int8", *COSTS)
NO_TABLE = "Nothing has been measured of the released supernet yet."


# docs/results.md


def study_section(results: Path, pictures: Path) -> str:
    """Return the section in Markdown, and write its pictures: each question with its answer, in order.

    Args:
        results: The folder of the JSON files.
        pictures: The folder of the pictures. Its name stands in the links.
    """
    parts = ["## The study", INTRODUCTION]
    if rows := target_rows(results):
        parts += [TARGETS, markdown_table(rows)]
    for number, (name, title) in enumerate(QUESTIONS.items(), start=1):
        module = import_module(f".{name}", __package__)
        asked = (module.__doc__ or "").splitlines()[0].removeprefix(f"Question {number}: ")
        found = module.answer(results, pictures)
        parts += [f"### {number}. {title}", asked[0].upper() + asked[1:], found or NOT_MEASURED]
    if files := data.answer(results):
        parts += ["### The data", files]
    return wrapped("\n\n".join(parts))


def target_rows(results: Path) -> list[dict[str, str]]:
    """Return the table of all targets that were measured, with the number of their question."""
    rows = []
    for number, name in enumerate(QUESTIONS, start=1):
        module = import_module(f".{name}", __package__)
        if hasattr(module, "targets"):
            rows += [{"question": str(number), **target.row()} for target in module.targets(results)]
    return rows


def wrapped(text: str) -> str:
    r"""Break the lines of paragraphs. Headings, tables, pictures, lists and blocks of code stay as they are.

    Example:
        >>> wrapped("## A title\n\none two " + "three " * 30).splitlines()[2][:13]
        'one two three'
    """
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    for number in range(0, len(parts), 2):  # every second part is a block of code
        parts[number] = "\n\n".join(map(broken, parts[number].split("\n\n")))
    return "".join(parts)


def broken(paragraph: str) -> str:
    """Return a paragraph with lines of at most `WIDTH` characters, none of which begins like a list or a heading."""
    if not paragraph.strip() or re.match(r"[#|<>]|!\[|[-*+] |\d+[.)] ", paragraph.lstrip()):
        return paragraph
    together = re.sub(r"\s+(?=([-*+#>|]|\d+[.)])\s)", "\0", paragraph)
    lines = textwrap.wrap(together, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


# The table of README.md and of the card


def summary_rows(results: Path) -> list[dict[str, str]]:
    """Return the original and the searched shape of each budget: what it keeps of the original's quality, and costs.

    A column is there if one of the models has it. Without a subnet there are no rows.
    """
    tasks = fine_tuned(read_rows(results, TASKS))
    embeddings = read_rows(results, EMBEDDINGS)
    latency = [row for row in read_rows(results, LATENCY) if row["what"] == MODELS]
    measured, rows = [*embeddings, *tasks, *latency], []
    original = first(measured, kind=ORIGINAL)
    for share in (None, *SHARES):
        kind = ORIGINAL if share is None else SEARCHED
        model = first(measured, kind=kind, share=share)
        if model is not None and original is not None:
            quality = embedding_cells(share, embeddings) | task_cells(share, tasks)
            rows.append(size_cells(model, original) | quality | cost_cells(kind, share, latency))
    if len(rows) < 2:  # the original alone says nothing of the supernet
        return []
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def size_cells(model: Row, original: Row) -> dict[str, str]:
    """Return the cells on the shape of a model and its size."""
    parameters = f"{model['parameters']:,}"
    if model is original:
        return {"model": ORIGINAL, "parameters": parameters, "shape": "-"}
    return {
        "model": f"subnet, {percent(model['encoder'])}",
        "parameters": f"{parameters} ({percent(model['parameters'] / original['parameters'])})",
        "shape": str(model["shape"]),
    }


def embedding_cells(share: float | None, embeddings: Sequence[Row]) -> dict[str, str]:
    """Return the cells on STS: of a model in both formats, and of the rectangle of its size."""
    original = first(embeddings, kind=ORIGINAL)
    cells = {}
    for title, kind, name in (
        ("STS", SEARCHED, PYTORCH),
        ("STS, int8", SEARCHED, INT8),
        (OF_RECTANGLE, RECTANGLE, PYTORCH),
    ):
        row = first(embeddings, kind=ORIGINAL if share is None else kind, share=share)
        if row is not None and original is not None and not (share is None and kind == RECTANGLE):
            cells[title] = kept(row[name], original[PYTORCH])
    return cells


def task_cells(share: float | None, tasks: Sequence[Row]) -> dict[str, str]:
    """Return the cells on the mean task score of a model, in both formats."""
    model = ORIGINAL if share is None else model_named(tasks, SEARCHED, share)
    cells = {}
    for figure, title in (("score", "task score"), (INT8, "task score, int8")):
        scores, original = mean_scores(tasks, model, figure), mean_scores(tasks, ORIGINAL)
        if scores and original:
            cells[title] = kept(statistics.fmean(scores), statistics.fmean(original))
    return cells


def kept(score: float, original: float) -> str:
    """Return a score and, unless it is the original's own, what share of the original's that is."""
    return f"{score:.1f}" if score == original else f"{score:.1f} ({100 * score / original:.1f} %)"


def cost_cells(kind: str, share: float | None, latency: Sequence[Row]) -> dict[str, str]:
    """Return the cells on what one sequence takes: milliseconds, and the size of the 8-bit file."""
    cells = {}
    for name, title in ((PYTORCH, "ms"), (INT8, "ms, int8")):
        row = first(latency, kind=kind, share=share, format=name, batch_size=1)
        if row is not None:
            cells[title] = f"{1e3 * statistics.median(row['seconds']):.1f}"
            if name == INT8:
                cells["MB, int8"] = f"{row['bytes'] / 1e6:.1f}"
    return cells


def first(rows: Sequence[Row], **key: Any) -> Row | None:
    """Return the first row with these values."""
    return next((row for row in rows if all(row.get(name) == value for name, value in key.items())), None)


def explanation(results: Path) -> str:
    """Return what the columns of the table mean; only of those that are there."""
    [columns, *_] = summary_rows(results) or [{}]
    embeddings = read_rows(results, EMBEDDINGS)
    original = first(embeddings, kind=ORIGINAL)
    pairs, score = (original["pairs"], original[PYTORCH] / 100) if original else (4, 0.0)
    error = 100 * rank_correlation_error(score, pairs)
    words = {
        "model": "The percentage of a subnet is that of the parameters in the original's layers. The embeddings, which "
        "are never cut, come on top: in brackets is the share of all, after scores the share of the original's.",
        "STS": f"STS is the rank correlation, times 100, of the cosines of {pairs} pairs of sentences (STS 2012 to "
        f"2015) with human judgement, without fine-tuning. Its standard error is about {error:.1f}.",
        OF_RECTANGLE: "The rectangle has equal widths, and wider last layers where its size asks for them: "
        f"{rectangle_text(embeddings)}. The search minimises the distance of all layers from the original, see "
        "question 4 of docs/results.md.",
        "task score": "The task score is the mean of cola, sst2, mrpc and stsb. Each model is fine-tuned, the subnets "
        "with the fine-tuned original as their teacher. The examples are not GLUE's splits: the scores do not compare "
        "with its leaderboard.",
        "STS, int8": "int8 is the file of 8-bit integers.",
        "ms": "Milliseconds are those of one sequence of 128 tokens on a CPU, in PyTorch and in the file of 8-bit "
        f"integers: medians on a shared machine, whose quartiles are up to {apart(read_rows(results, LATENCY)):.0%} "
        "apart.",
    }
    return " ".join(text for column, text in words.items() if column in columns)


def apart(rows: Sequence[Row]) -> float:
    """Return the largest distance between quartiles of the times in the table, relative to their median."""
    distances = [0.0]
    for row in rows:
        shown = row["what"] == MODELS and row["batch_size"] == 1 and row["format"] in (PYTORCH, INT8)
        if shown and row["kind"] in (ORIGINAL, SEARCHED):
            low, median, high = np.quantile(row["seconds"], (0.25, 0.5, 0.75))
            distances.append((high - low) / median)
    return float(max(distances))


def rectangle_text(embeddings: Sequence[Row]) -> str:
    """Say at how many budgets the rectangle has the better STS."""
    pairs = [[first(embeddings, kind=kind, share=share) for kind in (SEARCHED, RECTANGLE)] for share in SHARES]
    better = [own[PYTORCH] < other[PYTORCH] for own, other in pairs if own is not None and other is not None]
    return f"its STS is higher at {sum(better)} of {len(better)} sizes"


def summary_table(results: Path) -> str:
    """Return the table with what its columns mean, or a sentence that nothing was measured."""
    rows = summary_rows(results)
    if not rows:
        return NO_TABLE
    parts = [markdown_table(rows), explanation(results), by_task(results)]
    return wrapped("\n\n".join(part for part in parts if part))


def by_task(results: Path) -> str:
    """Return the scores of the original and of the searched shapes on each task; "" if no subnet was fine-tuned."""
    tuned = fine_tuned(read_rows(results, TASKS))
    names = [ORIGINAL, *(name for share in SHARES if (name := model_named(tuned, SEARCHED, share)))]
    if len(names) < 2:
        return ""
    encoders = {row["model"]: row["encoder"] for row in tuned}
    titles = {name: {"model": name if name == ORIGINAL else f"subnet, {percent(encoders[name])}"} for name in names}
    table = [score_cells(tuned, name) | titles[name] for name in names]
    table += guess_cells(scores_of_guesses(results))
    return (
        "The score of each task, with the standard deviation over seeds; a number without ± is of one seed:\n\n"
        f"{markdown_table(table)}"
    )


def card_table(results: Path) -> str:
    """Return what the section on evaluation of the card of the released supernet begins with, in Markdown."""
    if not summary_rows(results):
        return NO_TABLE
    title = "Subnets of this supernet, each the best shape of its search for a share of the original's encoder:"
    return f"{title}\n\n{summary_table(results)}\n\n{wrapped(head_text(results))}".rstrip()


def head_text(results: Path) -> str:
    """Return what the masked-LM head of the supernet is good for; "" if it was not measured."""
    row = first(read_rows(results, MASKED_LM), model=FROZEN, width=max(WIDTHS))
    if row is None:
        return ""
    return (
        "`AutoModelForMaskedLM` loads the supernet with a masked-LM head, which was trained on the frozen encoder of "
        f"the original. At full width its loss is {row['loss']:.2f} nats on held-out text, and it finds "
        f"{row['accuracy']:.0%} of the masked tokens: it makes the training of the paper possible, not a good "
        "`fill-mask`."
    )


def released_card(root: Path, results: Path) -> str:
    """Return the card of the released supernet: its table, and what the files of its folder say."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation, card = Path(folder, "evaluation.md"), Path(folder, "README.md")
        evaluation.write_text(card_table(results), encoding="utf-8")
        write_card([str(root / SUPERNET), f"--evaluation={evaluation}", f"--repo_id={SUPERNET}", f"--output={card}"])
        return card.read_text(encoding="utf-8")


# Documents


def put_between_markers(document: str, text: str, name: str) -> str:
    """Return a document in which `text` stands between the two markers.

    Raises:
        ValueError: If the document has not both markers, in this order and once.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"{name} needs the two lines, once each and in this order:\n{BEGIN}\n{END}")
    before, after = document.split(BEGIN)[0], document.split(END)[1]
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def documents(root: Path, results: Path, pictures: Path) -> Mapping[Path, str]:
    """Return the documents as they should be, and write the pictures. The cards are there once the supernet is."""
    pictures.mkdir(parents=True, exist_ok=True)
    texts = {
        root / "docs" / "results.md": study_section(results, pictures),
        root / "README.md": summary_table(results),
    }
    found = {
        file: put_between_markers(file.read_text(encoding="utf-8"), text, file.relative_to(root).as_posix())
        for file, text in texts.items()
    }
    if (root / SUPERNET).is_dir():
        card, source = released_card(root, results), root / "src" / "supershaper_hf" / "model"
        found |= {root / SUPERNET / "README.md": card, root / "MODEL_CARD.md": card}
        found |= {file: (source / file.name).read_text("utf-8") for file in (root / SUPERNET).glob("*.py")}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the JSON files with the results")
    parser.add_argument("--root", default=ROOT, type=Path, help="folder of README.md, docs and checkpoints")
    args = parser.parse_args(arguments)
    pictures = args.root / "docs" / PICTURES
    for file, text in documents(args.root, args.results, pictures).items():
        write_file(file, text)
        print(file)


if __name__ == "__main__":
    main()
