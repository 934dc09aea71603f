"""A small Hugging Face Hub on loopback, for tests that run the real `huggingface_hub` client.

Repositories (models, data sets, Spaces) and collections live in memory. The server answers the calls that
`create_repo`, `create_branch`, `create_commit`, `create_collection`, `add_collection_item`, `ModelCard.load`,
`verify_repo_checksums`, transformers' `from_pretrained` and datasets' `load_dataset` make, with the status codes and
`X-Error-*` headers of huggingface.co, so the client raises what a user of the Hub would see:

    with HubServer() as server:
        api = HfApi(endpoint=server.endpoint, token=server.token)
        api.create_repo("user/tiny")
        server.fail_next("POST", "/commit/", status=500)
        api.upload_folder(repo_id="user/tiny", folder_path=folder)  # raises HfHubHTTPError
        assert "config.json" not in server.repos["user/tiny"].files()

Uploads go through git LFS, so clients need `HF_HUB_DISABLE_XET=1`: see `HubServer.environment`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIX = ".safetensors"  # the Hub keeps other binary and large files in LFS too; here they are regular files
KINDS = {"model": "", "dataset": "datasets/", "space": "spaces/"}  # type of a repository -> prefix of its id in URLs
HOLD = 0  # in place of the status of a fault
SPACE_CARD = b"---\ntitle: New\nsdk: static\n---\n"  # the Hub gives every new Space a README.md


class HubError(Exception):
    """A refusal: HTTP status, message, further fields of the JSON body.

    The code chooses the client's exception: RepoNotFound, RevisionNotFound or EntryNotFound.
    """

    def __init__(self, status: int, message: str, code: str = "", **fields: Any):
        super().__init__(message)
        self.status = status
        self.payload = {"error": message, **fields}
        # An answer to HEAD has no body, so the message travels in a header too.
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code


# What the server knows, and how a test steers it


class Commit(NamedTuple):
    """A commit with the complete tree it leaves behind, as path -> bytes."""

    oid: str
    message: str
    description: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: all commits in order of creation, and the newest of "main", "refs/pr/1" and so on.

    A data set is called "datasets/user/name" and a Space "spaces/user/name", as in URLs.
    """

    repo_id: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, Commit] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[-2]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a pull request or a full commit hash names."""
        commit = self.refs.get(revision) or {c.oid: c for c in self.commits}.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.at(revision).files

    def add_commit(self, ref: str, files: dict[str, bytes], message: str, description: str = "") -> str:
        """Record a commit, move `ref` to it and return its hash."""
        oid = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {message}".encode()).hexdigest()
        self.refs[ref] = Commit(oid, message, description, files)
        self.commits.append(self.refs[ref])
        return oid


class HubServer:
    """A Hub, as a context manager.

    Attributes:
        token: A token of the user named "user".
        tokens: Token -> user name. Add others with `server.tokens["hf_b"] = "bob"`. A user may write in the namespace
            of the same name and open pull requests everywhere.
        repos: Repository id -> `Repo`.
        collections: Slug -> collection, as the Hub describes it.
        faults: (method, part of the URL path, status) of pending faults.
        corruptions: (repository id, path) -> "flip" or "truncate"; `corruptions.clear()` heals.
        held: Set when the request that `hold_next` waits for has been dealt with, but not answered.
        user_agents: What clients call themselves, one entry for each request.
        lock: Held while a request is answered, so that commits do not interleave.
    """

    def __init__(self):
        self.token = "hf_valid"
        self.tokens = {self.token: "user"}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[tuple[str, str, int]] = []
        self.corruptions: dict[tuple[str, str], str] = {}
        self.held = threading.Event()
        self.user_agents: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        # shutdown() takes effect at the next poll, so poll often.
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self, cache_dir: str | Path) -> dict[str, str]:
        """Variables that point a subprocess at this server, to be laid over `os.environ`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache_dir),
            "HF_HUB_CACHE": str(Path(cache_dir) / "hub"),  # an inherited one would win over HF_HOME
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",  # the test suite itself may be offline
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fail_next(self, method: str, path_substring: str, status: int = 500) -> None:
        """Answer the next matching request with an error. The real client repeats most requests after a 5xx."""
        self.faults.append((method, path_substring, status))

    def hold_next(self, method: str, path_substring: str) -> None:
        """Deal with the next matching request, but do not answer it: its client hears nothing until it is killed."""
        self.held.clear()
        self.faults.append((method, path_substring, HOLD))

    def corrupt(self, repo_id: str, path: str, how: Literal["flip", "truncate"]) -> None:
        """Serve a file with one bit flipped, or with "truncate" only its first half.

        The ETag and the size that a HEAD request announces stay those of the intact file.
        """
        self.corruptions[repo_id, path] = how


