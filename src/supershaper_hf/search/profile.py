"""What good shapes have in common: a profile of relative widths, and how much each layer matters.

The SuperShaper paper (arXiv 2110.04711) derives a heuristic from the shapes that its search found: first layer at the
mean width, layers 2-4 narrow, the last layers wide. Here the profile is the mean over the exact Pareto front of this
supernet. Its uncertainty comes from predictors that fit the measurements about as well (`ShapePredictor.draw`): each
has a front and a profile of its own.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..checks import check_count
from ..model.shapes import SearchSpace
from .measures import MEASURES
from .pareto import ParetoFront, pareto_front, shapes_at
from .predictor import ShapePredictor


NARROW, WIDE = 0.85, 1.15  # a relative width between these two is called "at the mean"
NEVER_DROPPED = 1e-6  # relative width that stands for 0, so that such a layer gets the smallest width choice
MIDDLE = (0.1, 0.9)  # part of the range of parameters that counts: at both ends, shapes are nearly rectangles


@dataclass(frozen=True)
class Profile:
    """The profile of the shapes on the Pareto front, first layer first.

    Attributes:
        widths: (layers,) width of each layer over the mean width of its shape, averaged over budgets.
        width_deviations: (layers,) standard deviations of `widths` over drawn predictors.
        importances: (layers,) what is measured, at the layer's smallest width minus that at its largest.
        importance_deviations: (layers,) standard deviations of `importances` over drawn predictors.
        measure: What the importances are parts of, `"loss"`, `"distance"` or `"task_loss"`.
    """

    widths: np.ndarray
    width_deviations: np.ndarray
    importances: np.ndarray
    importance_deviations: np.ndarray
    measure: str = "loss"

    def sentence(self) -> str:
        """Return in words which layers are narrow, at the mean and wide, and which one matters most."""
        words = ["narrow" if width < NARROW else "wide" if width > WIDE else "at the mean" for width in self.widths]
        parts, layer = [], 0
        for word, group in groupby(words):
            count = len(list(group))
            mean = self.widths[layer : layer + count].mean()
            which = f"layer {layer + 1}" if count == 1 else f"layers {layer + 1}-{layer + count}"
            parts.append(f"{which} {word} ({mean:.2f})")
            layer += count
        unit = MEASURES[self.measure].unit or f" of {self.measure.replace('_', ' ')}"
        most, least = int(self.importances.argmax()), int(self.importances.argmin())
        return (
            f"Good shapes have {', '.join(parts)}; widest is layer {self.widths.argmax() + 1}. Layer {most + 1} "
            f"matters most ({self.importances[most]:.3f} ± {self.importance_deviations[most]:.3f}{unit} from its "
            f"smallest width to its largest), layer {least + 1} least ({self.importances[least]:.3f} ± "
            f"{self.importance_deviations[least]:.3f})."
        )

    def shape(self, space: SearchSpace, max_parameters: int) -> list[int]:
        """Return the shape with about this profile that uses up a budget of parameters.

        No layer is dropped: one that all good shapes drop gets the smallest width. See `SearchSpace.profile_shape`.

        Raises:
            ValueError: If even the smallest shape with this profile exceeds the budget.
        """
        return space.profile_shape(np.maximum(self.widths, NEVER_DROPPED).tolist(), max_parameters)


def derive_profile(
    space: SearchSpace, predictor: ShapePredictor, num_draws: int = 20, num_budgets: int = 50, seed: int = 0
) -> Profile:
    """Derive the profile of good shapes from a predictor that was fitted on measured shapes.

    Args:
        space: The search space.
        predictor: A predictor that was fitted on shapes of this space.
        num_draws: Number of predictors, at least 2, that are drawn for the deviations.
        num_budgets: Number of budgets, evenly spaced in parameters, that the profile is averaged over.
        seed: Random seed of the draws.

    Raises:
        ValueError: If the predictor was not fitted, or was fitted on another space, or a number is too small.

    Example:
        >>> from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperConfig
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=4, vocab_size=50)
        >>> space = SearchSpace.from_config(config)
        >>> shapes = space.sample(40, seed=0)
        >>> losses = 4 - shapes @ [0.002, 0.001, 0.004, 0.008]  # the last layer matters most
        >>> profile = derive_profile(space, ShapePredictor.fit(shapes, losses), num_draws=4, num_budgets=8)
        >>> profile.widths.round(1)
        array([0.7, 0.4, 1.2, 1.7])
        >>> profile.shape(space, max_parameters=1_500_000)
        [40, 24, 56, 96]
    """
    check_count("num_draws", num_draws, least=2)
    check_count("num_budgets", num_budgets)
    shapes = space.sample(256, seed=(seed, 0))
    drawn = predictor.draw(num_draws, seed=(seed, 1))
    widths = [_mean_profile(pareto_front(space, each), num_budgets) for each in drawn]
    importances = [_importances(space, each, shapes) for each in drawn]
    return Profile(
        _mean_profile(pareto_front(space, predictor), num_budgets),
        np.std(widths, axis=0, ddof=1),
        _importances(space, predictor, shapes),
        np.std(importances, axis=0, ddof=1),
        predictor.measure,
    )


def _mean_profile(front: ParetoFront, num_budgets: int) -> np.ndarray:
    """Return the relative widths (layers,), averaged over the best shapes for `num_budgets` budgets."""
    shapes = shapes_at(front, num_budgets, MIDDLE)
    return (shapes / shapes.mean(axis=1, keepdims=True)).mean(axis=0)


def _importances(space: SearchSpace, predictor: ShapePredictor, shapes: np.ndarray) -> np.ndarray:
    """Return by how much the prediction falls (layers,) when one layer alone is widened, averaged over `shapes`."""
    gains = []
    for layer in range(space.num_layers):
        narrow, wide = shapes.copy(), shapes.copy()
        narrow[:, layer], wide[:, layer] = space.width_choices[0], space.width_choices[-1]
        gains.append((predictor.predict(narrow) - predictor.predict(wide)).mean())
    return np.array(gains)
