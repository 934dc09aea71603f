"""A wrong argument is refused with its name, its value and what is allowed."""

import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from supershaper_hf import SuperShaperModel
from supershaper_hf.checks import check_choice, check_count, check_number, load_pretrained


NOT_NUMBERS = [None, True, np.True_, "3", 1j, [3], np.array([3]), torch.tensor(3), Decimal(3), math.nan, math.inf]


@pytest.mark.parametrize("count", [1, 7, 10**30, np.int64(3), np.uint8(3)])
def test_counts_are_accepted(count):
    check_count("count", count)


@pytest.mark.parametrize("count", [*NOT_NUMBERS, 0, -1, 3.0, np.float64(3), np.int64(0)])
def test_what_is_no_count_is_refused(count):
    with pytest.raises(ValueError, match=re.escape(f"count={count!r} must be an integer of at least 1.")):
        check_count("count", count)


def test_least_count_can_be_chosen():
    check_count("count", 0, least=0)
    with pytest.raises(ValueError, match=r"count=1 must be an integer of at least 2\."):
        check_count("count", 1, least=2)


@pytest.mark.parametrize("value", [0, -1.5, 1e308, 5e-324, np.float32(0.5), np.int64(-3)])
def test_finite_numbers_are_accepted(value):
    check_number("value", value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -math.inf, np.float32("nan"), 10**400])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match=re.escape(f"value={value!r} must be a finite number.")):
        check_number("value", value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        ({"least": 0}, [0, 1], [-1e-9], "at least 0"),
        ({"above": 0}, [1e-9], [0, -1], "above 0"),
        ({"most": 63_000_000}, [63_000_000], [63_000_001], "at most 63000000"),
        ({"below": 1}, [0.999], [1], "below 1"),
        ({"least": 0, "below": 0.5}, [0, 0.25], [-1, 0.5], "at least 0 and below 0.5"),
        ({"above": -1, "most": 1}, [1, 0], [-1, 2], "above -1 and at most 1"),
    ],
)
def test_bounds_are_kept_and_named(bounds, inside, outside, words):
    for value in inside:
        check_number("value", value, **bounds)
    for value in [*outside, math.nan]:
        with pytest.raises(ValueError, match=re.escape(f"value={value!r} must be a finite number {words}.")):
            check_number("value", value, **bounds)


@pytest.mark.parametrize("value", ["c", "", None, ["a"], 1])
def test_unknown_choice_is_refused(value):
    check_choice("name", "a", ("a", "b"))
    with pytest.raises(ValueError, match=re.escape(f"name={value!r} is unknown. Allowed: 'a', 'b'.")):
        check_choice("name", value, iter(["a", "b"]))


@pytest.mark.parametrize("option", ["--model", "teacher"])
def test_model_that_is_missing_is_named_with_its_option(option, tmp_path):
    missing = f"{option} outputs/famly/last: there is no such folder here, and no such model could be loaded from the"
    with pytest.raises(FileNotFoundError, match=re.escape(missing)):
        load_pretrained(option, "outputs/famly/last", AutoConfig.from_pretrained)
    with pytest.raises(OSError, match=re.escape(f"{option} {tmp_path}: this folder holds no model")) as caught:
        load_pretrained(option, str(tmp_path), SuperShaperModel.from_pretrained)
    assert not isinstance(caught.value, FileNotFoundError)
    assert load_pretrained(option, "name", str.upper) == "NAME"
