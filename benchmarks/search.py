"""The exact front: time, memory, how far evolutionary search is from it, and what measuring in rounds saves.

    python benchmarks/search.py                             # a synthetic truth
    python benchmarks/search.py --records measured.csv      # a truth fitted on measured shapes: layer_0, ..., loss

12 layers, 7 widths, bert-base sizes. The truth is a predictor with terms of neighbouring layers. For the last part
every shape also deviates from that sum, by as much as the fit leaves unexplained, and always by the same.
What is compared is the loss, deviation included, of the shape that one would choose for a budget after n measurements:
the best measured one, or one that is predicted to be better. Shapes that deviate downwards can beat the best sum.
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from predictor import read

from supershaper_hf import SearchSpace, SuperShaperConfig
from supershaper_hf.evolution import evolutionary_search
from supershaper_hf.predictor import ShapePredictor
from supershaper_hf.rounds import measure_in_rounds
from supershaper_hf.search import pareto_front
from supershaper_hf.tables import text_table


BUDGETS = (45e6, 63e6, 80e6)
ENDS = (36e6, 110e6)
Records = list[dict[str, Any]]
CHILD = """
import sys
from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperConfig, pareto_front
predictor = ShapePredictor.load(sys.argv[1])
if sys.argv[2] == "front":
    pareto_front(SearchSpace(SuperShaperConfig(vocab_size=28996)), predictor)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def synthetic_truth(space: SearchSpace, seed: int = 0) -> ShapePredictor:
    """Return a predictor in which wider is better, by random amounts, and neighbours interact."""
    random = np.random.default_rng(seed)
    layers, widths = space.num_layers, len(space.width_choices)
    gains = np.diff(space.width_choices) / 768 * random.gamma(2.0, 0.05, size=(layers, widths - 1))
    effects = np.pad(-gains.cumsum(axis=1), ((0, 0), (1, 0)))
    pairs = np.zeros((layers, widths, widths))
    pairs[1:, 1:, 1:] = (
        0.004 * random.standard_normal((layers - 1, widths - 1, widths - 1)).cumsum(1).cumsum(2) / widths
    )
    return ShapePredictor(space.width_choices, 2.5, effects, pairs)


def exact(space: SearchSpace, truth: ShapePredictor, folder: Path) -> None:
    truth.save(folder / "predictor.json")
    rows = []
    for cost in ("parameters", "flops", ("parameters", "flops")):
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            front = pareto_front(space, truth, cost)
            seconds.append(time.perf_counter() - start)
        rows.append({"cost": str(cost), "points": len(front), "median": f"{statistics.median(seconds) * 1e3:.0f} ms"})
    print(f"exact front over {space.size:,} shapes (target: one cost under 1 s and 1 GB)")
    print(text_table(rows))
    peaks = {}
    for what in ("import", "front"):
        command = [sys.executable, "-c", CHILD, str(folder / "predictor.json"), what]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[what] = int(done.stdout.split()[-1]) * 1024 / 1e6
    print(f"peak memory of a process: {peaks['front']:.0f} MB, of which imports {peaks['import']:.0f} MB\n")


def evolution(space: SearchSpace, truth: ShapePredictor, seeds: int) -> None:
    front = pareto_front(space, truth)
    rows = []
    for budget in BUDGETS:
        best = truth.predict([front.best(budget)])[0]
        gaps, seconds, candidates = [], [], []
        for seed in range(seeds):
            start = time.perf_counter()
            result = evolutionary_search(space, truth, {"parameters": budget}, seed=seed)
            seconds.append(time.perf_counter() - start)
            gaps.append(result.loss - best)
            candidates.append(result.candidates)
        rows.append(
            {
                "budget": int(budget),
                "exact perplexity": float(np.exp(best)),
                "median gap": f"{np.expm1(statistics.median(gaps)):.3%}",
                "largest gap": f"{np.expm1(max(gaps)):.3%}",
                "exact found": f"{sum(gap < 1e-9 for gap in gaps)} of {seeds}",
                "seconds": f"{statistics.median(seconds):.2f}",
                "candidates/s": f"{sum(candidates) / sum(seconds):,.0f}",
            }
        )
    print("evolutionary search, the paper's sizes (population 100, 300 iterations; target: 100,000 candidates/s)")
    print(text_table(rows), "\n")


def recommend(space: SearchSpace, records: Records, budgets: np.ndarray) -> list[list[int]]:
    """Return the shape to choose for each budget: a measured one, or one that is predicted to be better."""
    shapes, losses = np.array([r["shape"] for r in records]), np.array([r["loss"] for r in records])
    predictor, costs = ShapePredictor.fit(shapes, losses), space.num_parameters(shapes)
    front = pareto_front(space, predictor)
    chosen = []
    for budget in budgets:
        within = np.where(costs <= budget, losses, np.inf)
        best = front.best(budget)
        chosen.append(best if predictor.predict([best])[0] < within.min() else shapes[within.argmin()].tolist())
    return chosen


def rounds(space: SearchSpace, truth: ShapePredictor, noise: float, seeds: int, budgets: Sequence[float]) -> None:
    """Print by how much the recommended shapes are worse than the best: after random ones, and after rounds."""
    counts = (24, 36, 48, 72, 96, 144, 216)
    front = pareto_front(space, truth)
    ideal = truth.predict([front.best(budget) for budget in budgets])

    def regret(seed: int, count: int, targets: list[Sequence[float] | None]) -> float:
        def measure(shapes: list[list[int]]) -> Records:
            errors = [np.random.default_rng((seed, *shape)).normal(0, noise) for shape in shapes]
            losses = truth.predict(shapes) + errors
            return [{"shape": shape, "loss": loss} for shape, loss in zip(shapes, losses.tolist())]

        found = []
        for target in targets:  # each budget on its own, or all at once
            records = measure_in_rounds(space, measure, count, seed=seed, max_cost=target)
            for budget, best in zip(budgets, ideal):
                if target is None or budget in target:
                    found.append(measure(recommend(space, records, np.array([budget])))[0]["loss"] - best)
        return float(np.mean(found))

    hows: dict[str, list[Sequence[float] | None]] = {
        "random": [None],
        "in rounds, each budget alone": [[budget] for budget in budgets],
        "in rounds, all budgets at once": [budgets],
    }
    if len(budgets) > 5:
        del hows["in rounds, each budget alone"]
    means = {
        how: [np.mean([regret(s, n, targets) for s in range(seeds)]) for n in counts] for how, targets in hows.items()
    }
    print(f"{len(budgets)} budgets, nats above the best sum of terms, mean of {seeds} seeds, noise {noise:.3f} nats")
    print(text_table([{"n": n, **{how: f"{means[how][i]:+.4f}" for how in hows}} for i, n in enumerate(counts)]), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="CSV or records.jsonl of a space with the same 12 x 7 widths")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark_search"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Shapes left out")  # after 24 measurements that is no surprise
    space = SearchSpace(SuperShaperConfig(vocab_size=28996))
    truth, noise = synthetic_truth(space), 0.01
    if args.records:
        truth = ShapePredictor.fit(*read(args.records))
        noise = truth.quality.rmse if truth.quality else noise
    exact(space, truth, args.folder)
    evolution(space, truth, args.seeds)
    rounds(space, truth, noise, args.seeds, BUDGETS)
    rounds(space, truth, noise, args.seeds, np.linspace(*ENDS, 20).tolist())


if __name__ == "__main__":
    main()
