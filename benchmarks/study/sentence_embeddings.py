"""Question 7: how well do the embeddings of the subnets of question 6 follow human judgement, without fine-tuning?

    python -m benchmarks.study.sentence_embeddings --data DATA --bert MINILM --supernet SUPERNET

The score, STS, is that of `benchmarks/sentence_similarity.py`: the rank correlation of the cosines of two embeddings
with the similarity that people gave, on the validation pairs of stsb. Every model is scored in PyTorch (32-bit floats)
and as the file of 8-bit integers. Rows that are there are not measured again.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from supershaper_hf import markdown_table, read_pooling
from supershaper_hf.report.plots import new_figure
from supershaper_hf.search.fingerprints import fingerprint_encoder

from ..sentence_similarity import ExportedEncoder, load_pairs, similarity_score
from . import compared
from .compared import (
    INT8,
    KINDS,
    ORIGINAL,
    Compared,
    by_size,
    check_shapes,
    check_supernet,
    compared_models,
    export_files,
    load_encoder,
    load_original,
    search_folder,
)
from .shapes import SEARCHED
from .study import Results, Row, Target, command_and_machine, make_parser, read_rows, save_picture, task_file


QUESTION = "sentence_embeddings"
PICTURE = "sentence_embeddings.png"
PYTORCH = "pytorch"
TARGET_SHARE, TARGET = 0.60, 0.98  # share of the encoder -> share of the original's STS to keep
MISSING = "-"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    compared.add_options(parser)
    parser.add_argument("--num_pairs", type=int, default=750, help="pairs of sentences, the first ones")
    return parser.parse_args(arguments)


def measure(
    model: Compared,
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    labels: np.ndarray,
) -> dict[str, float]:
    """Return the STS of a model in PyTorch and as the file of 8-bit integers, times 100."""
    pooling = read_pooling(args.bert) or "mean"
    encoder = load_encoder(model, args.bert, args.supernet)
    with tempfile.TemporaryDirectory() as folder:
        files = export_files(without_pooler(encoder), Path(folder), args.bert)
        runs = {PYTORCH: encoder, INT8: ExportedEncoder(files[INT8], encoder)}
        return {
            name: round(100 * similarity_score(run, tokenizer, pairs, labels, pooling), 4)  # type: ignore[arg-type]
            for name, run in runs.items()
        }


def without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of an encoder that has the states of the tokens alone, as sentence encoders are exported."""
    copied: Any = copy.deepcopy(encoder)
    copied.pooler = None
    return copied


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its picture; "" if there is no row."""
    rows = by_size(read_rows(results_folder, QUESTION))
    if not rows:
        return ""
    original = next((row for row in rows if row["kind"] == ORIGINAL), None)
    table = [
        {
            "model": row["model"],
            "shape": MISSING if row["shape"] is None else str(row["shape"]),
            "encoder": f"{row['encoder']:.1%}",
            "STS": f"{row[PYTORCH]:.2f}",
            "of the original": share(row[PYTORCH], original),
            "int8": f"{row[INT8]:.2f}",
            "int8 of the original": share(row[INT8], original),
        }
        for row in rows
    ]
    text = [
        command_and_machine(results_folder, QUESTION, QUESTION),
        f"STS is Spearman's correlation, times 100, on {rows[0]['pairs']} pairs of the validation examples of stsb. "
        "Nothing was fine-tuned. Shares are of the original in float32.",
        markdown_table(table),
        target_text(results_folder),
    ]
    draw(pictures_folder / PICTURE, rows, original)
    text.append(f"![STS over the parameters of the encoder]({pictures_folder.name}/{PICTURE})")
    return "\n\n".join(part for part in text if part)


def share(value: float, original: Row | None) -> str:
    """Return a score as a share of the original's."""
    return MISSING if original is None else f"{value / original[PYTORCH]:.1%}"


def targets(results_folder: Path) -> list[Target]:
    """Return what was to be reached, as far as it was measured."""
    rows = read_rows(results_folder, QUESTION)
    found = next((row for row in rows if (row["kind"], row["share"]) == (SEARCHED, TARGET_SHARE)), None)
    original = next((row for row in rows if row["kind"] == ORIGINAL), None)
    if found is None or original is None:
        return []
    kept, what = found[PYTORCH] / original[PYTORCH], f"searched {TARGET_SHARE:.0%}: share of the original's STS"
    return [Target(what, f"at least {TARGET:.0%}", f"{kept:.1%}", kept >= TARGET)]


def target_text(results_folder: Path) -> str:
    """Return whether the target is met, and by what; "" if it was not measured."""
    return " ".join(
        f"Target: at {TARGET_SHARE:.0%} of the encoder {target.to_reach} of the original's STS. Measured: "
        f"{target.measured}; {'met' if target.met else 'missed'}."
        for target in targets(results_folder)
    )


def draw(file: Path, rows: Sequence[Row], original: Row | None) -> None:
    """Draw STS over the parameters of the encoder."""
    figure, axes = new_figure(6.5, 4)
    for number, kind in enumerate(KINDS):
        own = [row for row in rows if row["kind"] == kind]
        for name, style in ((PYTORCH, "o-"), (INT8, "o:")):
            places = [row["encoder"] for row in own]
            label = kind.replace("_", " ") + (", int8" if name == INT8 else "")
            if own:
                axes.plot(places, [row[name] for row in own], style, color=f"C{number}", markersize=4, label=label)
    if original is not None:
        axes.axhline(original[PYTORCH], color="0.4", label=ORIGINAL)
    axes.set_xlabel("encoder, share of the original's parameters")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("STS")
    axes.legend(frameon=False, fontsize=8)
    save_picture(figure, file)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    original = load_original(args.bert)
    settings = {"pairs": args.num_pairs, "original": fingerprint_encoder(original)[:12]}
    results = Results(args.results, QUESTION, settings)
    supernet = check_supernet(results.rows, args.supernet)
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    pairs, labels = load_pairs(task_file(args.data, "stsb", "validation"))
    pairs, labels = pairs[: args.num_pairs], labels[: args.num_pairs]
    models = compared_models(args.bert, args.supernet, search_folder(args), args.shares)
    check_shapes(results.rows, models)
    for model in models:
        if not results.find(model=model.name):
            figures = measure(model, args, tokenizer, pairs, labels)
            of = None if model.kind == ORIGINAL else supernet
            results.add({**model.row(), **figures, "pairs": len(pairs), "supernet": of})
    print(answer(args.results, args.output_dir))


if __name__ == "__main__":
    main()
