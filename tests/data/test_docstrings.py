import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["documents", "sequences", "batches"])
def test_examples_in_docstrings_run(name):
    found = doctest.testmod(import_module(f"supershaper_hf.data.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
