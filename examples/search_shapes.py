"""Measure shapes of a supernet, predict all others, and find the best shape for every budget.

    python examples/search_shapes.py --model_name_or_path outputs/supernet/last --eval_files held_out.txt
    python examples/search_shapes.py --model_name_or_path outputs/encoder --original PATH_OR_ID --eval_files FILE
    accelerate launch --num_processes 8 examples/search_shapes.py --model_name_or_path user/supernet --eval_files FILE

A supernet with a masked-LM head is measured by its masked-LM loss. Any other one is measured by its distance to the
original model, and so is every one with --original or --measure distance.

The output folder gets `records.jsonl` (every measurement, as soon as it is made), `predictor.json`, `front.csv`,
`report.md` with its plots, `explorer.html`, on which you choose a shape by looking, and with --latency also
`latency.json`. `load_dataset(folder)` loads the records. You can stop the script at any time: the same command
continues where it stopped. When nothing is left to measure, it writes the report again.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from supershaper_hf import (
    LatencyTable,
    SearchSpace,
    ShapePredictor,
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperModel,
    evaluate_shapes,
    read_pooling,
)
from supershaper_hf.checks import check_choice, check_count, check_number, load_pretrained
from supershaper_hf.data.batches import MLM_PROBABILITY, fixed_masks
from supershaper_hf.data.documents import load_text
from supershaper_hf.data.sequences import check_vocabulary, tokenize
from supershaper_hf.devices import copy_mapped_weights, parse_device
from supershaper_hf.files import lock
from supershaper_hf.latency.insensitivity import compare_equal_sizes, save_comparisons
from supershaper_hf.model.costs import Cost
from supershaper_hf.model.modeling_supershaper import SuperShaperPreTrainedModel
from supershaper_hf.processes import on_every_process, on_main_process, start_accelerator
from supershaper_hf.publish.hub import push_folder
from supershaper_hf.report.data_card import write_data_card
from supershaper_hf.report.findings import (
    INSENSITIVITY_FILE,
    LATENCY_FILE,
    PREDICTOR_FILE,
    RECORDS_FILE,
    write_config,
)
from supershaper_hf.report.page import write_report
from supershaper_hf.search.pareto import pareto_front, shapes_at
from supershaper_hf.search.predictor import MINIMUM_SHAPES
from supershaper_hf.search.records import Record
from supershaper_hf.search.rounds import measure_in_rounds
from supershaper_hf.training.arguments import HelpFormatter, option


@dataclass
class SearchArguments:
    """What to measure, on which text, and where the results go. See --help."""

    model_name_or_path: str | None = option(None, "Folder or Hub id of the supernet.")
    tokenizer_name: str | None = option(None, "Folder or Hub id of the tokenizer. By default the one of the model.")
    eval_files: list[str] | None = option(
        None, "Held-out text: files, globs, folders (.txt .jsonl .parquet, .gz .xz .zst) or Hub ids."
    )
    text_column: str = option("text", "Column of the text in JSON lines and Parquet.")
    output_dir: str = option("outputs/search", "Folder of the records, the predictor and the report.")
    max_length: int = option(128, "Largest number of tokens per sequence.")
    max_eval_samples: int = option(1000, "Largest number of sequences that each shape is measured on.")
    per_device_eval_batch_size: int = option(64, "Sequences in a batch.")
    measure: str | None = option(
        None,
        "What is measured: loss (of masked tokens) or distance (to the original). By default it is distance with "
        "--original, for a sentence encoder and for a model without a masked-LM head, and loss otherwise.",
    )
    original: str | None = option(
        None, "Folder or Hub id of the model that a distance is measured to. By default it is the largest shape."
    )
    layers: str = option(
        "all",
        "Whose states a distance compares: all (the mean over the layers, for shapes that will be fine-tuned) or last.",
    )
    mlm_probability: float = option(MLM_PROBABILITY, "Share of the tokens that are masked to measure a loss.")
    num_shapes: int = option(60, "Number of shapes to measure before the front is computed.")
    rounds: int = option(
        4, "Number of rounds with --max_cost. The first measures random shapes, the others look for the best ones."
    )
    drop_rate: float = option(0.0, "Probability that a layer of a random shape is dropped. 0 keeps all layers.")
    monotone: bool = option(False, "Whether the predictor assumes that a wider layer is never worse.")
    cost: str = option("parameters", "The cost of a shape: parameters, flops or latency (needs --latency).")
    max_cost: list[float] | None = option(
        None,
        "Budgets that matter most, in the unit of --cost: parameters, FLOPs or seconds. By default all matter equally.",
    )
    num_budgets: int = option(8, "Number of evenly spaced budgets whose best shapes are measured and shown.")
    latency: str | None = option(None, "Device to measure latency on, such as cpu or cuda.")
    latency_batch_size: int = option(1, "Sequences in a batch whose latency is measured.")
    insensitivity: bool = option(False, "Whether to compare the latency of shapes of equal size. It needs --latency.")
    seed: int = option(0, "Random seed of masks, shapes and proposals.")
    push_to_hub: str | None = option(
        None, "Repository of the supernet, user/name. The results become the data set user/name-search beside it."
    )

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "eval_files"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        counts = ("max_length", "max_eval_samples", "per_device_eval_batch_size", "rounds", "num_budgets")
        for name in (*counts, "latency_batch_size"):
            check_count(f"--{name}", getattr(self, name))
        check_count("--num_shapes", self.num_shapes, least=MINIMUM_SHAPES)
        if self.measure is not None:
            check_choice("--measure", self.measure, ("loss", "distance"))
        check_choice("--layers", self.layers, ("all", "last"))
        if self.measure == "loss" and self.original:
            raise ValueError("--original is for --measure distance only.")
        check_number("--mlm_probability", self.mlm_probability, above=0, most=1)
        check_number("--drop_rate", self.drop_rate, least=0, below=1)
        check_choice("--cost", self.cost, ("parameters", "flops", "latency"))
        for budget in self.max_cost or []:
            check_number("--max_cost", budget, above=0)
        check_count("--seed", self.seed, least=0)
        if self.latency:
            parse_device(self.latency)
        elif self.cost == "latency" or self.insensitivity:
            raise ValueError("--cost latency and --insensitivity need --latency DEVICE.")


def parse_arguments(arguments: Sequence[str] | None) -> SearchArguments:
    parser = HfArgumentParser((SearchArguments,), description=__doc__, formatter_class=HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses(arguments)[0]
    except ValueError as error:
        parser.error(str(error))


def load_model(name: str, measure: str | None) -> SuperShaperPreTrainedModel:
    """Return the supernet with its masked-LM head, or its encoder alone: it has no head, or is a sentence encoder."""
    with_head = "MaskedLM" in str(SuperShaperConfig.from_pretrained(name).architectures)
    with_head = with_head and (measure == "loss" or read_pooling(name) is None)
    if not with_head and measure == "loss":
        raise ValueError(f"--model_name_or_path {name} has no masked-LM head. Use --measure distance.")
    return (SuperShaperForMaskedLM if with_head else SuperShaperModel).from_pretrained(name)


def load_batches(
    args: SearchArguments, model: SuperShaperPreTrainedModel, length: int, measure: str
) -> list[dict[str, torch.Tensor]]:
    """Return the held-out text, masked once for all shapes, or without masks to measure distances."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path)
    check_vocabulary(tokenizer, model.config)
    sequences = tokenize(load_text(args.eval_files, args.text_column), tokenizer, length)
    sequences = sequences.select(range(min(len(sequences), args.max_eval_samples)))
    masked = args.mlm_probability if measure == "loss" else 0.0
    return fixed_masks(sequences, tokenizer, args.per_device_eval_batch_size, masked, args.seed)


