"""A stand-in for the Hugging Face Hub: the endpoints that pushing and loading use, in memory, on 127.0.0.1.

    with StandInHub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(hub.write_token, cache)})

Owner of both tokens is `alice`, or whom the call names. Repositories are commits of whole file trees; large files go
through git LFS.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".safetensors", ".parquet", ".png")  # what the Hub keeps in LFS
MOST_BYTES = 300_000_000  # of one request; the tests send little, and a mistake must not fill the memory


@dataclass
class Repository:
    """Commits (file trees by path) and the branches that point at them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {branch}".encode())
        for path, data in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(data).digest())
        self.branches[branch] = digest.hexdigest()
        self.commits[digest.hexdigest()] = files
        return digest.hexdigest()


class StandInHub:
    """The server and what it holds; `requests` lists what was asked of it, without tokens."""

    write_token = "hf_stand_in_token_that_may_write"
    read_token = "hf_stand_in_token_that_may_read"

    def __init__(self, owner: str = "alice") -> None:
        self.owner = owner
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        self.uploads_before_hold: int | None = None  # so many uploads end, the next ones hang
        self.holding = threading.Event()
        self.stored = threading.Event()
        self.released = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> "StandInHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str, home: Path) -> dict[str, str]:
        """Variables of a client process; what is not on this machine it cannot reach."""
        nowhere = "http://127.0.0.1:9"
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HTTP_PROXY": nowhere,
            "HTTPS_PROXY": nowhere,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def files(self, kind: str, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Content of a branch by path."""
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.branches[branch]]

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repository:
        """A repository as the Hub makes it, with one commit."""
        repository = self.repositories[kind, repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repository

    def publish(self, repo_id: str, files: dict[str, bytes]) -> None:
        """A public model of somebody else."""
        self.create("model", repo_id).commit("main", files)
        self.large |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}


class _Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


NO_REPOSITORY = _Refusal(404, "Repository not found", "RepoNotFound")
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
KIND = r"(?P<kind>model|dataset|space)s"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", rf"/api/{KIND}/{NAME}", "info"),
    ("GET", rf"/api/{KIND}/{NAME}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/{KIND}/{NAME}/refs", "refs"),
    ("GET", rf"/api/{KIND}/{NAME}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
    ("POST", rf"/api/{KIND}/{NAME}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"/api/{KIND}/{NAME}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"/api/{KIND}/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{KIND}/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/((?P<kind>dataset|space)s/)?{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    ("GET", rf"/((?P<kind>dataset|space)s/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    """One request; its method and path choose the method of the same name in ROUTES."""

    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: the tests read what the clients print."""

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        length = int(self.headers.get("Content-Length") or 0)
        if length > MOST_BYTES:
            raise AssertionError(f"{self.command} {self.path} sends {length} bytes")
        self.body = self.rfile.read(length)
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            self.hub.requests.append((self.command, split.path))
            self.hub.received += length
        try:
            for verb, pattern, name in ROUTES:
                match = re.fullmatch(pattern, unquote(split.path.replace("%2F", "\0")).replace("\0", "%2F"))
                if verb == method and match:
                    fields = {key: value for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**{key: unquote(value) for key, value in fields.items()})
                    return
            raise _Refusal(404, f"no such endpoint: {self.command} {split.path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- Who may do what --------------------------------------------------------------------------

    def _may_write(self) -> bool | None:
        """Of the token: None without one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in (self.hub.write_token, self.hub.read_token):
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return token == self.hub.write_token

    def _check_write(self, owner: str) -> None:
        may = self._may_write()
        if may is None:
            raise _Refusal(401, "Invalid username or password.")
        if not may or owner != self.hub.owner:
            raise _Refusal(403, f"You don't have the rights to write to the namespace {owner!r}")

    def _repository(self, kind: str, repo: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get((kind, repo))
        if found is None or (found.private and self._may_write() is None):
            raise NO_REPOSITORY
        if write:
            self._check_write(repo.split("/")[0])
        return found

    def _tree(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a revision."""
        self._may_write()  # a wrong token is refused even where none is needed
        repository = self._repository(kind, repo)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # --- Endpoints: repositories ------------------------------------------------------------------

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.hub.owner
        self._check_write(owner)
        kind, repo_id = wanted.get("type", "model"), f"{owner}/{wanted['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repositories:
            self._answer({**answer, "error": "You already created this repo"}, 409)
            return
        assert kind != "space" or wanted["sdk"] == "gradio"
        self.hub.create(kind, repo_id, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self._answer(answer)

    def validate(self) -> None:
        self._answer({"errors": [], "warnings": []})

    def whoami(self) -> None:
        if self._may_write() is None:
            raise _Refusal(401, "Invalid username or password.")
        self._answer({"type": "user", "name": self.hub.owner})

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        commit, files = self._tree(kind, repo, revision)
        private = self._repository(kind, repo).private
        siblings = [{"rfilename": path} for path in sorted(files)]
        shared = {"id": repo, "sha": commit, "private": private, "siblings": siblings}
        self._answer({**shared, "tags": [], "downloads": 0, "likes": 0, "lastModified": "2025-01-17T00:00:00.000Z"})

    def refs(self, kind: str, repo: str) -> None:
        branches = self._repository(kind, repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches]
        self._answer({"branches": listed, "tags": [], "converts": []})

    def branch(self, kind: str, repo: str, branch: str) -> None:
        repository = self._repository(kind, repo, write=True)
        if branch in repository.branches:
            raise _Refusal(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = repository.branches["main"]
        self._answer({})

    # --- Endpoints: reading -----------------------------------------------------------------------

    def tree(self, kind: str, repo: str, revision: str, path: str = "") -> None:
        _, files = self._tree(kind, repo, revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        inside = {name: data for name, data in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound")
        entries = {}
        for name, data in inside.items():
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = _folder_entry(folder)
            if recursive or len(parts) == 1:
                entries[name] = _file_entry(name, data)
        self._answer([entries[name] for name in sorted(entries)])

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        _, files = self._tree(kind, repo, revision)
        entries = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in files:
                entries.append(_file_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append(_folder_entry(path))
        self._answer(entries)

    def resolve(self, repo: str, revision: str, path: str, kind: str = "model") -> None:
        commit, files = self._tree(kind, repo, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            message = f"{path} does not exist at {revision}"
            self._answer({}, 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": message})
            return
        data = files[path]
        if not path.endswith(LARGE):
            self._answer(data, 200, {**headers, "ETag": f'"{_git_oid(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"', "ETag": f'"{oid}"'}
        # As on the Hub, large files lie on another host.
        location = f"http://localhost:{self.hub.server.server_port}/lfs/{oid}"
        self._answer(b"", 302, {**headers, **linked, "Location": location})

    def lfs_get(self, oid: str) -> None:
        data = self.hub.large[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._answer(data, 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        self._answer(data[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # --- Endpoints: writing -----------------------------------------------------------------------

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        self._repository(kind, repo, write=True)
        _, files = self._tree(kind, repo, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            if path in files:
                entry = _file_entry(path, files[path])
                answer["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answers.append(answer)
        self._answer({"files": answers})

    def lfs_batch(self, repo: str, kind: str = "model") -> None:
        self._repository(kind, repo, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            there = item["oid"] in self.hub.large
            action = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            objects.append({**item, **action})
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        with self.hub.lock:
            hold = self.hub.uploads_before_hold == 0
            if self.hub.uploads_before_hold:
                self.hub.uploads_before_hold -= 1
        if hold:
            self.hub.holding.set()
            self.hub.released.wait(120)
            return
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        self.hub.stored.set()
        self._answer({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        _, files = self._tree(kind, repo, revision)
        files = dict(files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(revision, files)
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})


def _git_oid(data: bytes) -> str:
    """Name of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _file_entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
