"""The whole way once, on real text, on a laptop: from text to a small model in a folder that is ready for the Hub.

    python examples/quickstart.py                                    # bundled text, about 2 minutes on two cores
    python examples/quickstart.py --text mine.txt more.txt           # your text, one document a line
    python examples/quickstart.py --bert path/or/hub-id --text ...   # start from a real BERT

It pre-trains a small BERT, makes a supernet of it, trains all shapes at once, measures some, fits a predictor, finds
the exact Pareto front, cuts out the best shape for half the supernet's size, trains it a little on, saves it with
card and code, and loads it in a fresh process that does not have this package. Every claim it prints is checked; the
exit status is 1 if one does not hold.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from supershaper_hf import SearchSpace, SuperShaperForMaskedLM
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.documents import load_text, split_text
from supershaper_hf.data.sequences import check_vocabulary, tokenize, train_tokenizer
from supershaper_hf.files import check_output_folder
from supershaper_hf.model.shapes import SHAPE_NAMES
from supershaper_hf.publish.hub import save_for_hub
from supershaper_hf.report.page import PREDICTOR_FILE, RECORDS_FILE, write_report
from supershaper_hf.report.plots import plot_front
from supershaper_hf.report.tables import markdown_table, text_table
from supershaper_hf.search.evaluation import evaluate_shapes
from supershaper_hf.search.pareto import ParetoFront, pareto_front, shapes_at
from supershaper_hf.search.predictor import ShapePredictor
from supershaper_hf.search.profile import derive_profile
from supershaper_hf.search.records import Record
from supershaper_hf.search.rounds import best_measured, measure_in_rounds
from supershaper_hf.training.arguments import SuperPretrainingArguments
from supershaper_hf.training.loop import super_pretrain


BUNDLED_TEXT = Path(__file__).parent / "data" / "presidential_addresses.txt"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", metavar="FILE", default=[BUNDLED_TEXT], help="UTF-8, one document a line")
    parser.add_argument("--bert", metavar="PATH_OR_ID", help="a BERT checkpoint to start from")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--bert_steps", type=int, default=700, help="steps for BERT, or for a head that --bert lacks")
    parser.add_argument("--super_steps", type=int, default=1000, help="super pre-training steps")
    parser.add_argument("--subnet_steps", type=int, default=100, help="steps that train the extracted subnet on")
    parser.add_argument("--shapes", type=int, default=60, help="shapes to measure")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


Batches = list[dict[str, torch.Tensor]]


def prepare_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Dataset, Batches, Batches]:
    """Return tokenizer, training sequences, and masked batches of two held-out texts: to search on, to report on."""
    length = 64 if args.bert else 32
    train_text, held_out_text = split_text(load_text(args.text), held_out=0.1, seed=args.seed)
    search_text, report_text = split_text(held_out_text, held_out=0.5, seed=args.seed)
    if args.bert:
        tokenizer = AutoTokenizer.from_pretrained(args.bert)
    else:
        tokenizer = train_tokenizer(train_text["text"], vocab_size=1000, max_length=length)
    train, *held_out = (tokenize(text, tokenizer, length) for text in (train_text, search_text, report_text))
    search_batches, report_batches = (fixed_masks(text, tokenizer, batch_size=64, seed=args.seed) for text in held_out)
    return tokenizer, train, search_batches, report_batches


def start_bert(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> SuperShaperForMaskedLM:
    """Return a supernet that is still a plain BERT: new and small, or the checkpoint of `--bert`."""
    if args.bert:
        supernet, info = SuperShaperForMaskedLM.from_bert(args.bert, output_loading_info=True)
        if any(name.startswith("cls.") for name in info["missing_keys"]):
            print("This checkpoint has no masked-LM head: training one first, with the encoder frozen.")
            supernet.bert.requires_grad_(False)
        check_vocabulary(tokenizer, supernet.config)
        return supernet
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = BertForMaskedLM(config)
    look_at_neighbours(bert)
    return SuperShaperForMaskedLM.from_bert(bert, head_slicing="per_head")


@torch.no_grad()
def look_at_neighbours(bert: BertForMaskedLM, layers: int = 2, sharpness: float = 2.0) -> None:
    """Start with sinusoidal positions and, in the first layers, heads that look 1 or 2 tokens to the left or right.

    From random positions a BERT takes far longer than a quickstart to find out which tokens are its neighbours: 2,000
    steps of this one learned little beyond the frequencies of single tokens (docs/decisions.md).
    """
    embeddings = bert.bert.embeddings.position_embeddings.weight
    length, width = embeddings.shape
    angles = torch.arange(length).unsqueeze(1) * 2.5 * 0.85 ** torch.arange(width // 2)
    positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    embeddings.copy_(0.1 * positions)
    head_size = width // bert.config.num_attention_heads
    for head, offset in enumerate((-1, 1, -2, 2)):
        # A shift by `offset` rotates each pair of sine and cosine: positions[i] @ shift == positions[i + offset].
        sine, cosine = (offset * angles[1]).sin(), (offset * angles[1]).cos()
        turns = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], dim=-1)
        shift = torch.block_diag(*turns)
        rows = slice(head * head_size, (head + 1) * head_size)
        for layer in bert.bert.encoder.layer[:layers]:
            layer.attention.self.query.weight[rows] = sharpness * shift.T[:head_size]
            layer.attention.self.key.weight[rows] = sharpness * torch.eye(width)[:head_size]


def train(
    supernet: SuperShaperForMaskedLM, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: argparse.Namespace
) -> None:
    """Pre-train the plain BERT (or only the head that a checkpoint lacks), then every shape at once."""
    rate = 5e-4 if args.bert else 1e-3
    common: dict[str, Any] = {"per_device_train_batch_size": 16, "mlm_probability": 0.3, "seed": args.seed}
    head_missing = not all(parameter.requires_grad for parameter in supernet.parameters())
    if not args.bert or head_missing:
        plain = SuperPretrainingArguments(max_steps=args.bert_steps, learning_rate=rate, sampling="fixed", **common)
        super_pretrain(supernet, tokenizer, dataset, plain, description="1 BERT")
    supernet.requires_grad_(True)
    sandwich = SuperPretrainingArguments(max_steps=args.super_steps, learning_rate=rate, **common)
    super_pretrain(supernet, tokenizer, dataset, sandwich, description="2 Supernet")


def search(
    supernet: SuperShaperForMaskedLM, batches: Batches, budget: int, args: argparse.Namespace
) -> tuple[list[int], list[Record], ParetoFront]:
    """Measure shapes, more and more near the best ones for `budget`; return the best, all records, and the front."""
    space, folder = SearchSpace.from_config(supernet.config), args.output_dir / "search"

    def measure(shapes: list[list[int]]) -> list[Record]:
        file = folder / RECORDS_FILE
        return evaluate_shapes(supernet, batches, shapes, description="3 Measuring shapes", records_file=file)

    records = measure_in_rounds(space, measure, args.shapes, seed=args.seed, max_cost=budget)
    predictor = ShapePredictor.fit([record["shape"] for record in records], [record["loss"] for record in records])
    predictor.save(folder / PREDICTOR_FILE)
    supernet.config.to_json_file(folder / "config.json")
    front = pareto_front(space, predictor)
    measure(np.unique(shapes_at(front, 8), axis=0).tolist())  # to see how far the predictor is off
    print(
        f"\nMeasured {len(records)} shapes. Predictor: {predictor.quality}.\n"
        f"The exact front over {space.size:,} shapes has {len(front)} points. Budget: {budget:,} parameters.\n"
        f"{derive_profile(space, predictor).sentence()}\n"
        f"All of it: {write_report(folder, max_cost=[budget])}"
    )
    return best_measured(space, records, "parameters", budget), records, front


def compare(supernet: SuperShaperForMaskedLM, batches: Batches, shapes: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Measure shapes on text that had no part in the search: one row of the table for each."""
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


