"""Every Python block of the README runs as it stands, and prints what the README says it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_bert_config
from hub_server import HubServer
from transformers import BertForMaskedLM


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
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
    assert len(BLOCKS) == 3


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=["ten lines", "to the Hub", "search"])
def test_block_runs_and_prints_what_the_readme_says(code, printed, hub_environment, tmp_path):
    assert run([sys.executable, "-c", code], hub_environment, tmp_path) == printed
