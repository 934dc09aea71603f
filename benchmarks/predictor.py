"""How well are shapes predicted that were not measured? The additive predictor is compared with boosted trees.

    pip install -e '.[benchmarks]'
    python benchmarks/predictor.py --records measured.csv       # columns layer_0, layer_1, ..., loss
    python benchmarks/predictor.py --records records.jsonl      # written by examples/search_shapes.py

First comes five-fold cross-validation, then fits on a few random rows that are tested on all other rows. The numbers
are means over repetitions, and R2 is that of perplexity. The trees are those of scikit-learn in two settings. Comparing
with the better one gives them an advantage, since it is known only after the test. `--largest P` gives the measured
perplexity of the largest shape, to see which predictor can extrapolate to it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from supershaper_hf.report.tables import text_table
from supershaper_hf.search.predictor import ShapePredictor
from supershaper_hf.search.records import read_records


Fit = Callable[[np.ndarray, np.ndarray], Any]


def trees(depth: int, rate: float) -> Fit:
    def fit(shapes: np.ndarray, losses: np.ndarray) -> Any:
        from sklearn.ensemble import GradientBoostingRegressor  # here, because `rounds.py` imports `read` without it

        model = GradientBoostingRegressor(
            n_estimators=600, learning_rate=rate, max_depth=depth, subsample=0.8, random_state=0
        )
        return model.fit(shapes, losses)

    return fit


FITS: dict[str, Fit] = {
    "additive, chosen pairs": ShapePredictor.fit,
    "additive, no pairs": lambda shapes, losses: ShapePredictor.fit(shapes, losses, pairs=False),
    "additive, monotone": lambda shapes, losses: ShapePredictor.fit(shapes, losses, monotone=True),
    "boosted trees, depth 2": trees(2, 0.05),
    "boosted trees, depth 4": trees(4, 0.03),
}


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return shapes (n, layers) and losses (n,) in nats."""
    if file.suffix == ".csv":
        table = np.genfromtxt(file, delimiter=",", names=True)
        columns = [name for name in table.dtype.names if name.startswith("layer_")]
        return np.column_stack([table[name] for name in columns]).astype(int), table["loss"]
    records = [record for record in read_records(file) if np.isfinite(record["loss"])]
    return np.array([record["shape"] for record in records]), np.array([record["loss"] for record in records])


def score(losses: np.ndarray, predicted: np.ndarray) -> list[float]:
    """Return R2 of perplexity, Spearman's and Kendall's rank correlations, and the root mean square error in nats."""
    truth, guess = np.exp(losses), np.exp(predicted)
    r2 = 1 - ((truth - guess) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    ranks = float(spearmanr(losses, predicted).statistic), float(kendalltau(losses, predicted).statistic)
    return [float(r2), *ranks, float(np.sqrt(np.mean((losses - predicted) ** 2)))]


def splits(n: int, train: int | None, repetitions: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs of training and test rows: five folds, or `train` random rows against all others."""
    pairs = []
    for seed in range(repetitions):
        order = np.random.default_rng(seed).permutation(n)
        if train is None:
            folds = [order[fold::5] for fold in range(5)]
            pairs += [(np.setdiff1d(order, fold), fold) for fold in folds]
        else:
            pairs.append((order[:train], order[train:]))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="measured shapes: a CSV file or records.jsonl")
    parser.add_argument("--repetitions", type=int, default=10, help="draws of the training rows")
    parser.add_argument("--largest", type=float, help="measured perplexity of the largest shape")
    args = parser.parse_args()
    shapes, losses = read(args.records)
    print(f"{len(shapes)} shapes of {shapes.shape[1]} layers; targets: 5-fold .95 / .98, 50 rows .90 / .95\n")
    for train, repetitions in ((None, 2), (50, args.repetitions), (100, args.repetitions), (200, args.repetitions)):
        if train is not None and train >= len(shapes) - 8:
            continue
        rows, pairs = [], splits(len(shapes), train, repetitions)
        for name, fit in FITS.items():
            start = time.perf_counter()
            scores = [
                score(losses[test], fit(shapes[rest], losses[rest]).predict(shapes[test])) for rest, test in pairs
            ]
            means = [f"{value:.3f}" for value in np.mean(scores, axis=0)]
            rows.append(
                {
                    "predictor": name,
                    **dict(zip(("R2", "Spearman", "Kendall", "rmse (nats)"), means)),
                    "seconds": f"{(time.perf_counter() - start) / len(pairs):.2f}",
                }
            )
        print(f"{'5-fold' if train is None else f'{train} training rows'}, mean of {len(pairs)} fits")
        print(text_table(rows), "\n")
    calibrate(shapes, losses, args.repetitions)
    if args.largest:
        largest = np.full((1, shapes.shape[1]), shapes.max())
        print(f"\nperplexity of the largest shape, measured {args.largest}; predicted from all rows:")
        for name, fit in FITS.items():
            print(f"  {name:24s} {np.exp(fit(shapes, losses).predict(largest)[0]):.2f}")


def calibrate(shapes: np.ndarray, losses: np.ndarray, repetitions: int) -> None:
    """Print the standard deviation of errors divided by predicted standard deviations. It is 1 if these are right."""
    for train in (50, 200):
        ratios = []
        for rest, test in splits(len(shapes), train, repetitions):
            predictor = ShapePredictor.fit(shapes[rest], losses[rest])
            errors = predictor.predict(shapes[test]) - losses[test]
            ratios.append((errors / predictor.uncertainty(shapes[test])).std())
        print(f"errors over predicted standard deviations, {train} training rows: {np.mean(ratios):.2f} (1 is right)")


if __name__ == "__main__":
    main()
