"""Measure the time and the memory of the exact Pareto front, and how near evolutionary search comes to it.

    python benchmarks/search.py                             # an invented predictor is the truth
    python benchmarks/search.py --records measured.csv      # the truth is fitted on measured shapes: layer_0, ..., loss

The search space has 12 layers and 7 widths, as for BERT-base. The truth is a predictor with terms of neighbouring
layers.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperConfig, evolutionary_search, pareto_front
from supershaper_hf.checks import check_count
from supershaper_hf.report.tables import text_table


BUDGETS = (45e6, 63e6, 80e6)
CHILD = """
import sys
from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperConfig, pareto_front
predictor = ShapePredictor.load(sys.argv[1])
if sys.argv[2] == "front":
    pareto_front(SearchSpace.from_config(SuperShaperConfig(vocab_size=28996)), predictor)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def invented_truth(space: SearchSpace, seed: int = 0) -> ShapePredictor:
    """Return a predictor with random terms: a wider layer lowers the loss, and neighbouring layers interact."""
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


def evolution(space: SearchSpace, truth: ShapePredictor, num_seeds: int) -> None:
    front = pareto_front(space, truth)
    rows = []
    for budget in BUDGETS:
        best = truth.predict([front.best(budget)])[0]
        gaps, seconds, candidates = [], [], []
        for seed in range(num_seeds):
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
                "exact found": f"{sum(gap < 1e-9 for gap in gaps)} of {num_seeds}",
                "seconds": f"{statistics.median(seconds):.2f}",
                "candidates/s": f"{sum(candidates) / sum(seconds):,.0f}",
            }
        )
    print("evolutionary search, the paper's sizes (population 100, 300 iterations; target: 100,000 candidates/s)")
    print(text_table(rows), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records", type=Path, help="CSV or records.jsonl of shapes with the same 12 layers and 7 widths"
    )
    parser.add_argument("--num_seeds", type=int, default=10, help="evolutionary searches per budget")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark_search"), help="where to save the truth")
    args = parser.parse_args()
    check_count("--num_seeds", args.num_seeds)
    args.folder.mkdir(parents=True, exist_ok=True)
    space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
    if args.records:
        from predictor import read  # it needs scikit-learn

        truth = ShapePredictor.fit(*read(args.records))
    else:
        truth = invented_truth(space)
    exact(space, truth, args.folder)
    evolution(space, truth, args.num_seeds)


if __name__ == "__main__":
    main()
