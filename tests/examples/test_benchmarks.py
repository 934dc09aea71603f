"""The benchmarks can be started, and the documents name options that they have."""

import importlib
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *BENCHMARKS]


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_benchmark_finds_what_it_imports(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)  # some benchmarks import each other
    for other in BENCHMARKS:  # `evaluate` is also a library
        monkeypatch.delitem(sys.modules, other.stem, raising=False)
    assert callable(importlib.import_module(file.stem).main)
    for other in BENCHMARKS:
        sys.modules.pop(other.stem, None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_commands_name_options_that_exist(document):
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for script, rest in re.findall(r"python (benchmarks/\w+\.py)([^\n`#]*)", text):
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [option for option in re.findall(r"--\w+", rest) if f'"{option}"' not in source] == []
