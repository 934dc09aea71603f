"""Every Python block of the README and of the guide runs as it stands, and prints what they say it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_bert_config
from hub_server import HubServer
from transformers import BertForMaskedLM, BertModel

from supershaper_hf import SuperShaperConfig
from supershaper_hf.publish.sentences import sentence_encoder_files, write_files


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README + GUIDE, flags=re.DOTALL)

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
MODELS = {"google-bert/bert-base-cased": BertForMaskedLM, ENCODER: BertModel}
UPLOAD = """
import sys
from huggingface_hub import HfApi

for name in sys.argv[1:]:
    api = HfApi(token=f"hf_{name}")
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=name)
"""


@pytest.fixture
def hub_environment(tmp_path, tokenizer):
    """A Hub on loopback that holds tiny BERTs under the names the README uses."""
    with HubServer() as server:
        server.tokens |= {"hf_reader": "your-name"} | {f"hf_{name}": name.split("/")[0] for name in MODELS}
        for name, model_class in MODELS.items():
            model_class(tiny_bert_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        files = sentence_encoder_files(SuperShaperConfig(), tokenizer, "mean", normalize=True, max_seq_length=256)
        write_files(tmp_path / ENCODER, files)
        environment = server.environment(tmp_path / "cache")
        run([sys.executable, "-c", UPLOAD, *MODELS], environment, tmp_path)
        yield environment | {"HF_TOKEN": "hf_reader"}


def run(command, environment, folder):

    done = subprocess.run(
        command, env=os.environ | environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_have_their_blocks():
    assert len(BLOCKS) == 5


def test_options_shown_in_the_guide_are_those_of_the_example():
    (shown,) = re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.DOTALL)
    example = yaml.safe_load((ROOT / "examples" / "run.yaml").read_text(encoding="utf-8"))
    for name, value in yaml.safe_load(shown).items():
        assert value == example[name] or (isinstance(value, list) and value == example[name][: len(value)])


def test_every_file_has_its_line():
    """The way through the code names every file of the package and of the examples, and none that is not there."""
    tree = README.partition("## The way through the code")[2]
    files = {path.name for folder in ("src", "examples") for path in (ROOT / folder).rglob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"\b\w+\.py\b", tree))
    assert named == files - {"__main__.py"}


@pytest.mark.parametrize(
    ("code", "printed"), BLOCKS, ids=["ten lines", "search", "to the Hub", "calibration", "sentences"]
)
def test_block_runs_and_prints_what_is_written(code, printed, hub_environment, tmp_path):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    assert run([sys.executable, "-c", code], hub_environment, tmp_path) == printed
