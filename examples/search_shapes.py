"""Measure shapes of a supernet, predict all others, and find the best shape for every budget.

    python examples/search_shapes.py --model outputs/supernet/last --eval_files held_out.txt --output_dir outputs/search
    accelerate launch --num_processes 8 examples/search_shapes.py --model user/supernet --eval_files ... --latency cuda

The output folder gets `records.jsonl` (every measurement, as it is made), `predictor.json`, `front.csv`, `report.md`
with its plots, and with --latency `latency.json`. Stop it at any time: the same command goes on where it stopped, and
makes the report anew when nothing is left to measure. `--help` lists all options.
"""

import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import AutoTokenizer, HfArgumentParser

from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperForMaskedLM, evaluate_shapes, pareto_front
from supershaper_hf.data.batches import MLM_PROBABILITY, fixed_masks
from supershaper_hf.data.documents import load_text
from supershaper_hf.data.sequences import check_vocabulary, tokenize
from supershaper_hf.devices import copy_mapped_weights, device_name, parse_device
from supershaper_hf.files import write_file
from supershaper_hf.latency.insensitivity import compare_equal_sizes, insensitivity_rows
from supershaper_hf.latency.table import LatencyTable
from supershaper_hf.model.costs import Cost
from supershaper_hf.processes import on_main_process
from supershaper_hf.publish.hub import push_folder
from supershaper_hf.report.page import INSENSITIVITY_FILE, LATENCY_FILE, PREDICTOR_FILE, RECORDS_FILE, write_report
from supershaper_hf.search.pareto import shapes_at
from supershaper_hf.search.records import Record, read_records, to_dataset
from supershaper_hf.search.rounds import measure_in_rounds
from supershaper_hf.training.arguments import HelpFormatter, option


@dataclass
class SearchArguments:
    """What to measure, on what, and where the result goes."""

    model: str | None = option(None, "The supernet: a folder or Hub id.")
    tokenizer: str | None = option(None, "By default the one beside the model.")
    eval_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out text: files, globs, folders (.txt .jsonl .parquet, .gz .xz .zst) or Hub ids."},
    )
    text_column: str = option("text", "Column of the text in JSON lines and Parquet.")
    output_dir: str = option("outputs/search", "Folder of the records, the predictor and the report.")
    max_length: int = option(128, "Tokens per sequence at most.")
    max_eval_sequences: int = option(1000, "Sequences that each shape is measured on at most.")
    per_device_eval_batch_size: int = option(64, "Sequences in a batch.")
    mlm_probability: float = option(MLM_PROBABILITY, "Share of the tokens that are masked.")
    num_shapes: int = option(60, "Shapes to measure before the front is computed.")
    rounds: int = option(4, "With --max_cost: the first round is random, the others look for the best shapes.")
    drop_rate: float = option(0.0, "Chance of each layer to be dropped in the first round; 0 keeps all layers.")
    monotone: bool = option(False, "Predict that a wider layer is never worse.")
    cost: str = option("parameters", "Budget in parameters, flops or latency (with --latency).")
    max_cost: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Budgets that matter most, if not all do: parameters, operations or seconds, as --cost says."
        },
    )
    num_budgets: int = option(8, "Budgets for which the best shape is measured and shown.")
    latency: str | None = option(None, "Device to measure latency on, such as cpu or cuda.")
    latency_batch_size: int = option(1, "Sequences in a batch whose latency is measured.")
    insensitivity: bool = option(False, "With --latency: measure how much it differs among shapes of equal size.")
    seed: int = option(0, "Of masks, shapes and proposals.")
    push_to_hub: str | None = option(None, "user/name: upload the results to search/ in that repository.")


def parse_arguments() -> SearchArguments:
    parser = HfArgumentParser((SearchArguments,), description=__doc__, formatter_class=HelpFormatter)
    (args,) = parser.parse_args_into_dataclasses()
    for name in ("model", "eval_files"):
        if not getattr(args, name):
            parser.error(f"--{name} is missing.")
    if args.cost not in ("parameters", "flops", "latency"):
        parser.error(f"--cost {args.cost} is unknown. Allowed: parameters, flops, latency.")
    if (args.cost == "latency" or args.insensitivity) and not args.latency:
        parser.error("--cost latency and --insensitivity need --latency DEVICE.")
    return args


