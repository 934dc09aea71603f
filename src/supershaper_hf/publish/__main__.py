"""Make the card of a model from the files in its folder: `python -m supershaper_hf.publish FOLDER`.

    python -m supershaper_hf.publish outputs/supernet/last --search outputs/search --output MODEL_CARD.md

What the card says of training, limits, licence, language and data is taken over from the README.md of the folder. Sizes
are those of its files, and measurements those of the search.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_file
from .card import middle_budget, model_card
from .results import Results, front_results, tuning_results
from .subnet import Source, find_search, model_task, read_search


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m supershaper_hf.publish", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a supernet or a subnet, as save_for_hub writes it")
    parser.add_argument("--search", help="folder of the search of a supernet (default: the folder search in FOLDER)")
    parser.add_argument("--results", nargs="*", default=[], help="results.json of fine-tunings of this very model")
    parser.add_argument("--repo_id", help="name of the model in the card (default: FOLDER)")
    parser.add_argument("--evaluation", type=Path, help="file of Markdown that the section on evaluation begins with")
    parser.add_argument("--output", type=Path, help="file to write (default: print the card)")
    args = parser.parse_args(arguments)
    try:
        card = make_card(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.output is None:
        sys.stdout.write(card)
    else:
        print(write_file(args.output, card))


def make_card(args: argparse.Namespace) -> str:
    """Return the text of the card."""
    if not args.folder.is_dir():
        raise FileNotFoundError(f"{args.folder} is not a folder. Write a model with save_for_hub first.")
    source = Source.load(str(args.folder))
    shape = None
    found = Results("" if args.evaluation is None else args.evaluation.read_text(encoding="utf-8").strip())
    if source.is_supernet:
        findings = read_search(source, find_search(str(args.folder), args.search))
        if findings is not None:
            found += front_results(findings)
            shape = findings.front("parameters").best(middle_budget(source.model))
    for file in args.results:
        found += tuning_results(file, source.model, model_task(source.model))
    encoder = {name: source.encoder[name] for name in ("pooling", "normalize") if name in source.encoder}
    options: dict[str, Any] = source.metadata | encoder
    if source.tokenizer is not None and source.tokenizer.mask_token:
        options["mask_token"] = source.tokenizer.mask_token
    card = model_card(
        source.model,
        args.repo_id or args.folder.as_posix(),
        with_tokenizer=source.tokenizer is not None,
        shape=shape,
        weight_bytes=sum(file.stat().st_size for file in args.folder.glob("*.safetensors")),
        training=source.training,
        limits=source.limits,
        evaluation=found.text or None,
        results=found.scores,
        **options,
    )
    return f"{str(card).rstrip()}\n"


if __name__ == "__main__":
    main()
