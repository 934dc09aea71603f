r"""Publish a family: a supernet, a subnet for each of some budgets, its search, a page to explore it, and a collection.

    python examples/publish_family.py --model outputs/supernet/last --max_cost 6e6 9e6 12e6 --name user/net \
        --output_dir outputs/net
    python examples/publish_family.py ... --dry_run        # writes the folders only

The supernet has been searched with search_shapes.py: its results are in the folder `search` of the supernet, or in the
one that --search names. `--name user/net` makes these repositories, and a collection of them:

    user/net               the supernet, with its best shapes in the card
    user/net-11.9m, ...    one subnet for each budget: weights, tokenizer, code, exports, card
    user/net-search        the data set of measured shapes: load_dataset("user/net-search")
    user/net-explorer      a static Space: a page on which a reader chooses a shape by looking

Stop the script at any time: the same command continues. What is published already is not published again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from supershaper_hf import text_table
from supershaper_hf.checks import check_choice, check_count, check_number, load_pretrained
from supershaper_hf.devices import parse_device
from supershaper_hf.files import lock
from supershaper_hf.publish.export import check_packages
from supershaper_hf.publish.family import plan_family, push_family, write_family
from supershaper_hf.publish.subnet import Source, find_search, read_search
from supershaper_hf.training.arguments import HelpFormatter, option


COSTS = ("parameters", "flops", "latency")


@dataclass
class FamilyArguments:
    """The options of this script."""

    model: str = option("", "Folder or Hub id of the supernet.")
    max_cost: list[float] = field(
        default_factory=list, metadata={"help": "The budgets, in the unit of --cost: one subnet for each."}
    )
    cost: str = option(
        "parameters", "What --max_cost counts: parameters, flops (of --max_length tokens) or latency (s)."
    )
    search: str | None = option(
        None,
        "Folder of the search of the supernet, or a data set on the Hub. By default the folder search/ in --model.",
    )
    name: str = option("", "Repository of the supernet, user/name. The names of the others begin with it.")
    output_dir: str = option("", "Folder of the family. The same command continues with what is in it.")
    exports: list[str] = field(
        default_factory=lambda: ["onnx", "int8"], metadata={"help": "Formats to export to; `none` for no exports."}
    )
    latency: str | None = option(None, "Device, such as cpu, whose latency is measured for the cards.")
    latency_batch_size: int = option(1, "Sequences in the batch whose latency is measured.")
    max_length: int = option(128, "Tokens of a sequence, to measure latency and to count FLOPs.")
    license: str | None = option(None, "Licence, such as apache-2.0. By default that of the supernet's card.")
    private: bool = option(False, "Whether new repositories and the collection are private.")
    token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Access token. By default that of `hf auth login`, which no list of processes shows."},
    )
    dry_run: bool = option(False, "Whether to write the folders and to publish nothing.")

    def __post_init__(self) -> None:
        for name in ("model", "name", "output_dir", "max_cost"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        if self.name.count("/") != 1 or not all(self.name.split("/")):
            raise ValueError(f"--name {self.name} must be user/name.")
        validate_repo_id(self.name)  # it is also the name of a folder
        check_choice("--cost", self.cost, COSTS)
        for budget in self.max_cost:
            check_number("--max_cost", budget, above=0)
        check_count("--latency_batch_size", self.latency_batch_size)
        check_count("--max_length", self.max_length)
        if self.latency is not None:
            parse_device(self.latency)
        self.exports = [each for each in self.exports if each != "none"]
        check_packages(self.exports)

    def subnet_options(self) -> dict[str, Any]:
        """Return the options that all subnets are written with."""
        options: dict[str, Any] = {"exports": self.exports, "license": self.license, "latency": self.latency}
        if self.latency is not None:
            options |= {"latency_batch_size": self.latency_batch_size, "latency_length": self.max_length}
        return {name: value for name, value in options.items() if value is not None}


def parse_arguments(arguments: Sequence[str] | None) -> FamilyArguments:
    classes: Any = (FamilyArguments,)
    parser = HfArgumentParser(classes, description=__doc__, formatter_class=HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses(arguments)[0]
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        source: Source = load_pretrained("--model", args.model, Source.load)
        search = find_search(args.model, args.search)
        findings = read_search(source, search, args.max_length)
        if search is None or findings is None:
            sys.exit(
                f"{args.model} has no folder search. Make one with examples/search_shapes.py, or name it: --search."
            )
        family = plan_family(source, findings, search, args.name, args.cost, args.max_cost)
        rows = [{"repository": each.repo_id, "type": each.repo_type, "": each.note} for each in family.members]
        print(text_table(rows))
        write_family(folder, family, **args.subnet_options())
        if args.dry_run:
            print(f"The folders are in {folder}. Nothing was published (--dry_run).")
        else:
            address = push_family(folder, family.members, private=args.private, token=args.token)
            print(f"Collection: {address}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues.")
