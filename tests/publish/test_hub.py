"""What is published is complete, loads anywhere, or is not there at all.

The real client of the Hub runs against `hub_server.py`. In this process `point_client_at` sends it there; other
processes get `HubServer.environment`.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import SPECIAL_TOKENS, WORDS, assert_same, run, tiny_model
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import http_backoff
from transformers import AutoModelForMaskedLM, BertTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from supershaper_hf import SuperShaperForMaskedLM, SuperShaperForMultipleChoice, SuperShaperForQuestionAnswering
from supershaper_hf.model.configuration_supershaper import AUTO_MAP
from supershaper_hf.publish.hub import model_card, push_folder, push_to_hub, save_for_hub


# httpx2 warns of how huggingface_hub 2.4 hands it the bytes of an LFS upload; neither is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SHAPE = [8, 0, 36]
CODE = {"configuration_supershaper.py", "elastic.py", "modeling_supershaper.py"}
MODEL_FILES = {"README.md", "config.json", "model.safetensors"} | CODE
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
FIRST, PUBLISHED = "initial commit", "Upload model with supershaper-hf"


@contextmanager
def point_client_at(server, cache):
    """Let this process's client use `server` as its user, with an empty cache and without the retries after a 5xx."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setitem(http_backoff.__kwdefaults__, "max_retries", 0)
        patch.setenv("HF_TOKEN", server.token)
        patch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()  # the next one reads NO_PROXY
        yield
        huggingface_hub.close_session()


@pytest.fixture
def server(tmp_path):
    with HubServer() as server, point_client_at(server, tmp_path / "cache"):
        yield server


@pytest.fixture
def subnet():
    return tiny_model().extract_subnet(SHAPE)


@pytest.fixture
def folder(subnet, tokenizer, tmp_path):
    return save_for_hub(subnet, tokenizer, tmp_path / "name", repo_id="user/name")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(server, repo_id="user/name", revision="main"):
    """What was published: every file but the one that the Hub itself puts into a new repository."""
    return {path: data for path, data in server.repos[repo_id].files(revision).items() if path != ".gitattributes"}


def titles(server, repo_id="user/name"):
    """Titles of all commits, on every branch; none if there is no repository."""
    return [commit.message for commit in server.repos[repo_id].commits] if repo_id in server.repos else []


def stored_parameters(weights):
    return sum(tensor.numel() for tensor in safetensors.torch.load(weights).values())


# The folder


def test_saved_folder_is_complete(folder, subnet):
    assert set(contents(folder)) == MODEL_FILES | TOKENIZER_FILES
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_same(SuperShaperForMaskedLM.from_pretrained(folder).state_dict(), subnet.state_dict(), atol=0)


def test_tokenizer_can_be_left_out(subnet, tmp_path):
    assert set(contents(save_for_hub(subnet, None, tmp_path / "subnet"))) == MODEL_FILES


