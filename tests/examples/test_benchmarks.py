"""Every benchmark can be imported, so that none is left behind when a name changes. None is run here."""

import importlib
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(file.stem for file in BENCHMARKS.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_can_be_imported_and_says_what_it_measures(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # where Python looks when it runs the script
    for each in NAMES:  # some import each other
        monkeypatch.delitem(sys.modules, each, raising=False)
    script = importlib.import_module(name)
    assert Path(script.__file__) == BENCHMARKS / f"{name}.py"
    assert script.__doc__
    assert callable(script.main)
    for each in NAMES:
        sys.modules.pop(each, None)
