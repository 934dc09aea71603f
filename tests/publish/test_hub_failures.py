"""After a failure nothing is published, nothing is lost, and the same call works afterwards."""

import socket
import tempfile
import traceback

import pytest
from conftest import tiny_model
from huggingface_hub import constants
from publishing import IGNORE_UPLOADS, assert_push_succeeds, files, nothing_published

from supershaper_hf.publish import hub
from supershaper_hf.publish.hub import push_folder, push_to_hub, save_for_hub


pytestmark = IGNORE_UPLOADS


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
        r"(?s)Uploading to 'user/name' failed with status 500: .*[^.]\. The Hub applies a commit .* complete or "
        r"unchanged\. Run the"
    )
    with nothing_published(server, folder, ConnectionError, message):
        push_folder(folder, "user/name")
    assert_push_succeeds(server, folder)


def test_failing_update_leaves_the_published_version(folder, server):
    push_folder(folder, "user/name")
    before = files(server)
    changed = save_for_hub(tiny_model().extract_subnet([36, 36, 36]), folder.with_name("next"))
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


SECRET = "hf_secret"


@pytest.mark.parametrize("where", ["argument", "environment"])
@pytest.mark.parametrize("mark", ["\nX-Header: 1", " ", "\x7f", "…", "\x1b[0m", "\0"], ids=ascii)
def test_token_that_cannot_be_sent_is_not_shown(mark, where, folder, server, monkeypatch):
    token = SECRET[:5] + mark + SECRET[5:]
    if where == "environment":
        monkeypatch.setattr(hub, "get_token", lambda: token)
    given = token if where == "argument" else None
    with nothing_published(
        server, folder, ValueError, r"The access token .* Copy it again .*/settings/tokens"
    ) as error:
        push_folder(folder, "user/name", token=given)
    shown = "".join(traceback.format_exception(error.value))
    assert "hf_se" not in shown
    assert "cret" not in shown
    assert server.repos == {}


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_empty_token_is_named(token, folder, server):
    with nothing_published(server, folder, ValueError, "The access token is empty or"):
        push_folder(folder, "user/name", token=token)


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/repos/create"), ("PUT", "/lfs/"), ("POST", "/commit/")])
@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_no_failure_shows_the_token(status, method, path, folder, server):
    server.fail_next(method, path, status=status)
    error = PermissionError if status in (401, 403) else ConnectionError
    with nothing_published(server, folder, error, "user/name") as raised:
        push_folder(folder, "user/name", token=f" {server.token}\n")
    assert server.token not in "".join(traceback.format_exception(raised.value))
    assert ("Run the same call again." in str(raised.value)) == (status in (429, 500))
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
        push_to_hub(subnet, "user/name")
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
