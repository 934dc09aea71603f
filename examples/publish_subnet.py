r"""Cut one subnet out of a supernet and publish it: weights, tokenizer, code, exports and a card made from files.

    python examples/publish_subnet.py --model outputs/supernet/last --max_cost 12e6 --output_dir outputs/small --dry_run
    python examples/publish_subnet.py --model user/supernet --max_cost 0.02 --cost latency --repo_id user/small
    python examples/publish_subnet.py --model outputs/sst2/model --results outputs/sst2/results.json --repo_id user/sst2

The shape is given with --shape, or chosen for --max_cost: of the front in the folder `search` of the supernet, which
search_shapes.py makes, the best shape within the budget. A subnet, such as one that was fine-tuned, is published whole.

--output_dir writes the folder, and --repo_id uploads it in one commit. With --dry_run the folder is written, its files
and its card are printed, and nothing is asked of the network. To upload a folder as it was written before, leave
--model out: publish_subnet.py --output_dir outputs/small --repo_id user/small
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from supershaper_hf import push_folder, text_table
from supershaper_hf.checks import check_choice, check_count, check_number, load_pretrained
from supershaper_hf.devices import parse_device
from supershaper_hf.files import check_output_folder
from supershaper_hf.publish.card import quoted
from supershaper_hf.publish.export import check_packages
from supershaper_hf.publish.hub import files_to_publish
from supershaper_hf.publish.subnet import Source, find_search, read_search, shape_within, write_subnet
from supershaper_hf.training.arguments import HelpFormatter, option


COSTS = ("parameters", "flops", "latency")


@dataclass
class PublishArguments:
    """The options of this script."""

    model: str = option("", "Folder or Hub id of a supernet with any head, or of a subnet that is published whole.")
    shape: list[int] | None = option(None, "Widths of the layers of the subnet; 0 drops a layer.")
    max_cost: float | None = option(None, "Instead of --shape: the budget of the subnet, in the unit of --cost.")
    cost: str = option(
        "parameters", "What --max_cost counts: parameters, flops (of --max_length tokens) or latency (s)."
    )
    search: str | None = option(
        None,
        "Folder of the search of the supernet, or a data set on the Hub. By default the folder search/ in --model.",
    )
    results: list[str] = field(
        default_factory=list, metadata={"help": "The results.json of fine-tunings of this very model, for its card."}
    )
    dataset: str | None = option(None, "Hub id of the data set that --results were scored on.")
    exports: list[str] = field(
        default_factory=lambda: ["onnx", "int8"], metadata={"help": "Formats to export to; `none` for no exports."}
    )
    latency: str | None = option(None, "Device, such as cpu, whose latency is measured for the card.")
    latency_batch_size: int = option(1, "Sequences in the batch whose latency is measured.")
    max_length: int = option(128, "Tokens of a sequence, to measure latency and to count FLOPs.")
    license: str | None = option(None, "Licence, such as apache-2.0. By default that of the supernet's card.")
    limits: str | None = option(None, "Text of the card's section on limits, in Markdown.")

    # Where to
    output_dir: str | None = option(None, "Folder to write. It must not exist or be empty.")
    repo_id: str | None = option(None, "Repository to publish, user/name.")
    private: bool = option(False, "Whether a new repository is private.")
    revision: str | None = option(None, "Branch to commit to. One that does not exist is created.")
    create_pr: bool = option(False, "Whether to open a pull request instead of committing.")
    overwrite_card: bool = option(False, "Whether to replace a README.md that the repository already has.")
    token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Access token. By default that of `hf auth login`, which no list of processes shows."},
    )
    dry_run: bool = option(False, "Whether to write the folder and print what is in it, and to publish nothing.")

    def __post_init__(self) -> None:
        if self.output_dir is None and self.repo_id is None:
            raise ValueError("Give --output_dir, --repo_id or both.")
        if not self.model and (self.output_dir is None or self.repo_id is None or self.dry_run):
            raise ValueError("--model is missing. Without it, --output_dir is uploaded to --repo_id.")
        if self.shape is not None and self.max_cost is not None:
            raise ValueError("Give --shape or --max_cost, not both.")
        if self.repo_id is not None and (self.repo_id.count("/") != 1 or not all(self.repo_id.split("/"))):
            raise ValueError(f"--repo_id {self.repo_id} must be user/name.")
        check_choice("--cost", self.cost, COSTS)
        if self.max_cost is not None:
            check_number("--max_cost", self.max_cost, above=0)
        check_count("--latency_batch_size", self.latency_batch_size)
        check_count("--max_length", self.max_length)
        if self.latency is not None:
            parse_device(self.latency)
        self.exports = [each for each in self.exports if each != "none"]
        check_packages(self.exports)


def parse_arguments(arguments: Sequence[str] | None) -> PublishArguments:
    classes: Any = (PublishArguments,)
    parser = HfArgumentParser(classes, description=__doc__, formatter_class=HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses(arguments)[0]
    except ValueError as error:
        parser.error(str(error))


def write(args: PublishArguments, folder: Path) -> None:
    """Write the folder of the subnet."""
    check_output_folder(folder)
    source: Source = load_pretrained("--model", args.model, Source.load)
    searched = find_search(args.model, args.search) if source.is_supernet else None
    findings = read_search(source, searched, args.max_length)
    shape = args.shape
    if args.max_cost is not None:
        shape = shape_within(findings, args.cost, args.max_cost)
    card: dict[str, Any] = {"license": args.license, "limits": args.limits}
    write_subnet(
        source,
        shape,
        folder,
        repo_id=args.repo_id,
        findings=findings,
        results=args.results,
        dataset=args.dataset,
        exports=args.exports,
        latency=args.latency,
        latency_batch_size=args.latency_batch_size,
        latency_length=args.max_length,
        **{name: value for name, value in card.items() if value is not None},
    )


def describe(folder: Path) -> str:
    """Return a table of the files that would be published, with their sizes in bytes."""
    files = files_to_publish(folder)
    rows = [{"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size} for path in files]
    return text_table([*rows, {"file": "all", "bytes": sum(row["bytes"] for row in rows)}])


def check_name(folder: Path, repo_id: str) -> None:
    """Raise a ValueError if the examples in the card of `folder` name the folder instead of the repository."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if quoted(folder.name) in text and quoted(repo_id) not in text:
        raise ValueError(
            f"The examples in {card} load {folder.name!r}, not {repo_id}. Write the folder again with that --repo_id."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with ExitStack() as stack:
        if args.output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "subnet"
        else:
            folder = Path(args.output_dir)
        if args.model:
            write(args, folder)
        print(describe(folder))
        if args.dry_run:
            print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
        elif args.repo_id is not None:
            check_name(folder, args.repo_id)
            pushed = push_folder(
                folder,
                args.repo_id,
                private=args.private or None,  # None leaves it to the settings of an organisation
                token=args.token,
                revision=args.revision,
                create_pr=args.create_pr,
                overwrite_card=args.overwrite_card,
            )
            print(f"Published: {pushed.pr_url or pushed.commit_url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
