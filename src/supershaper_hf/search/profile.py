"""What good shapes have in common: a profile of relative widths, and how much each layer matters.

The paper read its heuristic ("first layer at the mean, layers 2-4 narrow, the top wide") off the shapes its search had
found. Here it is the mean over the exact Pareto front, for this supernet, with its uncertainty: predictors drawn from
what the measurements leave open have other fronts, and those other profiles.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..model.shapes import SearchSpace
from .pareto import ParetoFront, pareto_front, shapes_at
from .predictor import ShapePredictor


NARROW, WIDE = 0.85, 1.15  # relative widths between these are "at the mean"
NEVER_DROPPED = 1e-6  # relative width of a layer that all good shapes drop: scaled last of all
MIDDLE = (0.1, 0.9)  # part of the range of parameters that the profile is read off: the ends are nearly rectangles


@dataclass(frozen=True)
class Profile:
    """The profile of the shapes on the Pareto front, first layer first.

    Attributes:
        widths: (layers,) width relative to the mean width of the shape, averaged over budgets.
        width_deviations: (layers,) standard deviations, from what the measurements leave open.
        importances: (layers,) by how many nats the loss falls from the layer's smallest width to its largest.
        importance_deviations: (layers,) standard deviations.
    """

    widths: np.ndarray
    width_deviations: np.ndarray
    importances: np.ndarray
    importance_deviations: np.ndarray

    def sentence(self) -> str:
        """Say in words which layers are narrow, at the mean and wide, and which matters most."""
        words = ["narrow" if width < NARROW else "wide" if width > WIDE else "at the mean" for width in self.widths]
        parts, layer = [], 0
        for word, group in groupby(words):
            count = len(list(group))
            mean = self.widths[layer : layer + count].mean()
            which = f"layer {layer + 1}" if count == 1 else f"layers {layer + 1}-{layer + count}"
            parts.append(f"{which} {word} ({mean:.2f})")
            layer += count
        most, least = int(self.importances.argmax()), int(self.importances.argmin())
        return (
            f"Good shapes have {', '.join(parts)}; widest is layer {self.widths.argmax() + 1}. Layer {most + 1} "
            f"matters most ({self.importances[most]:.3f} ± {self.importance_deviations[most]:.3f} nats from its "
            f"smallest width to its largest), layer {least + 1} least ({self.importances[least]:.3f} ± "
            f"{self.importance_deviations[least]:.3f})."
        )

    def shape(self, space: SearchSpace, max_parameters: int) -> list[int]:
        """Return the largest shape with this profile within a budget: see `SearchSpace.profile_shape`.

        No layer is dropped: one that all good shapes drop has the smallest width.
        """
        return space.profile_shape(np.maximum(self.widths, NEVER_DROPPED).tolist(), max_parameters)


def derive_profile(
    space: SearchSpace, predictor: ShapePredictor, draws: int = 20, num_budgets: int = 50, seed: int = 0
) -> Profile:
    """Derive the profile of good shapes from a predictor that was fitted on measured shapes.

    Args:
        space: The search space.
        predictor: Fitted, since its uncertainty is used.
        draws: Number of drawn predictors that the deviations come from; at least 2.
        num_budgets: Number of budgets, at least 1, evenly spaced in parameters, that the profile is averaged over.
        seed: Of the draws.

    Raises:
        ValueError: If the predictor was not fitted, or on another space, or `draws` or `num_budgets` is too small.

    Example:
        >>> profile = derive_profile(space, ShapePredictor.fit(shapes, losses))  # doctest: +SKIP
        >>> print(profile.sentence())  # doctest: +SKIP
        Good shapes have layer 1 at the mean (0.96), layers 2-4 narrow (0.70), ...
        >>> profile.shape(space, max_parameters=63_000_000)  # doctest: +SKIP
    """
    if draws < 2 or num_budgets < 1:
        raise ValueError(
            f"draws={draws} must be at least 2, for a deviation, and num_budgets={num_budgets} at least 1."
        )
    shapes = space.sample(256, seed=(seed, 0))
    drawn = predictor.draw(draws, seed=(seed, 1))
    widths = [_mean_profile(pareto_front(space, each), num_budgets) for each in drawn]
    importances = [_importances(space, each, shapes) for each in drawn]
    return Profile(
        _mean_profile(pareto_front(space, predictor), num_budgets),
        np.std(widths, axis=0, ddof=1),
        _importances(space, predictor, shapes),
        np.std(importances, axis=0, ddof=1),
    )


def _mean_profile(front: ParetoFront, num_budgets: int) -> np.ndarray:
    shapes = shapes_at(front, num_budgets, MIDDLE)
    return (shapes / shapes.mean(axis=1, keepdims=True)).mean(axis=0)


def _importances(space: SearchSpace, predictor: ShapePredictor, shapes: np.ndarray) -> np.ndarray:
    """Return by how much widening each layer alone lowers the loss (layers,), averaged over the others in `shapes`."""
    gains = []
    for layer in range(space.num_layers):
        narrow, wide = shapes.copy(), shapes.copy()
        narrow[:, layer], wide[:, layer] = space.width_choices[0], space.width_choices[-1]
        gains.append((predictor.predict(narrow) - predictor.predict(wide)).mean())
    return np.array(gains)