def measure_latency(args: SearchArguments, space: SearchSpace, length: int, folder: Path) -> LatencyTable:
    """Measure what is not in the folder yet: the latency table and, with --insensitivity, shapes of equal size."""
    size: dict[str, Any] = {"device": args.latency, "batch_size": args.latency_batch_size, "sequence_length": length}
    if not (folder / LATENCY_FILE).exists():  # a comparison that is there was made under other conditions
        (folder / INSENSITIVITY_FILE).unlink(missing_ok=True)
    table = LatencyTable.load_or_measure(folder / LATENCY_FILE, space, seed=args.seed, **size)
    if args.insensitivity and not (folder / INSENSITIVITY_FILE).exists():
        smallest, largest = space.num_parameters(space.smallest), space.num_parameters(space.largest)
        sizes = [round(smallest + part * (largest - smallest)) for part in (0.25, 0.5, 0.75)]
        try:
            save_comparisons(folder / INSENSITIVITY_FILE, compare_equal_sizes(space, sizes, seed=args.seed, **size))
        except ValueError as error:  # a small space may have no two shapes of equal size
            print(f"No comparison of shapes of equal size: {error}")
    return table


def search(args: SearchArguments, folder: Path, accelerator: Accelerator) -> None:
    load: Any = partial(load_model, measure=args.measure)
    load = partial(load_pretrained, "--model_name_or_path", args.model_name_or_path, load)
    model = on_every_process(load, accelerator).to(accelerator.device)
    copy_mapped_weights(model)  # before the text is read, which may take minutes
    has_loss = isinstance(model, SuperShaperForMaskedLM) and args.original is None
    options: dict[str, Any] = {"measure": args.measure or ("loss" if has_loss else "distance")}
    if options["measure"] == "distance":
        options["layers"] = args.layers
    if args.original is not None:
        load = partial(load_pretrained, "--original", args.original, AutoModel.from_pretrained)
        original = on_every_process(load, accelerator).to(accelerator.device)
        copy_mapped_weights(original)
        options["original"] = original
    space = SearchSpace.from_model(model)
    length = min(args.max_length, model.config.max_position_embeddings)
    batches = on_main_process(partial(load_batches, args, model, length, options["measure"]), accelerator)
    cost: Cost = args.cost
    if args.latency:
        table = on_main_process(partial(measure_latency, args, space, length, folder), accelerator)
        cost = table if args.cost == "latency" else cost

    def measure(shapes: list[list[int]]) -> list[Record]:
        try:
            return evaluate_shapes(
                model, batches, shapes, accelerator=accelerator, records_file=folder / RECORDS_FILE, **options
            )
        except (OSError, RuntimeError, ValueError) as error:
            error.add_note(f"The records_file is {RECORDS_FILE} in the folder that --output_dir names: {folder}")
            raise

    records = measure_in_rounds(
        space, measure, args.num_shapes, args.rounds, args.seed, cost, args.max_cost, args.drop_rate, length
    )
    predictor = ShapePredictor.fit_records(records, monotone=args.monotone)
    accelerator.print(f"Predictor: {predictor.quality}.")
    front = pareto_front(space, predictor, cost, sequence_length=length)
    best = [*shapes_at(front, args.num_budgets).tolist(), *map(front.best, args.max_cost or [])]
    measure(np.unique(best, axis=0).tolist())  # the predictor was not fitted on these, so they test it
    on_main_process(partial(write_results, args, model, predictor, length, folder), accelerator)


def write_results(
    args: SearchArguments, model: SuperShaperPreTrainedModel, predictor: ShapePredictor, length: int, folder: Path
) -> None:
    predictor.save(folder / PREDICTOR_FILE)
    write_config(folder, SearchSpace.from_model(model))
    supernet = args.push_to_hub or args.model_name_or_path  # a page on the Hub names no folder of this machine
    page = write_report(folder, args.cost, args.max_cost or [], args.num_budgets, length, supernet)
    print(page.read_text(encoding="utf-8"))
    print(f"Written: {page}")
    if args.push_to_hub:
        repo_id = f"{args.push_to_hub}-search"
        write_data_card(folder, repo_id, args.push_to_hub)
        print(push_folder(folder, repo_id, repo_type="dataset", commit_message="Upload a shape search"))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    folder = Path(args.output_dir)
    # The other processes wait while one measures latency or reads the text, which may take long.
    accelerator = start_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    with ExitStack() as stack:

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))

        on_main_process(begin, accelerator)
        search(args, folder, accelerator)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
