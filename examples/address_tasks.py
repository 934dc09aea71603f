"""Two small tasks out of the bundled addresses of US presidents, to try run_ner.py and run_qa.py without a download.

    python examples/address_tasks.py --output_dir outputs/tasks

It writes CoNLL files of places and institutions (`ner-train.conll`, `ner-validation.conll`), and questions about years,
sums and places in the format of SQuAD 2 (`qa-train.json`, `qa-validation.json`). Labels and answers come from a list of
names and from patterns, and nobody has checked them: the tasks show that the scripts work, and their scores say little
about a model. Validation is on later addresses than training.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


TEXT = Path(__file__).parent / "data" / "presidential_addresses.txt"
NAMES = {
    "LOC": "Great Britain|Spain|France|Mexico|Texas|Cuba|Russia|Prussia|Portugal|Brazil|Denmark|Austria|Holland|Peru|"
    "Colombia|Chile|Florida|Georgia|Louisiana|Missouri|Mississippi|Ohio|Oregon|California|Kansas|New Orleans|New York|"
    "Washington|London|Paris|Europe|Pacific|Atlantic|China|Japan|Central America|South America|Panama|Nicaragua|Tunis",
    "ORG": "Congress|Senate|House of Representatives|Supreme Court|Bank of the United States|Treasury|Army|Navy|"
    "Post-Office Department|Department of State|War Department|Navy Department|Military Academy",
}
WORD = re.compile(r"\w+(?:[-']\w+)*|[^\w\s]")
QUESTIONS = {  # question -> the pattern of its answer
    "Which year is named first?": r"\b1[78]\d\d\b",
    "Which sum of money is named first?": r"\$\d[\d,.]*\d",
    "Which place is named first?": rf"\b(?:{NAMES['LOC']})\b",
}


def labelled_words(sentence: str) -> list[tuple[str, str]]:
    """Return the words of a sentence with their labels: B-LOC, I-LOC, B-ORG, I-ORG or O.

    Example:
        >>> labelled_words("Great Britain waits.")
        [('Great', 'B-LOC'), ('Britain', 'I-LOC'), ('waits', 'O'), ('.', 'O')]
    """
    spans = [
        (match.start(), match.end(), kind)
        for kind, names in NAMES.items()
        for match in re.finditer(rf"\b(?:{names})\b", sentence)
    ]
    words = []
    for word in WORD.finditer(sentence):
        span = next((span for span in spans if span[0] <= word.start() < span[1]), None)
        words.append((word.group(), "O" if span is None else f"{'IB'[span[0] == word.start()]}-{span[2]}"))
    return words


def write_conll(file: Path, paragraphs: Sequence[str], count: int) -> None:
    """Write the first `count` sentences of at most 40 words that hold a name, one word a line."""
    sentences = [words for text in paragraphs for sentence in split(text) if (words := labelled_words(sentence))]
    kept = [words for words in sentences if len(words) <= 40 and any(label != "O" for _, label in words)][:count]
    file.write_text(
        "\n".join("".join(f"{word} {label}\n" for word, label in words) for words in kept), encoding="utf-8"
    )


def split(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.;:?!]) ", paragraph)


def questions_about(paragraph: str, number: int) -> Iterator[dict[str, Any]]:
    """Yield the questions about a paragraph, in the format of SQuAD 2."""
    for row, (question, pattern) in enumerate(QUESTIONS.items()):
        match = re.search(pattern, paragraph)
        answers = [{"text": match.group(), "answer_start": match.start()}] if match else []
        yield {"id": f"{number}-{row}", "question": question, "answers": answers, "is_impossible": not answers}


def write_squad(file: Path, paragraphs: Sequence[str], count: int) -> None:
    """Write the questions about the first `count` paragraphs of at most 2,000 characters that answer one of them."""
    found = []
    for number, text in enumerate(paragraphs):
        questions = list(questions_about(text, number))
        if len(text) <= 2000 and any(question["answers"] for question in questions):
            found.append({"context": text, "qas": questions})
    data = [{"title": "Addresses of US presidents", "paragraphs": found[:count]}]
    file.write_text(json.dumps({"version": "v2.0", "data": data}, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder that the four files are written to.")
    out = parser.parse_args().output_dir
    out.mkdir(parents=True, exist_ok=True)
    paragraphs = TEXT.read_text(encoding="utf-8").splitlines()
    cut = len(paragraphs) * 3 // 4
    write_conll(out / "ner-train.conll", paragraphs[:cut], 800)
    write_conll(out / "ner-validation.conll", paragraphs[cut:], 200)
    write_squad(out / "qa-train.json", paragraphs[:cut], 200)
    write_squad(out / "qa-validation.json", paragraphs[cut:], 50)
    print(f"Written to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


if __name__ == "__main__":
    main()
