"""Checks of arguments that several wings share. Each error names the argument, its value and what is allowed."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np


def check_count(name: str, count: Any, least: int = 1) -> None:
    """Raise a ValueError unless `count` is an integer of Python or NumPy and at least `least`.

    Example:
        >>> check_count("max_steps", 0)
        Traceback (most recent call last):
        ValueError: max_steps=0 must be an integer of at least 1.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < least:
        raise ValueError(f"{name}={count!r} must be an integer of at least {least}.")


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise a ValueError unless `value` is a finite number of Python or NumPy, and within the bounds.

    Args:
        name: Name of the argument, for the message.
        value: Its value.
        least: Smallest allowed value.
        above: Exclusive lower bound.
        most: Largest allowed value.
        below: Exclusive upper bound.

    Example:
        >>> check_number("learning_rate", -1.0, above=0)
        Traceback (most recent call last):
        ValueError: learning_rate=-1.0 must be a finite number above 0.
    """
    if _is_finite(value) and least <= value <= most and above < value < below:
        return
    bounds = [
        f"{word} {bound}"
        for word, bound in (("at least", least), ("above", above), ("at most", most), ("below", below))
        if math.isfinite(bound)
    ]
    raise ValueError(f"{name}={value!r} must be a finite number{' ' * bool(bounds)}{' and '.join(bounds)}.")


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is larger than every float
        return False


def check_widths(name: str, widths: Any, least: int = 1) -> None:
    """Raise a ValueError unless `widths` are strictly increasing integers from `least` to below 2**31.

    Example:
        >>> check_widths("width_choices", [120, 240, 240])
        Traceback (most recent call last):
        ValueError: width_choices=[120, 240, 240] must be strictly increasing integers of at least 1.
    """
    integers = isinstance(widths, (list, tuple, np.ndarray)) and all(
        isinstance(width, (int, np.integer)) and not isinstance(width, bool) for width in widths
    )
    if (
        not integers
        or len(widths) == 0
        or widths[0] < least
        or widths[-1] >= 2**31
        or any(wider <= width for width, wider in pairwise(widths))
    ):
        raise ValueError(f"{name}={widths!r} must be strictly increasing integers of at least {least}.")


def as_numbers(name: str, values: Any) -> np.ndarray:
    """Return a number, or nested lists of numbers, as a float64 array.

    Raises:
        ValueError: If anything in it is text, a truth value or None, or if rows have different lengths.

    Example:
        >>> as_numbers("losses", ["2.5", "2.6"])
        Traceback (most recent call last):
        ValueError: losses must be numbers, got an array of the NumPy type <U3.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} must be numbers in rows of equal length.") from None
    if array.size == 0:
        return array.astype(np.float64)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be numbers, got an array of the NumPy type {array.dtype}.")
    return array.astype(np.float64)


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`.

    Example:
        >>> check_choice("sampling", "everything", ["sandwich", "random", "fixed"])
        Traceback (most recent call last):
        ValueError: sampling='everything' is unknown. Allowed: 'sandwich', 'random', 'fixed'.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown. Allowed: {', '.join(map(repr, allowed))}.")


def load_pretrained(option: str, name: str, load: Callable[[str], Any]) -> Any:
    """Call `load`, such as `AutoModel.from_pretrained`, with the name of a model, and explain the error if it has none.

    Args:
        option: The option that holds the name, for the message.
        name: Folder or Hub id of a model.
        load: Function of the name.

    Raises:
        FileNotFoundError: If `name` is neither a folder here nor a model of the Hub that can be loaded.
        OSError: If `name` is a folder that `load` cannot load.

    Example:
        >>> from transformers import AutoConfig
        >>> load_pretrained("--model", "no/such/folder", AutoConfig.from_pretrained)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: --model no/such/folder: there is no such folder here, and no such model could be loaded ...
    """
    try:
        return load(name)
    except OSError as error:
        if Path(name).exists():
            raise OSError(f"{option} {name}: this folder holds no model that can be loaded: {error}") from error
        raise FileNotFoundError(
            f"{option} {name}: there is no such folder here, and no such model could be loaded from the Hub: {error}"
        ) from error
