"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import supershaper_hf


MODULES = [module.name for module in pkgutil.walk_packages(supershaper_hf.__path__, "supershaper_hf.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_print_what_they_say(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
