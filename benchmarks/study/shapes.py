"""The shapes that are compared at equal size: the searched one and the hand-crafted ones."""

from typing import Any

from supershaper_hf import SearchSpace
from supershaper_hf.model.shapes import PROFILES

from .study import encoder_parameters


SHARES = (0.75, 0.60, 0.45, 0.30)  # of the parameters in the layers of the original
NUM_RANDOM = 30  # shapes that are ranked by task scores and by distance
SEARCHED, FIRST_LAYERS, RECTANGLE, MIRRORED = "searched", "first_layers", "rectangle", "mirrored_rectangle"
HAND_CRAFTED = (RECTANGLE, MIRRORED, *(name for name in PROFILES if name != RECTANGLE), FIRST_LAYERS)


def budget(original: Any, share: float, bare_parameters: int) -> int:
    """Return the number of parameters that a subnet without a head may have.

    Args:
        original: The configuration of the BERT.
        share: How much of the parameters of its layers stays.
        bare_parameters: The parameters of the BERT without a head.
    """
    layers = encoder_parameters(original)
    return int(bare_parameters - layers + share * layers)


def random_shapes(space: SearchSpace, num_shapes: int) -> list[list[int]]:
    """Return the shapes that question 6 fine-tunes all at once and question 4 ranks, evenly over sizes."""
    return space.sample(num_shapes, seed=0, distribution="budget").tolist()


def hand_crafted(space: SearchSpace, name: str, max_parameters: int) -> list[int]:
    """Return the hand-crafted shape of this name, one of `HAND_CRAFTED`, that uses up a budget.

    `named_shape` scales all layers at once. The rectangle of the released supernet for 45 % of the encoder then has 32
    % of it, and the comparison would not be at equal size. What is left goes to single layers, the last ones first; in
    the mirrored rectangle to the first ones.
    """
    if name == FIRST_LAYERS:
        return first_layers(space, max_parameters)
    if name == MIRRORED:
        return space.profile_shape(PROFILES[RECTANGLE], max_parameters)[::-1]
    return space.profile_shape(PROFILES[name], max_parameters)


def first_layers(space: SearchSpace, max_parameters: int) -> list[int]:
    """Return the first layers of the supernet at full width, and of the next one what the budget leaves.

    Whole layers alone would leave up to a sixth of the encoder unused, and the comparison would not be at equal size.
    """
    full, best = space.config.hidden_size, [0] * space.num_layers
    for kept in range(space.num_layers):
        for width in (0, *space.width_choices):
            shape = [full] * kept + [width] + [0] * (space.num_layers - kept - 1)
            if any(shape) and space.num_parameters(shape) <= max_parameters:
                best = shape
    if not any(best):
        raise ValueError(f"max_parameters={max_parameters:,} is too small for one narrow layer.")
    return best
