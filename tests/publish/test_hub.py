"""What is published is one commit of the whole folder, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_model
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from publishing import (
    FIRST,
    IGNORE_UPLOADS,
    MODEL_FILES,
    PUBLISHED,
    SHAPE,
    TOKENIZER_FILES,
    contents,
    files,
    nothing_published,
    titles,
)

import supershaper_hf
from supershaper_hf import SuperShaperForMaskedLM
from supershaper_hf.model.configuration_supershaper import AUTO_MAP
from supershaper_hf.publish.hub import push_folder, push_to_hub, save_for_hub


pytestmark = IGNORE_UPLOADS


def test_push_is_one_commit_of_the_folder(folder, server):
    before = contents(folder)
    address = push_folder(folder, "user/name")
    assert titles(server) == [FIRST, PUBLISHED]
    assert files(server) == contents(folder) == before
    assert address == f"{server.endpoint}/user/name/commit/{server.repos['user/name'].at('main').oid}"
    assert not server.repos["user/name"].private


@pytest.mark.parametrize(("repo_type", "needed"), [("dataset", "README.md"), ("space", "index.html")])
def test_data_set_and_space_are_one_commit_of_the_folder(repo_type, needed, server, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / needed).touch()
    (tmp_path / "data.csv").write_text("a\n1\n")
    pushed = push_folder(tmp_path, "user/name", repo_type=repo_type, private=True, revision="v1")
    repo_id = f"{repo_type}s/user/name"
    assert list(server.repos) == [repo_id]
    assert server.repos[repo_id].private
    assert titles(server, repo_id) == [FIRST, f"Upload {repo_type} with supershaper-hf"]
    assert set(files(server, repo_id, "v1")) == {"README.md", needed, "data.csv"}
    assert pushed.repo_url.repo_type == repo_type
    (tmp_path / needed).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {needed}, which a {repo_type} needs"):
        push_folder(tmp_path, "user/name", repo_type=repo_type)


def test_card_of_a_new_space_replaces_that_of_the_hub_if_told(server, tmp_path):
    (tmp_path / "README.md").write_text("---\nsdk: static\n---\n")
    (tmp_path / "index.html").touch()
    push_folder(tmp_path, "user/name", repo_type="space", overwrite_card=True)
    assert files(server, "spaces/user/name") == contents(tmp_path)


def test_unknown_type_of_repository_is_refused(folder, server):
    with pytest.raises(ValueError, match="repo_type='kernel' is unknown"):
        push_folder(folder, "user/name", repo_type="kernel")
    assert server.repos == {}


def test_the_hub_is_told_the_version(folder, server):
    push_folder(folder, "user/name")
    assert f"supershaper-hf/{supershaper_hf.__version__}" in server.user_agents[-1]


def test_results_on_benchmarks_are_published(folder, server):
    """They lie in a hidden folder, which the Hub reads."""
    for name in (".eval_results/glue.yaml", ".eval_results/.x", ".eval_results/.cache/x", "a/.eval_results/x.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]\n")
    push_folder(folder, "user/name")
    assert {path for path in files(server) if ".eval_results" in path} == {".eval_results/glue.yaml"}


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
    first = push_to_hub(supernet.extract_subnet(SHAPE), "user/by-function", tokenizer=given)
    second = supernet.extract_subnet(SHAPE).push_to_hub("user/by-method", tokenizer=given)
    assert type(first) is type(second) is CommitInfo
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
    push_to_hub(SuperShaperForMaskedLM.from_pretrained(folder), "user/other", token=server.token)
    assert titles(server) == titles(server, "user/other") == [FIRST, PUBLISHED]


def test_white_space_around_a_token_is_removed(folder, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    push_folder(folder, "user/name", token=f" {server.token}\r\n")
    assert titles(server) == [FIRST, PUBLISHED]


def test_name_without_a_namespace_is_the_users(folder, server):
    push_folder(folder, "name")
    assert list(server.repos) == ["user/name"]
    assert files(server) == contents(folder)


@pytest.mark.parametrize("push", ["folder", "model"])
def test_revision_is_created_and_main_left_alone(push, folder, server):
    if push == "folder":
        push_folder(folder, "user/name", revision="v1")
    else:
        push_to_hub(SuperShaperForMaskedLM.from_pretrained(folder), "user/name", revision="v1")
    assert titles(server) == [FIRST, PUBLISHED]
    assert files(server) == {}
    assert files(server, revision="v1").keys() >= MODEL_FILES


@pytest.mark.parametrize("push", ["folder", "model"])
def test_pull_request_leaves_main_alone(push, folder, server):
    if push == "folder":
        pushed = push_folder(folder, "user/name", create_pr=True)
    else:
        model = SuperShaperForMaskedLM.from_pretrained(folder)
        pushed = push_to_hub(model, "user/name", create_pr=True)
    assert pushed.pr_url == f"{server.endpoint}/user/name/discussions/1"
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
    folder = save_for_hub(model, folder.with_name("next"), repo_id="user/name")

    def publish(**kwargs):
        if push == "folder":
            push_folder(folder, "user/name", **kwargs)
        else:
            push_to_hub(model, "user/name", **kwargs)

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
    private = [
        ".lock",
        ".git/config",
        ".cache/huggingface/x",
        ".env",
        "__pycache__/elastic.pyc",
        "plots/.cache/x",
        "plots/.x",
    ]
    for name in private:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine\n")
    push_folder(folder, "user/name", path_in_repo=path_in_repo)
    assert files(server) == {f"{path_in_repo}/{path}" if path_in_repo else path: data for path, data in before.items()}


@pytest.mark.parametrize("target", ["outside", "outside_folder", "missing", ".", "plots", ".env", "loop"])
@pytest.mark.parametrize("name", ["model.safetensors", "plots/new"])
def test_link_to_what_is_not_published_is_refused(target, name, folder, server, tmp_path):
    """It may lead to any private file of this machine."""
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "outside_folder").mkdir()
    (tmp_path / "outside_folder" / "file").write_text("secret")
    (folder / "plots").mkdir()
    (folder / ".env").write_text("secret")
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / target if "outside" in target else link if target == "loop" else folder / target)
    message = rf"{name} is a symbolic link to .*, which is not one of the files of .* Replace the link by a copy"
    for path_in_repo in (None, "search"):
        with nothing_published(server, folder, ValueError, message):
            push_folder(folder, "user/name", path_in_repo=path_in_repo)
    assert server.repos == {}


def test_folder_of_the_hubs_cache_is_refused_until_it_is_copied(folder, server, tmp_path):
    """Its files are links to `blobs`, which lie outside it."""
    push_folder(folder, "user/name")
    snapshot = Path(snapshot_download("user/name"))
    assert (snapshot / "model.safetensors").is_symlink()
    with nothing_published(server, snapshot, ValueError, "is a symbolic link to .*/blobs/"):
        push_folder(snapshot, "user/other")
    shutil.copytree(snapshot, tmp_path / "copy")
    push_folder(tmp_path / "copy", "user/other")
    assert files(server, "user/other") == files(server)


def test_link_to_a_file_that_is_published_is_a_second_copy(folder, server, tmp_path):
    (folder / "plots").mkdir()
    (folder / "plots" / "config.json").symlink_to("../config.json")
    (tmp_path / "link").symlink_to(folder)
    push_folder(tmp_path / "link", "user/name")  # the folder itself may be a link too
    assert files(server) == contents(folder)
    assert files(server)["plots/config.json"] == (folder / "config.json").read_bytes()


def test_link_in_a_hidden_folder_does_not_matter(folder, server, tmp_path):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "link").symlink_to(tmp_path)
    push_folder(folder, "user/name")
    assert not any("cache" in path for path in files(server))


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
    with pytest.raises(
        FileNotFoundError, match=r"measured has no file to upload: it is empty, it is not a folder, or all"
    ):
        push_folder(folder, "user/name", path_in_repo="search")
    assert server.repos == {}


def test_failing_hub_leaves_the_model_beside_the_records(folder, measured, server):
    push_folder(folder, "user/name")
    server.fail_next("POST", "/commit/", status=500)
    with nothing_published(server, measured, ConnectionError, "(?s)status 500.* complete or unchanged"):
        push_folder(measured, "user/name", path_in_repo="search")
    assert files(server) == contents(folder)