def test_weights_can_be_split(subnet, tmp_path):
    folder = save_for_hub(subnet, None, tmp_path / "subnet", max_shard_size="50KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert_same(SuperShaperForMaskedLM.from_pretrained(folder).state_dict(), subnet.state_dict(), atol=0)


def test_folder_with_files_is_refused(subnet, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not an empty folder\. Choose another one"):
        save_for_hub(subnet, None, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_tokenizer_of_another_vocabulary_is_refused(subnet, tmp_path):
    large = BertTokenizer(vocab={word: index for index, word in enumerate([*SPECIAL_TOKENS, *map(str, range(70))])})
    with pytest.raises(ValueError, match=r"has 75 tokens, but the model has vocab_size=61: .*resize_token_embeddings"):
        save_for_hub(subnet, large, tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == []


def test_crash_while_saving_leaves_no_folder(subnet, tokenizer, tmp_path, monkeypatch):
    def write_half(partial, **kwargs):
        (partial / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(subnet, "save_pretrained", write_half)
    with pytest.raises(RuntimeError, match="disk full"):
        save_for_hub(subnet, tokenizer, tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == []


# The card


def test_card_claims_nothing_that_was_not_said(folder):
    metadata = ModelCard.load(folder / "README.md").data.to_dict()
    assert metadata == {
        "library_name": "transformers",
        "model_name": "name",
        "pipeline_tag": "fill-mask",
        "tags": ["supershaper", "bert"],
    }
    assert "started from" not in (folder / "README.md").read_text()


def test_card_says_what_its_author_said(subnet, tmp_path):
    metadata = {
        "license": "apache-2.0",
        "language": "en",
        "base_model": "google-bert/bert-base-cased",
        "datasets": ["wikimedia/wikipedia"],
    }
    sections = {"training": "One epoch.", "evaluation": "| loss |\n| --- |\n| 2.5 |", "limits": "English: only."}
    save_for_hub(subnet, None, tmp_path / "subnet", tags=["tiny"], **metadata, **sections)
    card = ModelCard.load(tmp_path / "subnet" / "README.md")
    assert metadata.items() <= card.data.to_dict().items()
    assert card.data.tags == ["supershaper", "bert", "tiny"]
    for title, text in sections.items():
        assert f"## {title.capitalize()}\n\n{text}\n\n" in card.text
    assert "| started from | `google-bert/bert-base-cased` |\n" in card.text


def test_card_has_one_metadata_block_and_whole_tables(model_class):
    for model in (tiny_model(model_class), tiny_model(model_class).extract_subnet(SHAPE)):
        readme = str(model_card(model, "user/name", base_model="bert"))
        assert re.match(r"---\n(\w+: \S+\n|\w+:\n(- \S+\n)+)+---\n\n# name\n", readme)
        assert readme.splitlines().count("---") == 2
        assert readme.count("```") % 2 == 0
        assert "\n\n\n" not in readme
        assert not re.search(r"None|Undefined|[{}]{2}|{%", readme)
        table = readme.split("| --- | --- |\n")[1].split("\n\n")[0].splitlines()
        assert len(table) == 9
        assert all(re.fullmatch(r"\| [^|]+ \| [^|]+ \|", row) for row in table)


def test_card_counts_the_stored_parameters(model_class, tmp_path):
    for kind, shape in {"supernet": None, "subnet": SHAPE}.items():
        model = tiny_model(model_class)
        folder = save_for_hub(model.extract_subnet(shape) if shape else model, None, tmp_path / kind)
        count = stored_parameters((folder / "model.safetensors").read_bytes())
        assert f"| parameters | {count:,} |\n" in (folder / "README.md").read_text()
        sizes = [width for width in shape if width] if shape else [48, 48, 48]
        assert f"| hidden sizes by layer | {sizes} |\n" in (folder / "README.md").read_text()


def test_card_promises_the_pipeline_of_its_head_if_there_is_one(model_class):
    card = model_card(tiny_model(model_class), "user/name")
    auto_class = re.search(r"(AutoModel\w*)\.from_pretrained", card.text)[1]
    promised = re.findall(r'pipeline\("(.+?)"', card.text)
    if model_class in (SuperShaperForQuestionAnswering, SuperShaperForMultipleChoice):  # none in transformers 5
        assert promised == []
    else:
        _, task, _ = PIPELINE_REGISTRY.check_task(card.data.pipeline_tag)
        assert promised == [card.data.pipeline_tag]
        assert auto_class in [loader.__name__ for loader in task["pt"]]


@pytest.mark.parametrize("kind", ["supernet", "subnet"])
def test_code_in_the_card_runs(kind, model_class, server, tokenizer):
    model = tiny_model(model_class)
    push_to_hub(model if kind == "supernet" else model.extract_subnet(SHAPE), tokenizer, "user/name")
    variables = {}
    blocks = re.findall(r"```python\n(.+?)```", files(server)["README.md"].decode(), re.DOTALL)
    assert len(blocks) == {"supernet": 2, "subnet": 1}[kind]
    for block in blocks:
        exec(block, variables)
    assert type(variables["model"]) is model_class
    assert variables["tokenizer"].get_vocab() == tokenizer.get_vocab()


def test_card_shows_no_tokenizer_where_there_is_none(subnet, tmp_path):
    folder = save_for_hub(subnet, None, tmp_path / "subnet")
    readme = (folder / "README.md").read_text()
    assert "okenizer" not in readme
    assert "pipeline(" not in readme  # it would look for one


# Publishing


def test_push_is_one_commit_of_the_folder(folder, server):
    before = contents(folder)
    address = push_folder(folder, "user/name")
    assert titles(server) == [FIRST, PUBLISHED]
    assert files(server) == contents(folder) == before
    assert address == f"{server.endpoint}/user/name/commit/{server.repos['user/name'].at('main').oid}"
    assert not server.repos["user/name"].private


def test_folders_inside_the_folder_are_published_too(folder, server):
    (folder / "measured").mkdir()
    (folder / "measured" / "README.md").write_text("Loss by shape.\n")
    push_folder(folder, "user/name")
    assert files(server) == contents(folder)
    (folder / "measured" / "README.md").write_text("Loss and accuracy by shape.\n")
    push_folder(folder, "user/name")  # keeps the card, not every file of that name
    assert files(server) == contents(folder)


def test_pushing_the_same_again_adds_no_commit(folder, server):
    push_folder(folder, "user/name")
    push_folder(folder, "user/name")
    assert titles(server) == [FIRST, PUBLISHED]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_every_way_of_publishing_makes_the_same_repository(with_tokenizer, server, tokenizer):
    supernet, given = tiny_model(), tokenizer if with_tokenizer else None
    push_to_hub(supernet.extract_subnet(SHAPE), given, "user/by-function")
    supernet.extract_subnet(SHAPE).push_to_hub("user/by-method", tokenizer=given)
    supernet.extract_subnet(SHAPE, repo_id="user/by-extraction", tokenizer=given)
    names = ["by-function", "by-method", "by-extraction"]
    assert list(server.repos) == [f"user/{name}" for name in names]
    first, second, third = (
        {path: data.replace(name.encode(), b"NAME") for path, data in files(server, f"user/{name}").items()}
        for name in names
    )
    assert first == second == third
    assert set(first) == (MODEL_FILES | TOKENIZER_FILES if with_tokenizer else MODEL_FILES)
    assert json.loads(first["config.json"])["auto_map"] == AUTO_MAP
    for repo_id in server.repos:
        assert titles(server, repo_id) == [FIRST, PUBLISHED]


def test_options_of_the_commit_reach_the_hub(subnet, server):
    push_to_hub(
        subnet,
        None,
        "user/name",
        private=True,
        commit_message="Second try",
        commit_description="With a body.",
        max_shard_size="50KB",
        license="mit",
    )
    repo = server.repos["user/name"]
    assert repo.private
    assert repo.at("main")[1:3] == ("Second try", "With a body.")
    assert "model.safetensors.index.json" in repo.files()
    assert b"license: mit\n" in repo.files()["README.md"]


def test_token_is_used(folder, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    push_folder(folder, "user/name", token=server.token)
    push_to_hub(SuperShaperForMaskedLM.from_pretrained(folder), None, "user/other", token=server.token)
    assert titles(server) == titles(server, "user/other") == [FIRST, PUBLISHED]


def test_name_without_a_namespace_is_the_users(folder, server):
    push_folder(folder, "name")
    assert list(server.repos) == ["user/name"]
    assert files(server) == contents(folder)


@pytest.mark.parametrize("push", ["folder", "model"])
def test_revision_is_created_and_main_left_alone(push, folder, server):
    if push == "folder":
        push_folder(folder, "user/name", revision="v1")
    else:
        push_to_hub(SuperShaperForMaskedLM.from_pretrained(folder), None, "user/name", revision="v1")
    assert titles(server) == [FIRST, PUBLISHED]
    assert files(server) == {}
    assert files(server, revision="v1").keys() >= MODEL_FILES


@pytest.mark.parametrize("push", ["folder", "model"])
def test_pull_request_leaves_main_alone(push, folder, server):
    if push == "folder":
        address = push_folder(folder, "user/name", create_pr=True)
    else:
        model = SuperShaperForMaskedLM.from_pretrained(folder)
        address = push_to_hub(model, None, "user/name", create_pr=True)
    assert address == f"{server.endpoint}/user/name/discussions/1"
    assert files(server) == {}
    assert files(server, revision="refs/pr/1").keys() >= MODEL_FILES


def test_pull_request_to_somebody_elses_repository(folder, server):
    push_folder(folder, "user/name")
    (folder / "README.md").write_text("# Better\n")
    server.tokens["hf_bob"] = "bob"
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push_folder(folder, "user/name", token="hf_bob", create_pr=True, overwrite_card=True)
    assert list(server.repos["user/name"].refs) == ["main", "refs/pr/1"]
    assert files(server, revision="refs/pr/1") == contents(folder) != files(server)


@pytest.mark.parametrize("push", ["folder", "model"])
def test_card_of_the_repository_is_kept_unless_told(push, folder, server):
    push_folder(folder, "user/name")
    mine = b"---\nlicense: mit\n---\n\n# Mine\n"
    server.repos["user/name"].files()["README.md"] = mine
    model = tiny_model().extract_subnet([36, 36, 36])
    folder = save_for_hub(model, None, folder.with_name("next"), repo_id="user/name")

    def publish(**kwargs):
        if push == "folder":
            push_folder(folder, "user/name", **kwargs)
        else:
            push_to_hub(model, None, "user/name", **kwargs)

    publish()
    assert files(server)["README.md"] == mine
    assert files(server)["config.json"] == (folder / "config.json").read_bytes()
    publish(overwrite_card=True)
    assert files(server)["README.md"] == (folder / "README.md").read_bytes()


def test_card_is_looked_for_in_the_revision(folder, server):
    api = HfApi()
    api.create_repo("user/name")
    api.create_branch("user/name", branch="v1")
    server.repos["user/name"].add_commit("v1", {"README.md": b"# Mine\n"}, "Write a card")
    push_folder(folder, "user/name", revision="v1")
    push_folder(folder, "user/name")
    assert files(server, revision="v1")["README.md"] == b"# Mine\n"
    assert files(server) == contents(folder)


# What goes beside a model


@pytest.fixture
def measured(tmp_path):
    """A folder of records, with a README.md of its own and a folder inside."""
    folder = tmp_path / "measured"
    (folder / "plots").mkdir(parents=True)
    for name in ("README.md", "records.jsonl", "plots/loss.svg", "plots/README.md"):
        (folder / name).write_text(f"{name}\n")
    return folder


def below(path_in_repo, folder):
    return {f"{path_in_repo}/{path}": data for path, data in contents(folder).items()}


@pytest.mark.parametrize("path_in_repo", ["search", "search/first", "search/"])
def test_folder_beside_a_model_is_one_commit_and_changes_nothing_else(path_in_repo, folder, measured, server):
    push_folder(folder, "user/name")
    before, given = files(server), contents(measured)
    address = push_folder(measured, "user/name", path_in_repo=path_in_repo)
    assert titles(server) == [FIRST, PUBLISHED, f"Upload {path_in_repo.rstrip('/')} with supershaper-hf"]
    assert files(server) == before | below(path_in_repo.rstrip("/"), measured)
    assert contents(measured) == given
    assert address == f"{server.endpoint}/user/name/commit/{server.repos['user/name'].at('main').oid}"


def test_new_records_replace_those_of_the_folder_beside_a_model(folder, measured, server):
    """Its README.md too: only the card of the repository is its owner's."""
    push_folder(folder, "user/name")
    push_folder(measured, "user/name", path_in_repo="search")
    for name in ("README.md", "records.jsonl"):
        (measured / name).write_text("longer\n")
    push_folder(measured, "user/name", path_in_repo="search", commit_message="Measure more")
    assert titles(server)[2:] == ["Upload search with supershaper-hf", "Measure more"]
    assert files(server) == contents(folder) | below("search", measured)


def test_folder_beside_no_model_makes_the_repository(measured, server):
    push_folder(measured, "user/name", path_in_repo="search", private=True)
    assert files(server) == below("search", measured)
    assert server.repos["user/name"].private


@pytest.mark.parametrize("path_in_repo", [None, "search"])
def test_files_that_tools_keep_for_themselves_are_not_published(path_in_repo, folder, server):
    before = contents(folder)
    private = [".git/config", ".cache/huggingface/x", ".env", "__pycache__/elastic.pyc", "plots/.cache/x", "plots/.x"]
    for name in private:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine\n")
    push_folder(folder, "user/name", path_in_repo=path_in_repo)
    assert files(server) == {f"{path_in_repo}/{path}" if path_in_repo else path: data for path, data in before.items()}


def test_folder_inside_a_hidden_folder_is_published(folder, server, tmp_path):
    """What it is kept in does not matter."""
    hidden = tmp_path / ".cache" / "__pycache__" / "name"
    hidden.parent.mkdir(parents=True)
    folder.rename(hidden)
    push_folder(hidden, "user/name")
    assert files(server) == contents(hidden)


@pytest.mark.parametrize("path_in_repo", ["", ".", "..", "/search", "../search", "search/../..", ".cache", "a/.git"])
def test_path_that_is_no_folder_inside_the_repository_is_refused(path_in_repo, measured, server):
    with pytest.raises(ValueError, match=f"path_in_repo={path_in_repo!r} must name a folder inside the repository"):
        push_folder(measured, "user/name", path_in_repo=path_in_repo)
    assert server.repos == {}


@pytest.mark.parametrize("kind", ["missing", "empty", "hidden", "a file"])
def test_folder_without_a_file_is_refused_beside_a_model_too(kind, server, tmp_path):
    folder = tmp_path / "measured"
    if kind == "a file":
        folder.write_text("records")
    elif kind != "missing":
        folder.mkdir()
    if kind == "hidden":
        (folder / ".records.jsonl.partial").touch()
    with pytest.raises(FileNotFoundError, match=r"measured has no file to upload: it is empty, not a folder, or all"):
        push_folder(folder, "user/name", path_in_repo="search")
    assert server.repos == {}


def test_failing_hub_leaves_the_model_beside_the_records(folder, measured, server):
    push_folder(folder, "user/name")
    server.fail_next("POST", "/commit/", status=500)
    with nothing_published(server, measured, ConnectionError, "(?s)status 500.* complete or unchanged"):
        push_folder(measured, "user/name", path_in_repo="search")
    assert files(server) == contents(folder)


# Failures: nothing is published, nothing is lost, and the same call works afterwards


@contextmanager
def nothing_published(server, folder, error, message):
    """Expect `error`, no new commit and an untouched folder."""
    titles_before, folder_before = titles(server), contents(folder)
    with pytest.raises(error, match=message) as raised:
        yield raised
    assert titles(server) in (titles_before, [FIRST])  # a new repository may exist, but it is empty
    assert contents(folder) == folder_before


def assert_push_succeeds(server, folder):
    push_folder(folder, "user/name")
    assert titles(server) == [FIRST, PUBLISHED]
    assert files(server) == contents(folder)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/repos/create"),
        ("HEAD", "/resolve/main/README.md"),
        ("POST", "/preupload/"),
        ("POST", "/info/lfs/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/verify"),
        ("POST", "/commit/"),
    ],
)
def test_failing_hub_publishes_nothing(method, path, folder, server):
    server.fail_next(method, path, status=500)
    message = (
        r"(?s)Uploading to 'user/name' failed with status 500: .*[^.]\. A commit is .* complete or unchanged\. Run the"
    )
    with nothing_published(server, folder, ConnectionError, message):
        push_folder(folder, "user/name")
    assert_push_succeeds(server, folder)


def test_failing_update_leaves_the_published_version(folder, server):
    push_folder(folder, "user/name")
    before = files(server)
    changed = save_for_hub(tiny_model().extract_subnet([36, 36, 36]), None, folder.with_name("next"))
    server.fail_next("POST", "/commit/", status=500)
    with nothing_published(server, changed, ConnectionError, "status 500"):
        push_folder(changed, "user/name")
    assert files(server) == before


def test_unreachable_hub(folder, server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    message = r"Uploading to 'user/name' failed: .*Connection refused.* Run the same call again"
    with monkeypatch.context() as patch, nothing_published(server, folder, ConnectionError, message):
        patch.setattr(constants, "ENDPOINT", nobody)
        push_folder(folder, "user/name")
    assert_push_succeeds(server, folder)


def test_offline_mode_is_named(folder, server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with nothing_published(server, folder, ConnectionError, "offline mode is enabled.* unset the `HF_HUB_OFFLINE`"):
        push_folder(folder, "user/name")


@pytest.mark.parametrize("token", [None, False, True], ids=["default", "anonymous", "required"])
def test_missing_token(token, folder, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = r"did not accept the token for 'user/name'.*missing.* Log in with `hf auth login` or pass token="
    with nothing_published(server, folder, PermissionError, message):
        push_folder(folder, "user/name", token=token)
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert_push_succeeds(server, folder)


def test_missing_token_for_an_existing_repository(folder, server, monkeypatch):
    push_folder(folder, "user/name")
    (folder / "config.json").write_text("{}")
    monkeypatch.delenv("HF_TOKEN")
    with nothing_published(server, folder, PermissionError, r"did not accept the token for 'user/name'"):
        push_folder(folder, "user/name")


def test_refused_token(folder, server):
    with nothing_published(server, folder, PermissionError, r"did not accept the token .*expired or mistyped"):
        push_folder(folder, "user/name", token="hf_mistyped")
    assert_push_succeeds(server, folder)


@pytest.mark.parametrize("taken", [True, False])
def test_somebody_elses_name(taken, folder, server):
    if taken:
        push_folder(folder, "user/name")
        (folder / "config.json").write_text("{}")
    server.tokens["hf_bob"] = "bob"
    message = r"may not write to 'user/name' \(403\).* your own namespace or another token"
    with nothing_published(server, folder, PermissionError, message):
        push_folder(folder, "user/name", token="hf_bob")
    if not taken:
        assert_push_succeeds(server, folder)


def test_failed_push_of_a_model_leaves_no_temporary_folder(subnet, server, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server.fail_next("POST", "/commit/", status=500)
    with pytest.raises(ConnectionError, match="complete or unchanged") as error:
        push_to_hub(subnet, None, "user/name")
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in str(error.value)  # what is gone cannot be promised to be intact


def test_pull_request_to_a_missing_revision(folder, server):
    with nothing_published(server, folder, ConnectionError, r"(?s)status 404: .*Invalid rev id: v2") as error:
        push_folder(folder, "user/name", revision="v2", create_pr=True)
    assert "again" not in str(error.value)


@pytest.mark.parametrize("repo_id", ["a/b/c", "user/my model", "user/", ""])
def test_invalid_name(repo_id, folder, server):
    with nothing_published(server, folder, ValueError, f"Repo id must .*'{repo_id}'"):
        push_folder(folder, repo_id)
    assert server.repos == {}


def test_card_with_broken_metadata_is_refused(folder, server):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n\n# Mine\n")
    with nothing_published(server, folder, ValueError, r"Invalid metadata in README\.md"):
        push_folder(folder, "user/name")


@pytest.mark.parametrize("missing", ["the folder", "config.json"])
def test_folder_without_a_model_is_refused(missing, server, tmp_path):
    folder = tmp_path / "subnet"
    if missing == "config.json":
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"subnet.*config\.json.*save_for_hub"):
        push_folder(folder, "user/name")
    assert server.repos == {}


# Damage on the way back


def test_truncated_download_is_an_error_and_heals(folder, server):
    push_folder(folder, "user/name")
    server.corrupt("user/name", "model.safetensors", "truncate")
    with pytest.raises(OSError, match=r"should be of size \d+ but has size \d+.*model\.safetensors"):
        AutoModelForMaskedLM.from_pretrained("user/name")
    server.corruptions.clear()
    loaded = AutoModelForMaskedLM.from_pretrained("user/name")
    assert_same(loaded.state_dict(), SuperShaperForMaskedLM.from_pretrained(folder).state_dict(), atol=0)


def test_flipped_bit_in_a_download_is_found_by_hf_cache_verify(folder, server):
    def mismatches():
        return [mismatch["path"] for mismatch in HfApi().verify_repo_checksums("user/name").mismatches]

    push_folder(folder, "user/name")
    server.corrupt("user/name", "model.safetensors", "flip")
    AutoModelForMaskedLM.from_pretrained("user/name")  # of the right length: neither the client nor we notice
    assert mismatches() == ["model.safetensors"]
    server.corruptions.clear()
    AutoModelForMaskedLM.from_pretrained("user/name", force_download=True)
    assert mismatches() == []


@pytest.mark.parametrize("position", [7, 8], ids=["header length", "header"])
def test_damaged_header_is_named(position, folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[position] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(OSError, match=r"name'\)? are damaged or cut short .*force_download=True"):
        SuperShaperForMaskedLM.from_pretrained(folder)


# Other processes, with the package and without

LOAD_EVERYTHING = """
import sys

output, package, *auto_classes = sys.argv[1:]
if package == "installed":
    import supershaper_hf
else:
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "supershaper_hf":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())

import torch
import transformers

torch.set_num_threads(1)  # as here: the number of threads changes the last bits
tokenizer = transformers.AutoTokenizer.from_pretrained("user/name")
encoded = tokenizer("the big cat [MASK] on the moon .", return_tensors="pt")
results = {"vocabulary": tokenizer.get_vocab(), "encoded": dict(encoded)}
for auto_class in auto_classes:
    load = getattr(transformers, auto_class).from_pretrained
    model = load("user/name", trust_remote_code=package != "installed")
    results[auto_class] = type(model).__name__, type(model).__module__, model.base_model.encoder.state_dict()
    if auto_class == "AutoModelForMaskedLM":
        with torch.no_grad():
            results["logits"] = model(**encoded).logits
        if package == "installed":
            results["pipeline"] = transformers.pipeline("fill-mask", model="user/name")("a [MASK] .", top_k=3)
        else:
            model.push_to_hub("user/copy", commit_message="Stock")
torch.save(results, output)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Publish a subnet, then load every head of it in two other processes, side by side.

    Returns:
        The server, the subnet, and what each process saw, by "installed" and "missing", the state of the package.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    subnet = tiny_model().extract_subnet(SHAPE)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    auto_classes = [name for name in AUTO_MAP if name != "AutoConfig"]
    with HubServer() as server:
        with point_client_at(server, folder / "cache"):
            push_to_hub(subnet, tokenizer, "user/name")
        processes = {
            package: subprocess.Popen(
                [sys.executable, "-c", LOAD_EVERYTHING, str(folder / package), package, *auto_classes],
                env={**os.environ, **server.environment(folder / f"{package}-cache")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for package in ("installed", "missing")
        }
        printed = {package: process.communicate(timeout=300)[0] for package, process in processes.items()}
        for package, process in processes.items():
            assert process.returncode == 0, printed[package]
        yield server, subnet, {package: torch.load(folder / package) for package in processes}


@pytest.mark.parametrize("package", ["installed", "missing"])
def test_published_model_computes_the_same_in_another_process(package, elsewhere):
    _, subnet, results = elsewhere
    seen = results[package]
    assert_same([seen["logits"]], run(subnet, seen["encoded"]), atol=0)


@pytest.mark.parametrize("package", ["installed", "missing"])
def test_published_tokenizer_is_the_same_in_another_process(package, elsewhere, tokenizer):
    seen = elsewhere[2][package]
    assert seen["vocabulary"] == tokenizer.get_vocab()
    assert_same(seen["encoded"], dict(tokenizer("the big cat [MASK] on the moon .", return_tensors="pt")), atol=0)


@pytest.mark.parametrize("package", ["installed", "missing"])
@pytest.mark.parametrize("auto_class", [name for name in AUTO_MAP if name != "AutoConfig"])
def test_every_head_loads_from_the_published_masked_lm(auto_class, package, elsewhere):
    _, subnet, results = elsewhere
    name, module, encoder = results[package][auto_class]
    assert name == AUTO_MAP[auto_class].split(".")[1]
    assert module.startswith("supershaper_hf." if package == "installed" else "transformers_modules.")
    assert_same(encoder, subnet.bert.encoder.state_dict(), atol=0)


def test_pipeline_of_the_published_model_fills_masks(elsewhere, tokenizer):
    filled = elsewhere[2]["installed"]["pipeline"]
    assert len(filled) == 3
    assert {"score", "token_str", "sequence"} <= filled[0].keys()


def test_without_the_package_push_is_that_of_transformers(elsewhere):
    server, _, _ = elsewhere
    assert titles(server, "user/copy") == [FIRST, "Stock"]
    copy = files(server, "user/copy")
    assert set(copy) == MODEL_FILES
    for path in {"model.safetensors"} | CODE:
        assert copy[path] == files(server)[path]
