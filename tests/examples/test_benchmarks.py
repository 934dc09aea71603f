"""Every benchmark can be imported and has the options that the documentation names. None is run here.

So none is left behind when a name changes.
"""

import importlib
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted(file.stem for file in BENCHMARKS.glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *BENCHMARKS.glob("*.py")]


def documented_options(name):
    """The options in the commands that run a benchmark. A command ends with its line, or with a backtick."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in DOCUMENTS).replace("\\\n", " ")
    commands = re.findall(rf"python benchmarks/{name}\.py([^`\n]*)", text)
    return {option for command in commands for option in re.findall(r"--\w+", command)}


def test_options_are_found_in_the_documentation():
    assert {"--model", "--text", "--num_shapes"} <= documented_options("rounds")


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_has_the_options_that_the_documentation_names(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)  # where Python looks when it runs the script
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    modules = set(sys.modules)
    script = importlib.import_module(name)
    try:
        assert Path(script.__file__) == BENCHMARKS / f"{name}.py"
        with pytest.raises(SystemExit, match="0"):
            script.main()
        printed = capsys.readouterr().out
        assert documented_options(name) <= set(re.findall(r"--\w+", printed))
        assert script.__doc__.splitlines()[0] in printed
    finally:
        for each in set(NAMES).difference(modules):  # some import each other, and other tests may use these names
            sys.modules.pop(each, None)