def load_batches(args: SearchArguments, model: SuperShaperForMaskedLM, length: int) -> list[dict[str, torch.Tensor]]:
    """Return the held-out text, masked once for all shapes."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    check_vocabulary(tokenizer, model.config)
    sequences = tokenize(load_text(args.eval_files, args.text_column), tokenizer, length)
    sequences = sequences.select(range(min(len(sequences), args.max_eval_sequences)))
    return fixed_masks(sequences, tokenizer, args.per_device_eval_batch_size, args.mlm_probability, args.seed)


def fit(records: list[Record], monotone: bool) -> ShapePredictor:
    """Fit the predictor on the records whose loss is finite."""
    finite = [record for record in records if np.isfinite(record["loss"])]
    if len(finite) < len(records):
        print(f"{len(records) - len(finite)} shapes have no finite loss and are left out of the fit.")
    return ShapePredictor.fit(
        [record["shape"] for record in finite], [record["loss"] for record in finite], monotone=monotone
    )


def measure_latency(args: SearchArguments, space: SearchSpace, length: int, folder: Path) -> LatencyTable:
    """Write the latency table and, if asked for, the insensitivity report; keep those that are there."""
    size: dict[str, Any] = {"device": args.latency, "batch_size": args.latency_batch_size, "sequence_length": length}
    if (folder / LATENCY_FILE).exists():
        table = LatencyTable.load(folder / LATENCY_FILE)
        asked = size | {"device": device_name(parse_device(args.latency))}
        if stored := {name: getattr(table, name) for name in asked if getattr(table, name) != asked[name]}:
            raise ValueError(
                f"{folder / LATENCY_FILE} was measured with {stored}, asked for is {asked}. Delete it and "
                f"{INSENSITIVITY_FILE} to measure anew, or give another --output_dir."
            )
    else:
        table = LatencyTable.measure(space.config, seed=args.seed, **size)
        table.save(folder / LATENCY_FILE)
    if args.insensitivity and not (folder / INSENSITIVITY_FILE).exists():
        smallest, largest = space.num_parameters(space.smallest), space.num_parameters(space.largest)
        budgets = [round(smallest + part * (largest - smallest)) for part in (0.25, 0.5, 0.75)]
        try:
            found = compare_equal_sizes(space.config, budgets, seed=args.seed, **size)
        except ValueError as error:  # a space so small that no two shapes are of equal size
            print(f"No insensitivity report: {error}")
        else:
            write_file(folder / INSENSITIVITY_FILE, json.dumps(insensitivity_rows(found), indent=1))
    return table


def main() -> int:
    args = parse_arguments()
    # The others wait while one process measures latency, or reads the text for the first time.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    folder = Path(args.output_dir)
    model = SuperShaperForMaskedLM.from_pretrained(args.model).to(accelerator.device)
    copy_mapped_weights(model)  # before the text is read, which may take minutes
    space = SearchSpace.from_config(model.config)
    length = min(args.max_length, model.config.max_position_embeddings)
    with accelerator.main_process_first():
        batches = load_batches(args, model, length)

    cost: Cost = args.cost
    if args.latency:
        folder.mkdir(parents=True, exist_ok=True)
        table = on_main_process(partial(measure_latency, args, space, length, folder), accelerator)
        cost = table if args.cost == "latency" else cost

    def measure(shapes: list[list[int]]) -> list[Record]:
        return evaluate_shapes(model, batches, shapes, accelerator=accelerator, records_file=folder / RECORDS_FILE)

    records = measure_in_rounds(
        space,
        measure,
        args.num_shapes,
        rounds=args.rounds,
        seed=args.seed,
        cost=cost,
        max_cost=args.max_cost or None,
        drop_rate=args.drop_rate,
        sequence_length=length,
    )
    predictor = fit(records, args.monotone)
    accelerator.print(f"Predictor: {predictor.quality}.")
    front = pareto_front(space, predictor, cost, sequence_length=length)
    best = [*shapes_at(front, args.num_budgets).tolist(), *map(front.best, args.max_cost)]
    measure(np.unique(best, axis=0).tolist())  # the predictor has not seen these
    if accelerator.is_main_process:
        model.config.to_json_file(folder / "config.json")
        predictor.save(folder / PREDICTOR_FILE)
        to_dataset(read_records(folder / RECORDS_FILE), space).to_parquet(folder / "records.parquet")
        page = write_report(folder, args.cost, args.num_budgets, length, args.max_cost)
        print(page.read_text(encoding="utf-8"))
        print(f"Written: {page}")
        if args.push_to_hub:
            print(push_folder(folder, args.push_to_hub, path_in_repo="search", commit_message="Upload a shape search"))
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
