"""What a stranger or a slip of the hand could do: code in files, tokens in texts, names that lead elsewhere.

Names that could break a card are in test_card.py, symbolic links and hidden files in test_hub.py, tokens in the errors
of a push in test_hub_failures.py, and weights named outside a folder in tests/convert/test_extraction.py.
"""

import json
import logging
import pickle
import re
from io import BytesIO
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model
from huggingface_hub import EvalResult
from publishing import IGNORE_UPLOADS, contents, files
from search_folders import write_search
from test_card import HOSTILE

import supershaper_hf
from supershaper_hf import SuperShaperForMaskedLM, extract_from_folder, push_folder, save_for_hub
from supershaper_hf.model.configuration_supershaper import AUTO_MAP
from supershaper_hf.publish.family import plan_family
from supershaper_hf.publish.results import result_files
from supershaper_hf.publish.subnet import Source, read_search, write_subnet
from supershaper_hf.report.data_card import data_card
from supershaper_hf.report.findings import Findings


pytestmark = [IGNORE_UPLOADS, pytest.mark.filterwarnings("ignore:Shapes left out")]
SHAPE = [8, 0, 36]


# Nothing is loaded by pickle, and no code of a repository is run


class Hostile:
    """An object whose pickle runs code where it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def hostile(tokenizer, tmp_path):
    """The folder of a supernet whose weights, tokenizer and code would leave a trace."""
    folder, trace = tmp_path / "supernet", tmp_path / "code-ran"
    model = randomize(SuperShaperForMaskedLM(tiny_config(vocab_size=len(tokenizer))))
    save_for_hub(model, folder, tokenizer=tokenizer)
    for file in folder.glob("*.py"):
        file.write_text(f"from pathlib import Path; Path({str(trace)!r}).touch()\n")
    archive = BytesIO()
    torch.save(Hostile(trace), archive)
    (folder / "pytorch_model.bin").write_bytes(archive.getvalue())
    (folder / "evil.py").write_text(f"from pathlib import Path; Path({str(trace)!r}).touch()\n")
    for name, key, value in (
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]}),
        ("config.json", "auto_map", dict.fromkeys(AUTO_MAP, "evil.Model")),
    ):
        content = json.loads((folder / name).read_text()) | {key: value}
        (folder / name).write_text(json.dumps(content))
    torch.load(BytesIO(archive.getvalue()), weights_only=False)
    assert trace.exists()  # it would work
    trace.unlink()
    return folder, trace


def test_weights_in_a_pickle_are_refused_unread(hostile, tmp_path):
    folder, trace = hostile
    (folder / "model.safetensors").unlink()
    for load in (
        lambda: Source.load(str(folder)),
        lambda: SuperShaperForMaskedLM.from_pretrained(folder),
        lambda: extract_from_folder(folder, SHAPE, tmp_path / "subnet"),
        lambda: SuperShaperForMaskedLM.from_original(str(folder / "pytorch_model.bin"), tiny_config()),
    ):
        with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
            load()
        assert not trace.exists()


def test_publishing_runs_no_code_of_the_supernet_and_passes_none_on(hostile, tmp_path):
    folder, trace = hostile
    published = write_subnet(Source.load(str(folder)), SHAPE, tmp_path / "subnet")
    assert not trace.exists()
    assert json.loads((published / "config.json").read_text())["auto_map"] == AUTO_MAP
    own = Path(supershaper_hf.__file__).parent / "model"
    for file in published.glob("*.py"):
        assert file.read_bytes() == (own / file.name).read_bytes()
    assert "evil" not in "".join(map(str, contents(published)))
    assert "evil" not in (published / "tokenizer_config.json").read_text()


def test_source_loads_no_pickle():
    """`torch.load` reads tensors only; the pickles of processes.py are its own, made a line before."""
    found = {}
    for file in Path(supershaper_hf.__file__).parent.rglob("*.py"):
        pattern = r"torch\.load\(.*|pickle\.loads?\(.*|joblib|allow_pickle|read_pickle|np\.load\(.*"
        if lines := re.findall(pattern, file.read_text()):
            found[file.name] = lines
    assert all("weights_only=True" in line for line in found.pop("original.py"))
    assert all(line.startswith("pickle.loads(pickle.dumps(") for line in found.pop("processes.py"))
    assert found == {}


# A token is nowhere


def test_token_is_in_no_log_and_no_file(folder, server, caplog, capfd):
    server.tokens["hf_secret_of_user"] = "user"
    with caplog.at_level(logging.DEBUG):
        push_folder(folder, "user/name", token="hf_secret_of_user")
    assert caplog.records  # the client of the Hub logs its requests
    assert "secret" not in caplog.text + "".join(capfd.readouterr())
    assert not any(b"secret" in content for content in files(server).values())
    assert not any("secret" in repr(commit[1:3]) for commit in server.repos["user/name"].commits)


# Names that lead elsewhere


@pytest.mark.parametrize("task", ["../../x", "/etc/x", ".hidden", "a b\n- c: d", "sst2"])
def test_file_of_a_result_stays_in_its_folder(task):
    score = EvalResult("t", "user/data", task, "accuracy", 0.5, dataset_config=task)
    (name,) = result_files([score])
    assert re.fullmatch(r"\.eval_results/[\w-]+\.yaml", name)


@pytest.mark.parametrize("dataset", ["../../x", "user/..", "a/b/c", "http://a/b", "held-out"])
def test_a_result_on_no_data_set_of_the_hub_is_no_file(dataset):
    assert result_files([EvalResult("t", dataset, "x", "accuracy", 0.5)]) == {}


@pytest.mark.parametrize("name", ["user/..", "../user/net", "user/.net", "user/a b", "user/a\n"])
def test_name_of_a_family_is_that_of_a_repository(name, tokenizer, tmp_path):
    """Its last part also names a folder."""
    model = tiny_model()
    save_for_hub(model, tmp_path / "net")
    source = Source.load(str(tmp_path / "net"))
    search = write_search(tmp_path / "search", model)
    with pytest.raises(ValueError, match="Repo id must"):
        plan_family(source, read_search(source, search), search, name, "parameters", [1e9])


# Text of users


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_breaks_the_card_of_a_data_set(name, searched):
    cards = []
    for text in ("name", name):
        card = data_card(searched, Findings.read(searched), text, text)
        cards.append(card.split("\n---\n")[-1].split("\n"))
        code = "\n".join(cards[-1]).split("```python\n")[1].split("\n```\n")[0]
        assert code.splitlines()[-1] == f'records = load_dataset({json.dumps(text)}, split="train")'
        compile(code, "card", "exec")
    assert len(cards[0]) == len(cards[1])


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return write_search(tmp_path_factory.mktemp("parent") / "search")
