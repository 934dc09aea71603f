"""Make the page of a search again from the files in its folder: `python -m supershaper_hf.report FOLDER`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .page import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m supershaper_hf.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of examples/search_shapes.py")
    parser.add_argument(
        "--cost", default="parameters", choices=["parameters", "flops", "latency"], help="cost of a shape"
    )
    parser.add_argument(
        "--max_cost", type=float, nargs="*", default=[], help="budgets to show first, in the unit of --cost"
    )
    parser.add_argument("--num_budgets", type=int, default=8, help="number of rows in the table of the front")
    parser.add_argument(
        "--sequence_length",
        type=int,
        default=128,
        help="tokens per sequence, to count FLOPs. If latency was measured, its sequence length is used",
    )
    parser.add_argument("--supernet", help="folder or Hub id of the supernet, for the code that explorer.html shows")
    args = parser.parse_args(arguments)
    try:
        budgets, length = (args.max_cost, args.num_budgets), args.sequence_length
        print(write_report(args.folder, args.cost, *budgets, sequence_length=length, supernet=args.supernet))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
