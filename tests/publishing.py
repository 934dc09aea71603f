"""A model to publish, and a Hub on loopback that this process's client uses: a plugin of the tests in `publish`.

`point_client_at` sends the real client of the Hub to `hub_server.py`. Other processes get `HubServer.environment`.
"""

from contextlib import contextmanager

import huggingface_hub
import pytest
from conftest import tiny_model
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

from supershaper_hf.publish.hub import push_folder, save_for_hub


# httpx2 warns of how huggingface_hub 2.4 hands it the bytes of an LFS upload; neither is ours to change.
IGNORE_UPLOADS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SHAPE = [8, 0, 36]
CODE = {"configuration_supershaper.py", "elastic.py", "modeling_supershaper.py", "narrowing.py"}
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
    return save_for_hub(subnet, tmp_path / "name", tokenizer=tokenizer, repo_id="user/name")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files(server, repo_id="user/name", revision="main"):
    """What was published: every file but the one that the Hub itself puts into a new repository."""
    return {path: data for path, data in server.repos[repo_id].files(revision).items() if path != ".gitattributes"}


def titles(server, repo_id="user/name"):
    """Titles of all commits, on every branch; none if there is no repository."""
    return [commit.message for commit in server.repos[repo_id].commits] if repo_id in server.repos else []


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