def stored_parameters(folder: Path) -> int:
    """Count the numbers in the weight file itself."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


@torch.no_grad()
def largest_difference(
    supernet: SuperShaperForMaskedLM, subnet: SuperShaperForMaskedLM, shape: list[int], batches: Batches
) -> float:
    """Compare logits of supernet and subnet on a short and on a whole batch (where the supernet merges bottlenecks)."""
    differences = []
    for size in (1, 64):
        inputs = {name: batches[-1][name][:size].to(supernet.device) for name in ("input_ids", "attention_mask")}
        differences.append((subnet(**inputs).logits - supernet(**inputs, shape=shape).logits).abs().max().item())
    return max(differences)


FRESH_PROCESS = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):  # as if supershaper_hf were not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "supershaper_hf":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
from transformers import pipeline

folder, sentence = sys.argv[1:]
for guess in pipeline("fill-mask", model=folder, trust_remote_code=True)(sentence, top_k=3):
    print(f"    {guess['score']:.3f}  {guess['sequence']}")
"""


def load_without_package(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Fill a mask in a new process that has transformers but not supershaper_hf."""
    sentence = f"the president of the united {tokenizer.mask_token} ."
    print(f"A fresh process without supershaper_hf completes: {sentence}")
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder), sentence]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as modules:  # where transformers copies the code beside the weights
        environment = os.environ | quiet | {"HF_MODULES_CACHE": modules}
        return subprocess.run(command, env=environment, check=False).returncode == 0


def main() -> int:
    start, args = time.time(), parse_arguments()
    check_output_folder(args.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    tokenizer, dataset, search_batches, report_batches = prepare_text(args)
    supernet = start_bert(args, tokenizer)
    train(supernet, tokenizer, dataset, args)

    space = SearchSpace.from_config(supernet.config)
    budget = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    named = {name: space.named_shape(name, budget) for name in SHAPE_NAMES}
    save_for_hub(supernet, args.output_dir / "supernet", tokenizer=tokenizer, language="en", base_model=args.bert)
    shape, measured, front = search(supernet, search_batches, budget, args)
    rows = compare(supernet, report_batches, {"searched": shape} | named)
    print("\nThe best shape found beside hand-crafted ones, on text that had no part in the search:\n")
    print(text_table(rows), "\n")
    plot_front(
        args.output_dir / "pareto.png",
        front,
        measured=[(space.num_parameters(record["shape"]), record["perplexity"]) for record in measured],
        named={  # on the text of the search, as all else in the plot
            row["name"]: (row["parameters"], row["perplexity"])
            for row in compare(supernet, search_batches, {"searched": shape} | named)
        },
    )

    subnet = supernet.extract_subnet(shape)
    difference = largest_difference(supernet, subnet, shape, report_batches)
    further = SuperPretrainingArguments(
        max_steps=args.subnet_steps,
        per_device_train_batch_size=16,
        learning_rate=2e-4,
        sampling="fixed",
        mlm_probability=0.3,
        seed=args.seed,
    )
    super_pretrain(subnet, tokenizer, dataset, further, description="5 Subnet")
    (after,) = evaluate_shapes(subnet, report_batches, [None])
    folder = save_for_hub(
        subnet,
        args.output_dir / "subnet",
        tokenizer=tokenizer,
        language="en",
        base_model=args.bert,
        training=f"Cut out of a supernet at {shape} and trained for {args.subnet_steps} more steps (quickstart.py).",
        evaluation=f"Perplexity of masked tokens on held-out text: {after['perplexity']:.2f}. Before the continued "
        f"training, beside hand-crafted shapes of the same budget:\n\n{markdown_table(rows)}",
    )

    before, counted, stored = rows[0]["perplexity"], rows[0]["parameters"], stored_parameters(folder)
    second = min(rows[1:], key=lambda row: row["perplexity"])
    claims = {
        f"subnet equals supernet: largest difference of a logit {difference:.1e}": difference < 1e-4,
        f"counted parameters {counted:,}, stored {stored:,}": counted == stored,
        f"continued training: perplexity {before:.2f} -> {after['perplexity']:.2f}": after["perplexity"] < before,
        "loads without the package": load_without_package(folder, tokenizer),
        f"searched {before:.2f} beats the best hand-crafted shape, {second['name']} {second['perplexity']:.2f}": before
        < second["perplexity"],
    }
    print()
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    print(f"\n{time.time() - start:.0f} s. Plot: {args.output_dir / 'pareto.png'}. Publish the model with:")
    print(f"  hf upload your-name/your-model {folder}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
