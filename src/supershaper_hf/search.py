"""Find the best shape for every budget at once: the exact Pareto front of an additive predictor and an additive cost.

Parameters and operations of a subnet are sums of terms that involve a layer and the width before it, and the predicted
loss is a sum of one term per layer. So the best shape under a budget is a shortest path with a resource constraint, and
dynamic programming over the layers finds it: for each width of the last layer, keep the partial shapes that no other
partial shape ending in that width beats in both cost and loss. What is left after the last layer is the whole front.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .costs import ChainCost, flops_cost, parameter_cost
from .predictor import ShapePredictor
from .shapes import SearchSpace


@dataclass(frozen=True)
class ParetoFront:
    """The shapes that no other shape beats in both cost and predicted loss, by increasing cost.

    Attributes:
        cost_name: `"parameters"` or `"flops"`.
        shapes: (n, layers) integers.
        costs: (n,) integers, increasing.
        losses: (n,) predicted losses in nats, decreasing.
    """

    cost_name: str
    shapes: np.ndarray
    costs: np.ndarray
    losses: np.ndarray

    def __len__(self) -> int:
        return len(self.costs)

    def best(self, max_cost: float) -> list[int]:
        """Return the shape with the lowest predicted loss that costs at most `max_cost`.

        Raises:
            ValueError: If even the cheapest shape costs more.
        """
        count = int(np.searchsorted(self.costs, max_cost, side="right"))
        if count == 0:
            raise ValueError(
                f"max_cost={max_cost:,.0f} {self.cost_name} is below the smallest subnet, which has "
                f"{self.costs[0]:,} {self.cost_name}. Raise the budget."
            )
        return self.shapes[count - 1].tolist()

    def table(self) -> list[dict[str, Any]]:
        """Return one record per point: `shape`, the cost by its name, predicted `loss` and `perplexity`."""
        return [
            {"shape": shape.tolist(), self.cost_name: int(cost), "loss": float(loss), "perplexity": float(np.exp(loss))}
            for shape, cost, loss in zip(self.shapes, self.costs, self.losses)
        ]


@dataclass(frozen=True)
class _Partial:
    """Non-dominated partial shapes that end in one width; `parent` points into the partial shapes one layer before."""

    costs: np.ndarray
    losses: np.ndarray
    parent_width: np.ndarray
    parent_index: np.ndarray


def pareto_front(
    space: SearchSpace, predictor: ShapePredictor, cost: str = "parameters", sequence_length: int = 128
) -> ParetoFront:
    """Return the exact Pareto front of `cost` against the predicted loss over all shapes of `space`.

    Args:
        space: The search space; no layer is dropped.
        predictor: Fitted on this space's widths.
        cost: `"parameters"` or `"flops"`.
        sequence_length: Tokens per sequence, for FLOPs.

    Raises:
        ValueError: If the cost is unknown, or the predictor was fitted on another space.
    """
    if cost not in ("parameters", "flops"):
        raise ValueError(f"Unknown cost {cost!r}. Allowed: 'parameters', 'flops'.")
    choices = np.array(space.width_choices)
    if predictor.width_choices != choices.tolist() or len(predictor.effects) != space.num_layers:
        raise ValueError(
            f"The predictor was fitted on {len(predictor.effects)} layers with the widths {predictor.width_choices}, "
            f"but the search space has {space.num_layers} layers with the widths {choices.tolist()}. Measure shapes "
            "that use every width, and fit again."
        )
    terms = parameter_cost(space.config) if cost == "parameters" else flops_cost(space.config, sequence_length)
    layers = list(_extend(terms, choices, space.config.hidden_size, predictor))
    last = [
        _Partial(end.costs + terms.leave(width), end.losses, np.full(len(end.costs), i), np.arange(len(end.costs)))
        for i, (width, end) in enumerate(zip(choices, layers[-1]))
    ]
    front = _non_dominated(last)
    return ParetoFront(
        cost, choices[_trace(layers, front)], front.costs + terms.fixed, front.losses + predictor.intercept
    )


def _extend(
    terms: ChainCost, choices: np.ndarray, hidden_size: int, predictor: ShapePredictor
) -> Iterator[list[_Partial]]:
    """Yield, layer by layer, the non-dominated partial shapes for each width of that layer."""
    start = _Partial(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    before: list[tuple[int, _Partial]] = [(hidden_size, start)]
    for effects in predictor.effects:
        layer = []
        for width, effect in zip(choices, effects):
            candidates = [
                _Partial(
                    partial.costs + terms.enter(source, width) + terms.layer(width),
                    partial.losses + effect,
                    np.full(len(partial.costs), i),
                    np.arange(len(partial.costs)),
                )
                for i, (source, partial) in enumerate(before)
            ]
            layer.append(_non_dominated(candidates))
        yield layer
        before = list(zip(choices.tolist(), layer))


def _non_dominated(candidates: list[_Partial]) -> _Partial:
    """Merge candidates and keep those with a lower loss than everything cheaper."""
    costs = np.concatenate([candidate.costs for candidate in candidates])
    losses = np.concatenate([candidate.losses for candidate in candidates])
    order = np.lexsort((losses, costs))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    kept = order[losses[order] < best_before]
    parent_width = np.concatenate([candidate.parent_width for candidate in candidates])
    parent_index = np.concatenate([candidate.parent_index for candidate in candidates])
    return _Partial(costs[kept], losses[kept], parent_width[kept], parent_index[kept])


def _trace(layers: list[list[_Partial]], front: _Partial) -> np.ndarray:
    """Follow the parents of the front's points back to the first layer: (n, layers) indices into the width choices."""
    width, index = front.parent_width, front.parent_index
    columns = [width]
    for layer in reversed(layers[1:]):
        parents = [(partial.parent_width, partial.parent_index) for partial in layer]
        width, index = (
            np.array([parents[w][0][i] for w, i in zip(width, index)]),
            np.array([parents[w][1][i] for w, i in zip(width, index)]),
        )
        columns.append(width)
    return np.column_stack(columns[::-1])
