"""Checks of arguments that several rooms share."""

from typing import Any

import numpy as np


def check_count(name: str, count: Any, least: int = 1) -> None:
    """Raise a ValueError unless `count` is an integer, of Python or NumPy, of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < least:
        raise ValueError(f"{name}={count!r} must be an integer of at least {least}.")
