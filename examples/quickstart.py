"""The whole method once, on real text and on a laptop: from text to a small model in a folder for the Hub.

    python examples/quickstart.py                                    # bundled text, about 2 minutes on two cores
    python examples/quickstart.py --text mine.txt more.txt           # your text, one document per line
    python examples/quickstart.py --bert path/or/hub-id --text ...   # start from a real BERT

1. Pre-train a small BERT and make a supernet of it. 2. Train all its shapes at once. 3. Measure some shapes, fit a
predictor, and find the exact Pareto front. 4. Compare the best shape for half the size range with hand-crafted ones.
5. Cut this shape out as a subnet, train it a little more, and save it with its model card and its code.

At the end the script prints what it claims of the result, and checks each claim. The exit status is 0 if all of them
hold. The small BERT is made in `tiny_bert.py`, the checks are in `claims.py`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import largest_difference, loads_without_package, print_claims, stored_parameters
from datasets import Dataset
from tiny_bert import LENGTH, TEXT, make_bert, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from supershaper_hf import (
    SHAPE_NAMES,
    ParetoFront,
    SearchSpace,
    ShapePredictor,
    SuperPretrainingArguments,
    SuperShaperForMaskedLM,
    best_measured,
    derive_profile,
    evaluate_shapes,
    fixed_masks,
    load_text,
    markdown_table,
    measure_in_rounds,
    pareto_front,
    plot_front,
    save_for_hub,
    shapes_at,
    split_text,
    super_pretrain,
    text_table,
    tokenize,
    write_report,
)


Batches = list[dict[str, torch.Tensor]]
Rows = list[dict[str, Any]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", metavar="FILE", default=[TEXT], help="UTF-8 text, one document per line")
    parser.add_argument("--bert", metavar="PATH_OR_ID", help="BERT checkpoint to start from, instead of the small BERT")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"), help="folder for the results")
    parser.add_argument("--bert_steps", type=int, default=700, help="steps that train the small BERT (default: 700)")
    parser.add_argument("--super_steps", type=int, default=1000, help="steps that train the supernet (default: 1000)")
    parser.add_argument("--subnet_steps", type=int, default=100, help="steps that train the subnet (default: 100)")
    parser.add_argument("--num_shapes", type=int, default=60, help="number of shapes to measure (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    for name, least in {"bert_steps": 1, "super_steps": 1, "subnet_steps": 1, "num_shapes": 8}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is too small: use at least {least}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if any(args.output_dir.iterdir()):
        sys.exit(f"{args.output_dir} exists and is not an empty folder. Choose another one or remove it first.")
    return args


def prepare_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Dataset, Batches, Batches]:
    """Return the tokenizer, the training sequences, and masked batches of two held-out texts.

    Shapes are searched on the first held-out text and compared on the second.
    """
    length = 64 if args.bert else LENGTH
    train_text, held_out_text = split_text(load_text(args.text), held_out=0.1, seed=args.seed)
    search_text, report_text = split_text(held_out_text, held_out=0.5, seed=args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.bert) if args.bert else make_tokenizer(train_text["text"])
    dataset, *held_out = (tokenize(text, tokenizer, length) for text in (train_text, search_text, report_text))
    search_batches, report_batches = (fixed_masks(text, tokenizer, batch_size=64, seed=args.seed) for text in held_out)
    return tokenizer, dataset, search_batches, report_batches


def train(
    model: SuperShaperForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: argparse.Namespace,
    description: str,
    **options: Any,
) -> None:
    """Train `model` in place. If the user interrupts the training, the program ends."""
    options |= {"per_device_train_batch_size": 16, "mlm_probability": 0.3, "seed": args.seed}
    summary = super_pretrain(model, tokenizer, dataset, SuperPretrainingArguments(**options), description=description)
    if summary.status == "interrupted":
        sys.exit(
            f"Interrupted during {description!r}. The quickstart cannot continue from here: remove {args.output_dir}, "
            "then start it again."
        )


def make_supernet(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: argparse.Namespace
) -> SuperShaperForMaskedLM:
    """Pre-train the small BERT, or load the checkpoint of `--bert`, and train a supernet of it."""
    if args.bert:
        learning_rate = 5e-4
        supernet, info = SuperShaperForMaskedLM.from_bert(args.bert, output_loading_info=True)
        pretrained = not any(name.startswith("cls.") for name in info["missing_keys"])
        if not pretrained:
            print("This checkpoint has no masked-LM head: training one first, with the encoder frozen.")
            supernet.bert.requires_grad_(False)
    else:
        learning_rate, pretrained = 1e-3, False
        supernet = SuperShaperForMaskedLM.from_bert(make_bert(tokenizer), head_slicing="per_head")
    options: dict[str, Any] = {"learning_rate": learning_rate}
    if not pretrained:  # at its largest shape alone, a new supernet is trained like a plain BERT
        train(supernet, tokenizer, dataset, args, "1 BERT", max_steps=args.bert_steps, sampling="fixed", **options)
    supernet.requires_grad_(True)
    train(supernet, tokenizer, dataset, args, "2 Supernet", max_steps=args.super_steps, **options)
    return supernet


def search(
    supernet: SuperShaperForMaskedLM, batches: Batches, budget: int, args: argparse.Namespace
) -> tuple[list[int], Rows, ParetoFront]:
    """Find the best shape of at most `budget` parameters; return it, the measured shapes, and the Pareto front."""
    space, folder = SearchSpace.from_config(supernet.config), args.output_dir / "search"

    def measure(shapes: list[list[int]]) -> Rows:
        file = folder / "records.jsonl"
        return evaluate_shapes(supernet, batches, shapes, description="3 Measuring shapes", records_file=file)

    records = measure_in_rounds(space, measure, args.num_shapes, seed=args.seed, max_cost=budget)
    predictor = ShapePredictor.fit_records(records)
    predictor.save(folder / "predictor.json")
    supernet.config.to_json_file(folder / "config.json")
    front = pareto_front(space, predictor)
    # The report compares the losses that are predicted for shapes on the front with measured ones.
    measure(np.unique(shapes_at(front, 8), axis=0).tolist())
    print(
        f"\nMeasured {len(records)} shapes. Predictor: {predictor.quality}.\n"
        f"The exact front over {space.size:,} shapes has {len(front)} points. Budget: {budget:,} parameters.\n"
        f"{derive_profile(space, predictor).sentence()}\n"
        f"Report: {write_report(folder, max_cost=[budget], supernet=args.output_dir / 'supernet')}"
    )
    return best_measured(space, records, "parameters", budget), records, front


def compare(supernet: SuperShaperForMaskedLM, batches: Batches, shapes: dict[str, list[int]]) -> Rows:
    """Measure shapes that have a name; return one row of the table for each."""
    space = SearchSpace.from_config(supernet.config)
    records = evaluate_shapes(supernet, batches, list(shapes.values()), description="4 Comparing")
    return [
        {
            "name": name,
            "parameters": space.num_parameters(shape),
            "perplexity": record["perplexity"],
            "shape": str(shape),
        }
        for (name, shape), record in zip(shapes.items(), records)
    ]


def plot(file: Path, front: ParetoFront, records: Rows, rows: Rows, space: SearchSpace) -> None:
    """Plot the front with all measured shapes, and with the named shapes of `rows`."""
    plot_front(
        file,
        front,
        measured=[(space.num_parameters(record["shape"]), record["perplexity"]) for record in records],
        named={row["name"]: (row["parameters"], row["perplexity"]) for row in rows},
    )


def main() -> int:
    start, args = time.time(), parse_arguments()
    set_seed(args.seed)
    tokenizer, dataset, search_batches, report_batches = prepare_text(args)
    supernet = make_supernet(tokenizer, dataset, args)
    card: dict[str, Any] = {"tokenizer": tokenizer, "language": "en", "base_model": args.bert}
    origin = args.bert or f"a small BERT, trained for {args.bert_steps:,} steps on the same text,"
    training = f"Made of {origin} and trained at all shapes at once for {args.super_steps:,} steps (quickstart.py)."
    save_for_hub(supernet, args.output_dir / "supernet", training=training, **card)

    space = SearchSpace.from_config(supernet.config)
    budget = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    shape, records, front = search(supernet, search_batches, budget, args)
    named = {"searched": shape} | {name: space.named_shape(name, budget) for name in SHAPE_NAMES}
    rows = compare(supernet, report_batches, named)
    print("\nThe best shape found and hand-crafted ones, on text that had no part in the search:\n")
    print(text_table(rows), "\n")
    plot(args.output_dir / "pareto.png", front, records, compare(supernet, search_batches, named), space)

    subnet = supernet.extract_subnet(shape)
    difference = largest_difference(supernet, subnet, shape, report_batches)
    options = {"max_steps": args.subnet_steps, "learning_rate": 2e-4, "sampling": "fixed"}
    train(subnet, tokenizer, dataset, args, "5 Subnet", **options)
    (record,) = evaluate_shapes(subnet, report_batches, [None])
    before, after, counted = rows[0]["perplexity"], record["perplexity"], rows[0]["parameters"]
    folder = save_for_hub(
        subnet,
        args.output_dir / "subnet",
        training=f"Cut out of a supernet at {shape} and trained for {args.subnet_steps} more steps (quickstart.py).",
        evaluation=f"Perplexity of masked tokens on held-out text: {after:.2f}. The table compares the subnet before "
        f"the continued training with hand-crafted shapes of the same budget:\n\n{markdown_table(rows)}",
        **card,
    )

    stored, second = stored_parameters(folder), min(rows[1:], key=lambda row: row["perplexity"])
    rival = f"{second['name']} {second['perplexity']:.2f}"
    claims = {
        f"subnet equals supernet: largest difference of a logit {difference:.1e}": difference < 1e-4,
        f"counted parameters {counted:,}, stored {stored:,}": counted == stored,
        f"continued training: perplexity {before:.2f} -> {after:.2f}": after < before,
        "loads without the package": loads_without_package(folder, tokenizer),
        f"searched {before:.2f} beats the best hand-crafted shape, {rival}": before < second["perplexity"],
    }
    all_hold = print_claims(claims)
    print(f"\n{time.time() - start:.0f} s. Plot: {args.output_dir / 'pareto.png'}. Publish the model with:")
    print(f"  hf upload your-name/your-model {folder}")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
