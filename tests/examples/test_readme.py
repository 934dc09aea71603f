"""Every Python block of the README runs as it stands, and prints what the README says it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_bert_config
from hub_server import HubServer
from transformers import BertForMaskedLM


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, flags=re.DOTALL)


@pytest.fixture
def hub_environment(tmp_path, tokenizer):
    """A Hub on loopback that holds a tiny BERT under the name the README uses."""
    with HubServer() as server:
        server.tokens |= {"hf_google": "google-bert", "hf_reader": "your-name"}
        folder = tmp_path / "bert"
        BertForMaskedLM(tiny_bert_config(vocab_size=len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        environment = server.environment(tmp_path / "cache") | {"HF_TOKEN": "hf_google"}
        upload = "import sys; from huggingface_hub import HfApi; api = HfApi(); name = 'google-bert/bert-base-cased'; "
        upload += "api.create_repo(name); api.upload_folder(repo_id=name, folder_path=sys.argv[1])"
        run([sys.executable, "-c", upload, str(folder)], environment, tmp_path)
        yield environment | {"HF_TOKEN": "hf_reader"}


def run(command, environment, folder):

    done = subprocess.run(
        command, env=os.environ | environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_has_its_blocks():
    assert len(BLOCKS) == 4


def test_options_shown_in_the_readme_are_those_of_the_example():
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    example = yaml.safe_load((ROOT / "examples" / "run.yaml").read_text(encoding="utf-8"))
    for name, value in yaml.safe_load(shown).items():
        assert value == example[name] or (isinstance(value, list) and value == example[name][: len(value)])


def test_every_file_has_its_line():
    """The way through the code names every file of the package and of the examples, and none that is not there."""
    tree = README.partition("## The way through the code")[2]
    files = {path.name for folder in ("src", "examples") for path in (ROOT / folder).rglob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"\b\w+\.py\b", tree))
    assert named == files - {"__main__.py"}


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=["ten lines", "calibration", "search", "to the Hub"])
def test_block_runs_and_prints_what_the_readme_says(code, printed, hub_environment, tmp_path):
    assert run([sys.executable, "-c", code], hub_environment, tmp_path) == printed
