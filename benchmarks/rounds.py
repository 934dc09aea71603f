"""How much does measuring in rounds save? How good is the shape that one chooses after measuring n shapes?

    python benchmarks/rounds.py                             # made-up losses: 12 layers, 7 widths
    python benchmarks/rounds.py --records measured.csv      # a predictor of measured shapes: layer_0, ..., loss
    python benchmarks/rounds.py --model outputs/quickstart/supernet --text examples/data/presidential_addresses.txt

For a budget, one chooses the best measured shape, or a shape that is predicted to be better. The loss of this shape is
compared, after random shapes and after rounds.

Without `--model`, a predictor with terms of neighbouring layers gives the losses, and every shape deviates from its sum
by a random amount of its own, about as large as the error of the fit. The benchmark prints the distance from the best
sum, which shapes that deviate downwards can beat. With `--model`, losses are measured on the documents that
`examples/quickstart.py` holds out, and the distance is that from the best shape that any of the compared searches has
measured.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from predictor import read
from search import BUDGETS, invented_truth
from transformers import AutoTokenizer

from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperConfig, SuperShaperForMaskedLM, evaluate_shapes
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.documents import load_text, split_text
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.report.tables import text_table
from supershaper_hf.search.pareto import pareto_front
from supershaper_hf.search.rounds import measure_in_rounds


MANY_BUDGETS = np.linspace(36e6, 110e6, 20).tolist()
Losses = Callable[[list[list[int]]], list[float]]
Records = list[dict[str, Any]]


class Truth:
    """The losses of shapes. The loss of each shape is computed once.

    Args:
        space: The search space.
        losses: A function that returns the losses of many shapes in nats.
    """

    def __init__(self, space: SearchSpace, losses: Losses):
        self.space, self.losses = space, losses
        self.known: dict[tuple[int, ...], float] = {}

    def measure(self, shapes: list[list[int]]) -> Records:
        new = [shape for shape in shapes if tuple(shape) not in self.known]
        if new:
            self.known.update(zip(map(tuple, new), self.losses(new)))
        return [{"shape": shape, "loss": self.known[tuple(shape)]} for shape in shapes]

    def best_known(self, budgets: Sequence[float]) -> np.ndarray:
        shapes, losses = np.array(list(self.known)), np.array(list(self.known.values()))
        costs = self.space.num_parameters(shapes)
        return np.array([losses[costs <= budget].min() for budget in budgets])


def deviating(truth: ShapePredictor, noise: float, seed: int, shapes: list[list[int]]) -> list[float]:
    """Return what `truth` predicts plus a deviation of each shape, which is always the same for one seed."""
    errors = [np.random.default_rng((seed, *shape)).normal(0, noise) for shape in shapes]
    return (truth.predict(shapes) + errors).tolist()


def of_supernet(folder: str, text: list[str], max_sequences: int) -> Truth:
    """Return a truth that measures the losses of a supernet on held-out documents."""
    model, tokenizer = SuperShaperForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    _, held_out = split_text(load_text(text), held_out=0.1, seed=0)
    sequences = tokenize(held_out, tokenizer, model.config.max_position_embeddings)
    batches = fixed_masks(sequences.select(range(min(len(sequences), max_sequences))), tokenizer, batch_size=64)

    def losses(shapes: list[list[int]]) -> list[float]:
        return [record["loss"] for record in evaluate_shapes(model, batches, shapes)]

    return Truth(SearchSpace.from_config(model.config), losses)


def recommend(space: SearchSpace, records: Records, budget: float) -> list[int]:
    """Return the shape to choose for a budget: a measured one, or one that is predicted to be better."""
    shapes, losses = np.array([r["shape"] for r in records]), np.array([r["loss"] for r in records])
    predictor = ShapePredictor.fit_records(records)
    within = np.where(space.num_parameters(shapes) <= budget, losses, np.inf)
    best = pareto_front(space, predictor).best(budget)
    return best if predictor.predict(best) < within.min() else shapes[within.argmin()].tolist()


def compare(
    truths: Sequence[Truth], budgets: Sequence[float], num_shapes: Sequence[int], ideal: Callable[[], np.ndarray]
) -> None:
    """Print by how much the recommended shapes are worse than `ideal`, after random shapes and after rounds.

    Args:
        truths: The truth of each seed.
        budgets: Budgets in parameters.
        num_shapes: Numbers of shapes to measure.
        ideal: A function, called at the end, that returns the loss to compare with for each budget.
    """
    space = truths[0].space

    def losses(count: int, targets: list[Sequence[float] | None]) -> np.ndarray:
        """Return the loss chosen for each seed and budget."""
        found = np.empty((len(truths), len(budgets)))
        for seed, truth in enumerate(truths):
            for target in targets:  # each budget on its own, or all at once
                records = measure_in_rounds(space, truth.measure, count, seed=seed, max_cost=target)
                for place, budget in enumerate(budgets):
                    if target is None or budget in target:
                        found[seed, place] = truth.measure([recommend(space, records, budget)])[0]["loss"]
        return found

    hows: dict[str, list[Sequence[float] | None]] = {"random": [None]}
    if len(budgets) <= 5:
        hows["in rounds, each budget alone"] = [[budget] for budget in budgets]
    hows["in rounds, all budgets at once"] = [budgets]
    found = {how: [losses(count, targets) for count in num_shapes] for how, targets in hows.items()}
    best = ideal()
    rows = [
        {"shapes": count, **{how: f"{np.mean(found[how][place] - best):+.4f}" for how in hows}}
        for place, count in enumerate(num_shapes)
    ]
    print(
        f"budgets {', '.join(f'{budget:,.0f}' for budget in budgets)}: nats above the best, mean of {len(truths)} seeds"
    )
    print(text_table(rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="CSV or records.jsonl of a space with 12 x 7 widths of bert-base")
    parser.add_argument("--model", help="folder of a supernet to measure")
    parser.add_argument("--text", nargs="+", help="documents; the tenth that the quickstart holds out is used")
    parser.add_argument("--max_sequences", type=int, default=500, help="sequences to measure on")
    parser.add_argument("--num_seeds", type=int, default=10, help="searches with different seeds")
    parser.add_argument(
        "--num_shapes", type=int, nargs="+", default=[24, 36, 48, 72, 96, 144, 216], help="shapes to measure"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Shapes left out")  # this is expected after 24 measurements
    if args.model:
        truth = of_supernet(args.model, args.text, args.max_sequences)
        smallest, largest = (truth.space.num_parameters(s) for s in (truth.space.smallest, truth.space.largest))
        budgets = [smallest + part * (largest - smallest) for part in (0.25, 0.5, 0.75)]
        compare([truth] * args.num_seeds, budgets, args.num_shapes, partial(truth.best_known, budgets))
        print(f"{len(truth.known):,} shapes measured")
        return
    space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
    fitted, noise = invented_truth(space), 0.01
    if args.records:
        fitted = ShapePredictor.fit(*read(args.records))
        noise = fitted.quality.rmse if fitted.quality else noise
    print(f"every shape deviates by {noise:.3f} nats (standard deviation)")
    front = pareto_front(space, fitted)
    for budgets in (list(BUDGETS), MANY_BUDGETS):
        truths = [Truth(space, partial(deviating, fitted, noise, seed)) for seed in range(args.num_seeds)]
        best = fitted.predict([front.best(budget) for budget in budgets])
        compare(truths, budgets, args.num_shapes, lambda best=best: best)


if __name__ == "__main__":
    main()
