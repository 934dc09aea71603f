"""The public names, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_bert_config, tiny_model
from transformers import BertForMaskedLM

import supershaper_hf


def test_type_checkers_see_what_is_imported_when_it_is_used():
    """The `TYPE_CHECKING` block and the table `LAZY` say the same."""
    tree = ast.parse(Path(supershaper_hf.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    imported = {alias.asname: node.module for node in block.body for alias in node.names}
    assert imported == supershaper_hf.LAZY
    assert all(alias.name == alias.asname for node in block.body for alias in node.names)


@pytest.mark.parametrize("name", supershaper_hf.__all__)
def test_public_name_is_there(name):
    value = getattr(supershaper_hf, name)
    if name != "SHAPE_NAMES":  # a list knows neither its name nor its module
        assert value.__name__ == name
        assert value.__module__.startswith("supershaper_hf.")
    assert name in dir(supershaper_hf)


def test_names_are_listed_once_and_others_are_refused():
    assert len(set(supershaper_hf.__all__)) == len(supershaper_hf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sample_config'"):
        supershaper_hf.sample_config  # noqa: B018


WHAT_LOADING_IMPORTS = """
import sys
import torch
from transformers import AutoModelForMaskedLM

def imported_by_loading(folder):
    AutoModelForMaskedLM.from_pretrained(folder)(torch.ones(1, 4, dtype=torch.long))
    return {name.partition(".")[0] for name in sys.modules}

with_transformers = imported_by_loading(sys.argv[1])
import supershaper_hf
print(*sorted(imported_by_loading(sys.argv[2]) - with_transformers - set(sys.stdlib_module_names)))
"""


def test_loading_a_subnet_imports_no_more_than_loading_a_bert(tmp_path):
    """It imports no matplotlib, scipy, datasets, pandas or accelerate unless transformers does."""
    BertForMaskedLM(tiny_bert_config()).save_pretrained(tmp_path / "bert")
    tiny_model().extract_subnet([8, 0, 36]).save_pretrained(tmp_path / "subnet")
    command = [sys.executable, "-c", WHAT_LOADING_IMPORTS, tmp_path / "bert", tmp_path / "subnet"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["supershaper_hf"]
