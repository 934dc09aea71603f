"""Question 8: how long do the models of question 6 take, and does the time depend on the shape or on the size alone?

    python -m benchmarks.study.latency_of_shapes --data DATA --bert MINILM --supernet SUPERNET

Nothing else may run on the machine meanwhile. Two measurements:

- The compared models in PyTorch (float32), ONNX Runtime (float32) and ONNX Runtime with 8-bit integers, in batches of 1
  and of 32 sequences of 128 tokens. Each sweep runs every model once in every format, in random order, with a pause
  before each run (`sweeps.py`).
- The insensitivity report (`compare_equal_sizes`): shapes of equal size at every budget, each built twice, so that
  differences between shapes are told from noise.

The rows of a batch size, or of a budget, are written when it is complete. They are not measured again.
"""

import argparse
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from supershaper_hf import SearchSpace, compare_equal_sizes
from supershaper_hf.publish.quantization import onnx_session
from supershaper_hf.search.fingerprints import fingerprint_encoder

from ..sweeps import Contender, Key, make_batch, run_pytorch, time_contenders
from . import compared
from .compared import (
    INT8,
    ONNX,
    Compared,
    check_shapes,
    check_supernet,
    compared_models,
    export_files,
    load_encoder,
    load_original,
    load_supernet,
    search_folder,
)
from .latency_answer import EQUAL_SIZE, FORMATS, MODELS, PYTORCH, QUESTION, answer
from .shapes import SHARES, budget
from .study import Results, make_parser


__all__ = ["answer", "main"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    compared.add_options(parser)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], help="sequences in a batch")
    parser.add_argument("--repeats", type=int, nargs="+", default=[30, 9], help="sweeps for each batch size")
    parser.add_argument("--sequence_length", type=int, default=128, help="tokens in a sequence, none of them padding")
    parser.add_argument("--num_equal_shapes", type=int, default=10, help="shapes of each size for the comparison")
    parser.add_argument("--tolerance", type=float, default=0.002, help="how far equal sizes may be from the budget")
    parser.add_argument("--equal_repeats", type=int, default=15, help="sweeps over shapes of equal size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch and of ONNX Runtime")
    args = parser.parse_args(arguments)
    if len(args.repeats) != len(args.batch_sizes):
        if len(args.repeats) > 1:
            parser.error(f"--repeats {args.repeats} needs one number, or one for each of {args.batch_sizes}.")
        args.repeats *= len(args.batch_sizes)
    return args


# The compared models


def make_contenders(models: Sequence[Compared], args: argparse.Namespace, folder: Path) -> dict[Key, Contender]:
    """Return each model in every format."""
    found: dict[Key, Contender] = {}
    for model in models:
        encoder = load_encoder(model, args.bert, args.supernet)
        files = export_files(encoder, folder / model.name, args.bert)
        size = sum(parameter.nbytes for parameter in encoder.parameters())
        found[model.name, PYTORCH] = Contender(size, functools.partial(run_pytorch, encoder))
        for kind in (ONNX, INT8):
            found[model.name, kind] = Contender(files[kind].stat().st_size, onnx_session(files[kind]))
    return found


def measure_models(args: argparse.Namespace, results: Results, models: Sequence[Compared], supernet: str) -> None:
    """Add the rows of every batch size of which some are missing."""
    names = {(model.name, kind) for model in models for kind in FORMATS}
    missing = []
    for batch_size, repeats in zip(args.batch_sizes, args.repeats):
        found = {(row["model"], row["format"]) for row in results.find(what=MODELS, batch_size=batch_size)}
        others = found - names
        if others and not names <= found:
            raise ValueError(
                f"{results.file} has rows of {', '.join(sorted({model for model, _ in others}))} in batches of "
                f"{batch_size}, and all models of a batch size are measured together. Give their --shares, too."
            )
        if not names <= found:
            results.rows = [row for row in results.rows if row.get("batch_size") != batch_size]  # of other sweeps
            missing.append((batch_size, repeats))
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(models, args, Path(folder))
        vocab_size = load_original(args.bert).config.vocab_size
        for batch_size, repeats in missing:
            batch = make_batch(batch_size, args.sequence_length, vocab_size)
            seconds = time_contenders(contenders, batch, repeats, batch_size)
            for model in models:
                for kind in FORMATS:
                    own = {"what": MODELS, "format": kind, "batch_size": batch_size, "supernet": supernet}
                    key = model.name, kind
                    results.add({**model.row(), **own, "bytes": contenders[key].size, "seconds": seconds[key]})


# Shapes of equal size


def measure_equal_sizes(args: argparse.Namespace, results: Results, supernet: str) -> None:
    """Add the comparison of shapes of equal size at every budget that is missing."""
    space = SearchSpace.from_model(load_supernet(args.supernet))
    original = load_original(args.bert)
    for share in args.shares:
        for batch_size in args.batch_sizes:
            key = {"what": EQUAL_SIZE, "share": share, "batch": batch_size}
            if results.find(**key):
                continue
            [comparison] = compare_equal_sizes(
                space,
                [budget(original.config, share, original.num_parameters())],
                args.num_equal_shapes,
                args.tolerance,
                batch_size=batch_size,
                sequence_length=args.sequence_length,
                repeats=args.equal_repeats,
            )
            results.add({**key, **asdict(comparison), "supernet": supernet})


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    settings = {
        "original": fingerprint_encoder(load_original(args.bert))[:12],
        "sequence_length": args.sequence_length,
        "repeats": dict(zip(map(str, args.batch_sizes), args.repeats)),
        "equal_repeats": args.equal_repeats,
        "num_equal_shapes": args.num_equal_shapes,
        "tolerance": args.tolerance,
        "threads": args.threads,
    }
    results = Results(args.results, QUESTION, settings)
    supernet = check_supernet(results.rows, args.supernet)
    shares = [share for share in SHARES if share in args.shares]
    models = compared_models(args.bert, args.supernet, search_folder(args), shares)
    check_shapes(results.rows, models)
    measure_models(args, results, models, supernet)
    measure_equal_sizes(args, results, supernet)
    print(answer(args.results, args.output_dir))


if __name__ == "__main__":
    main()
