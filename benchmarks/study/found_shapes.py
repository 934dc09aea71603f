"""What question 4 has measured, out of the rows of `shape_search.py`; and the names in them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from supershaper_hf.files import read_json

from .shapes import HAND_CRAFTED, SEARCHED
from .study import FORMAT, STS, Row, mean_and_spread


QUESTION = "shape_search"
BUDGET_SHARES = (0.60, 0.45, 0.30)  # of the encoder: the budgets at which shapes are compared
MEASURED, EVOLUTIONARY, HEURISTIC = "searched_and_measured", "evolutionary", "heuristic"
NAMES = (SEARCHED, MEASURED, EVOLUTIONARY, HEURISTIC, *HAND_CRAFTED)
PARTS = "parts"  # rows with the figures of a shape on each part of the text
BUDGETS = "budgets"  # rows with what is predicted at many budgets
DISTANCE, ALL_LAYERS = "distance", "all_layers"  # in the last layer; in all layers, which subnets do not have
FIGURES = {ALL_LAYERS: "distance in all layers", DISTANCE: "distance", "cosine": "cosine", STS: "STS"}

Key = tuple[int, ...]  # a shape


class FoundShapes:
    """What the file of results holds, by kind of row."""

    def __init__(self, folder: Path) -> None:
        content = read_json(folder / f"{QUESTION}.json", FORMAT)
        self.settings, self.machine, rows = content["settings"], content["machine"], content["rows"]
        self.shapes = {(row["share"], row["name"]): row for row in rows if row["kind"] == "shape"}
        self.inherited = {tuple(row["shape"]): row for row in rows if row["kind"] == "inherited"}
        self.parts = {tuple(row["shape"]): row for row in rows if row["kind"] == PARTS}
        self.budgets = [row for row in rows if row["kind"] == BUDGETS]
        self.held_out = [row for row in rows if row["kind"] == "held_out"]
        self.original = next((row for row in rows if row["kind"] == "original"), None)
        self.trained = best_rates([row for row in rows if row["kind"] == "trained"])

    def values(self, share: float, name: str, figure: str, trained: bool) -> list[float]:
        """Return a figure of a shape: as it was cut out, or after training with each seed. It may be missing."""
        row = self.shapes.get((share, name))
        if row is None:
            return []
        key = tuple(row["shape"])
        rows = self.trained.get(key, []) if trained else [self.inherited[key]] if key in self.inherited else []
        return [row[figure] for row in rows if figure in row]

    def same(self, share: float, first: str, second: str) -> bool:
        """Return whether two names mean the same shape."""
        return bool(self.shapes[share, first]["shape"] == self.shapes[share, second]["shape"])

    def error(self, share: float, first: str, second: str, figure: str) -> float | None:
        """Return twice the standard error of the difference between two inherited shapes.

        It is that of paired differences, one for each part of the text; `None` if they were not measured.
        """
        pair = [self.parts.get(tuple(self.shapes[share, name]["shape"]), {}).get(figure) for name in (first, second)]
        if None in pair:
            return None
        differences = np.subtract(*pair)
        return 2 * float(differences.std(ddof=1)) / len(differences) ** 0.5

    def spread(self, figure: str) -> float | None:
        """Return the largest standard deviation of a figure over seeds; `None` if nothing has several seeds."""
        known = [[row[figure] for row in rows if figure in row] for rows in self.trained.values()]
        spreads = [mean_and_spread(values)[1] for values in known if values]
        return max((spread for spread in spreads if spread is not None), default=None)


def best_rates(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """Return the rows of each trained shape, of that learning rate whose mean distance is the lowest."""
    found: dict[Key, dict[float, list[Row]]] = {}
    for row in rows:
        found.setdefault(tuple(row["shape"]), {}).setdefault(row["rate"], []).append(row)
    return {
        shape: min(of.values(), key=lambda own: mean_and_spread([row["distance"] for row in own])[0])
        for shape, of in found.items()
    }