# What the Hub derives from files


def describe(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it, with git's name for it and, in LFS, its SHA-256."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    stored = content
    if path.endswith(LFS_SUFFIX):
        oid = hashlib.sha256(content).hexdigest()
        stored = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": len(stored)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
    return entry


def etag(path: str, content: bytes) -> str:
    """The name of a file in the client's cache, and what it compares to skip an upload."""
    entry = describe(path, content)
    return entry.get("lfs", entry)["oid"]


def damage(content: bytes, how: str | None) -> bytes:
    """Spoil bytes on their way out: see `HubServer.corrupt`."""
    middle = len(content) // 2
    if how == "truncate":
        return content[:middle]
    if how == "flip":
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return content


# The HTTP API

ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


def route(method: str, template: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a method of `_Handler` answer a URL, whose `{names}` become its arguments.

    URLs are matched while still quoted, so the revision "refs%2Fpr%2F1" is a single segment.
    """
    pattern = template.replace("/api/{repo_id}", "/api/(?=models/|datasets/|spaces/)(?:models/)?{repo_id}")
    pattern = pattern.replace("{repo_id}", "(?P<repo_id>(?:(?:datasets|spaces)/)?[^/]+/[^/]+)")
    pattern = pattern.replace("{path}", "(?P<path>.+)")
    pattern = re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", pattern)

    def register(endpoint: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for the handlers to close their sockets
    request_queue_size = 64  # the default of 5 drops connections when a snapshot is downloaded
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    """Answers one request. Each endpoint returns a file's bytes or the payload of a JSON answer.

    Speaks HTTP/1.0, the base class's default: one request per connection leaves none open when the server stops.
    """

    server: _HttpServer
    timeout = 30  # seconds; a client that hangs must not hang the tests

    def _handle(self) -> None:
        self.hub = self.server.hub
        self.url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.status, self.answer_headers = 200, {"Content-Type": "application/json"}
        self.hold = False
        with self.hub.lock:
            self.hub.user_agents.append(self.headers.get("User-Agent", ""))
            try:
                answer = self._dispatch()
            except HubError as error:
                self.status, answer = error.status, error.payload
                self.answer_headers |= error.headers
        if self.hold:
            self.hub.held.set()
            self.connection.recv(1)  # returns when the client is gone
            return
        self._send(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815, the base class calls them so

    def _dispatch(self) -> Any:
        for fault in self.hub.faults:
            method, path_substring, status = fault
            if method == self.command and path_substring in self.url.path:
                self.hub.faults.remove(fault)
                self.hold = status == HOLD
                if not self.hold:
                    raise HubError(status, "Failure injected by the test.")
                break
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, endpoint in ROUTES:
            match = pattern.fullmatch(self.url.path)
            if route_method == method and match:
                return endpoint(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(501, f"hub_server.py does not know {self.command} {self.url.path}")

    def _send(self, body: bytes) -> None:
        self.send_response(self.status)
        for name, value in {**self.answer_headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""

    def _flag(self, name: str) -> bool:
        """Whether a query parameter is on: the client writes "1" for some and "true" for others."""
        return parse_qs(self.url.query).get(name) in (["1"], ["true"])

    def _user(self) -> str | None:
        """Who asks; None for an anonymous request."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        """The repository, if whoever asks may read it, or write to it."""
        user = self._user()
        repo = self.hub.repos.get(repo_id)
        if user is None and (repo is None or repo.private or write):
            # The Hub sends this without a code: the client infers it, but from https URLs only.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and user != repo.namespace):
            # As on the Hub, a stranger cannot tell a private repository from a missing one.
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and user != repo.namespace and not self._flag("create_pr"):
            raise HubError(403, "Authorization error.")
        return repo

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Any:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        payload = json.loads(self.body)
        namespace, kind = payload["organization"] or user, payload.get("type", "model")
        if namespace != user:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}".')
        repo_id = f"{KINDS[kind]}{namespace}/{payload['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            # With exist_ok=True the client reads the URL from the refusal.
            raise HubError(409, f"You already created this {kind} repo", url=url)
        repo = self.hub.repos[repo_id] = Repo(repo_id, private=payload.get("visibility") == "private")
        files = {".gitattributes": f"*{LFS_SUFFIX} filter=lfs\n".encode()}
        repo.add_commit("main", files | ({"README.md": SPACE_CARD} if kind == "space" else {}), "initial commit")
        return {"url": url, "name": repo_id}

    @route("POST", "/api/{repo_id}/branch/{branch}")
    def create_branch(self, repo_id: str, branch: str) -> Any:
        repo = self._repo(repo_id, write=True)
        if branch in repo.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.refs[branch] = repo.at(json.loads(self.body).get("startingPoint", "main"))
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        """Check the metadata between the `---` fences that open a model card."""
        card = json.loads(self.body)["content"]
        match = re.match(r"---\n(.+?)^---$", card, re.DOTALL | re.MULTILINE)
        if match is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            yaml.safe_load(match[1])
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": []}

    @route("POST", "/api/{repo_id}/preupload/{revision}")
    def preupload(self, repo_id: str, revision: str) -> Any:
        """Tell for each file how to upload it, and the ETag of the file it would replace."""
        present = self._repo(repo_id, write=True).files(revision)
        answer = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIX) else "regular"
            oid = etag(path, present[path]) if path in present else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    @route("POST", "/{repo_id}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> Any:
        """Give upload instructions for the LFS objects that the repository does not have yet."""
        repo = self._repo(repo_id)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in repo.lfs_objects:
                url = f"{self.hub.endpoint}/lfs/{repo_id}/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{repo_id}/{oid}")
    def lfs_put(self, repo_id: str, oid: str) -> Any:
        """Take an object's bytes, without a token: on the Hub this is a signed storage URL."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"LFS object {oid} does not have the announced SHA-256.")
        self.hub.repos[repo_id].lfs_objects[oid] = self.body
        return {}

    @route("POST", "/lfs/{repo_id}/{oid}/verify")
    def lfs_verify(self, repo_id: str, oid: str) -> Any:
        """Confirm that an object arrived whole."""
        content = self._repo(repo_id).lfs_objects.get(oid, b"")
        if len(content) != json.loads(self.body)["size"]:
            raise HubError(400, f"LFS object {oid} does not have the announced size.")
        return {}

    @route("POST", "/api/{repo_id}/commit/{revision}")
    def commit(self, repo_id: str, revision: str) -> Any:
        """Apply operations to a branch or to a new pull request: all of them or none."""
        repo = self._repo(repo_id, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.files(revision))  # a copy, so that a bad operation leaves the repository as it was
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in repo.lfs_objects:
                files[value["path"]] = repo.lfs_objects[value["oid"]]
            else:
                raise HubError(400, f"Not an operation, or its LFS object was never uploaded: {operation}")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = f"refs/pr/{number}" if self._flag("create_pr") else revision
        oid = repo.add_commit(ref, files, header["value"]["summary"], header["value"]["description"])
        url = f"{self.hub.endpoint}/{repo_id}"
        # The client reads the last one only if it asked for a pull request.
        return {"commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "pullRequestUrl": f"{url}/discussions/{number}"}

    @route("GET", "/api/{repo_id}")
    @route("GET", "/api/{repo_id}/revision/{revision}")
    def repo_info(self, repo_id: str, revision: str = "main") -> Any:
        repo = self._repo(repo_id)
        commit, name = repo.at(revision), "/".join(repo_id.split("/")[-2:])
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}

    @route("GET", "/api/{repo_id}/tree/{revision}")
    @route("GET", "/api/{repo_id}/tree/{revision}/{path}")
    def tree(self, repo_id: str, revision: str, path: str = "") -> Any:
        """List the files below `path`. Folders, and what `expand` would add, are left out."""
        files = self._repo(repo_id).files(revision)
        entries = [describe(name, content) for name, content in files.items() if name.startswith(path)]
        if not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return entries

    @route("POST", "/api/{repo_id}/paths-info/{revision}")
    def paths_info(self, repo_id: str, revision: str) -> Any:
        """Describe those of some paths that are files."""
        files = self._repo(repo_id).files(revision)
        form = parse_qs(self.body.decode())
        paths = form["paths"] if "paths" in form else json.loads(self.body)["paths"]
        return [describe(path, files[path]) for path in paths if path in files]

    @route("GET", "/{repo_id}/resolve/{revision}/{path}")
    def resolve(self, repo_id: str, revision: str, path: str) -> bytes:
        """Serve a file."""
        commit = self._repo(repo_id).at(revision)
        self.answer_headers["X-Repo-Commit"] = commit.oid  # also on a 404: the client remembers absent files
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        tag = f'"{etag(path, content)}"'
        self.answer_headers |= {"Content-Type": "application/octet-stream", "ETag": tag}
        if path.endswith(LFS_SUFFIX):
            self.answer_headers |= {"X-Linked-ETag": tag, "X-Linked-Size": str(len(content))}
        if self.command == "GET":
            content = damage(content, self.hub.corruptions.get((repo_id, path)))
        return content

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": user}

    @route("POST", "/api/collections")
    def create_collection(self) -> Any:
        """Make a collection. Its slug is its title, lower case, and an id. One namespace has each title once."""
        user, wanted = self._user(), json.loads(self.body)
        if user is None or wanted["namespace"] != user:
            raise HubError(403, "Authorization error.")
        words = re.sub("[^a-z0-9]+", "-", wanted["title"].lower())
        slug = f"{user}/{words}-{hashlib.sha1(words.encode()).hexdigest()[:24]}"
        if slug in self.hub.collections:
            raise HubError(409, "You already have a collection of this title.", slug=slug)
        self.hub.collections[slug] = {
            "slug": slug,
            "title": wanted["title"],
            "description": wanted.get("description"),
            "owner": {"name": user},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": wanted["private"],
            "theme": "green",
            "upvotes": 0,
        }
        return self.hub.collections[slug]

    @route("GET", "/api/collections/{owner}/{name}")
    def get_collection(self, owner: str, name: str) -> Any:
        collection = self.hub.collections.get(f"{owner}/{name}")
        if collection is None or (collection["private"] and self._user() != owner):
            raise HubError(404, "Collection not found")
        return collection

    @route("POST", "/api/collections/{owner}/{name}/items")
    def add_collection_item(self, owner: str, name: str) -> Any:
        """Add a repository that exists, once."""
        if self._user() != owner:
            raise HubError(403, "Authorization error.")
        collection, added = self.get_collection(owner, name), json.loads(self.body)
        kind, item_id = added["item"]["type"], added["item"]["id"]
        self._repo(f"{KINDS[kind]}{item_id}")
        if any((item["type"], item["id"]) == (kind, item_id) for item in collection["items"]):
            raise HubError(409, "This item is in the collection already.")
        note = {"text": added["note"]} if "note" in added else None
        position = len(collection["items"])
        item = {"_id": f"item-{position}", "id": item_id, "type": kind, "position": position, "note": note}
        collection["items"].append(item)
        return collection
