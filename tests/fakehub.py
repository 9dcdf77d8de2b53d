"""A Hugging Face Hub on the loopback interface, so that tests download for real. Standard library only.

    with FakeHub(trusted={"good"}) as hub, hub.patched(cache_folder):
        hub.add("good/norm", {"v1": kernel_files("norm", layers=SOURCE)})
        hub.fail(r"/resolve/", status=503, times=2)     # also drop=True, hub.cut, hub.corrupt, hub.delay
        ...
        hub.requests                                     # what was asked for, in order

A process that has not imported `huggingface_hub` yet can use `os.environ.update(hub.env(cache_folder))` instead of
`patched`. It serves repositories of kernels and, with `kind="model"`, of models. From a shell:
`python tests/fakehub.py ROOT --port 8123 --trust good` serves ROOT/<org>/<repo>/<branch>/.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

Tree = Mapping[str, "bytes | str"] | str | Path
_KINDS = {"kernels": "kernel", "models": "model", "datasets": "dataset", "spaces": "space"}
_IGNORED = {"__pycache__", ".git"}


@dataclass(frozen=True)
class Request:
    """One request that the Hub got and the status it answered (0: the connection was dropped)."""

    method: str
    path: str
    status: int
    authorization: str | None = None
    user_agent: str = ""


@dataclass
class Fault:
    """Something that goes wrong where the pattern matches a request's path, `times` times or always."""

    pattern: re.Pattern[str]
    what: str
    times: int | None = None
    status: int = 500
    code: str | None = None
    seconds: float = 0.0


@dataclass
class Repository:
    """A repository: commits are trees of files, branches and tags are names of commits."""

    name: str
    kind: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(
        self, source: Tree, *, branch: str | None = "main", tag: str | None = None, sha: str | None = None
    ) -> str:
        """Add a commit and let a branch or a tag mean it; its id follows from its content unless `sha` gives it."""
        files = read_files(source)
        digest = hashlib.sha1(f"{self.kind} {self.name} {branch} {tag}".encode())
        for path, data in sorted(files.items()):
            digest.update(f"{path} {blob_id(data)}\n".encode())
        sha = sha or digest.hexdigest()
        self.commits[sha] = files
        if branch is not None:
            self.branches[branch] = sha
        if tag is not None:
            self.tags[tag] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        return revision if revision in self.commits else self.branches.get(name) or self.tags.get(name)


class FakeHub:
    """The server. `lfs_over`: files of more bytes are redirected to another host name, as large files are."""

    def __init__(
        self, *, trusted: Collection[str] = (), lfs_over: int | None = None, page_size: int = 1000, port: int = 0
    ) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.organizations: dict[str, dict[str, Any]] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        self.lfs_over, self.page_size = lfs_over, page_size
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        for organization in trusted:
            self.add_organization(organization, trusted=True)

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_organization(self, name: str, *, trusted: bool = False) -> None:
        self.organizations[name] = {
            "name": name, "fullname": name, "avatarUrl": "", "numUsers": 1, "plan": "team",
            "trustedKernelPublisher": trusted,
        }  # fmt: skip

    def add(
        self,
        name: str,
        branches: Mapping[str, Tree],
        *,
        tags: Mapping[str, Tree] | None = None,
        kind: str = "kernel",
        private: bool = False,
        gated: bool = False,
    ) -> Repository:
        """Add commits to a repository, which is created where it does not exist, and its organisation with it."""
        repository = self.repositories.setdefault((kind, name), Repository(name, kind, private, gated))
        for branch, source in branches.items():
            repository.commit(source, branch=branch)
        for tag, source in (tags or {}).items():
            repository.commit(source, branch=None, tag=tag)
        owner = name.split("/")[0]
        if owner not in self.organizations:
            self.add_organization(owner)
        return repository

    def fail(
        self, pattern: str, *, status: int = 500, code: str | None = None, drop: bool = False, times: int | None = None
    ) -> None:
        """Answer with an error status, or drop the connection without an answer."""
        self._faults.append(Fault(re.compile(pattern), "drop" if drop else "fail", times, status, code))

    def delay(self, pattern: str, seconds: float, *, times: int | None = None) -> None:
        self._faults.append(Fault(re.compile(pattern), "delay", times, seconds=seconds))

    def corrupt(self, pattern: str, *, times: int | None = None) -> None:
        """Serve the right number of wrong bytes."""
        self._faults.append(Fault(re.compile(pattern), "corrupt", times))

    def cut(self, pattern: str, *, times: int | None = None) -> None:
        """Drop the connection after half of the bytes."""
        self._faults.append(Fault(re.compile(pattern), "cut", times))

    def heal(self) -> None:
        """End all faults."""
        with self._lock:
            self._faults.clear()

    def asked(self, pattern: str) -> list[str]:
        """The paths of the requests so far that match a pattern."""
        return [request.path for request in self.requests if re.search(pattern, request.path)]

    def fault(self, path: str, *whats: str) -> Fault | None:
        """Take the next fault of one of these sorts for a request."""
        with self._lock:
            for fault in self._faults:
                if fault.what in whats and fault.times != 0 and fault.pattern.search(path):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def env(self, cache: Path | str) -> dict[str, str]:
        """The environment for another process that is to use this Hub and a cache of its own."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_CACHE": str(Path(cache) / "hub"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "5", "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip

    @contextlib.contextmanager
    def patched(self, cache: Path | str, *, offline: bool = False) -> Iterator[FakeHub]:
        """Let the Hub client of this process use this Hub and a cache of its own."""
        import huggingface_hub.hf_api
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars

        values = {
            "ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(Path(cache) / "hub"),
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_XET": True,
        }
        client = huggingface_hub.hf_api.api
        before = {name: getattr(constants, name) for name in values}, client.endpoint, dict(os.environ)
        try:
            for name, value in values.items():
                setattr(constants, name, value)
            client.endpoint = self.url
            for name in ("KERNELS_CACHE", "LOCAL_KERNELS"):
                os.environ.pop(name, None)
            os.environ.update({"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"})
            disable_progress_bars()
            close_session()
            yield self
        finally:
            for name, value in before[0].items():
                setattr(constants, name, value)
            client.endpoint = before[1]
            os.environ.clear()
            os.environ.update(before[2])
            enable_progress_bars()
            close_session()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        if fault := self.hub.fault(self.path, "delay"):
            time.sleep(fault.seconds)
        if fault := self.hub.fault(self.path, "fail", "drop"):
            if fault.what == "fail":
                return self._error(fault.status, fault.code, "injected")
            self._log(0)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return None
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/api/organizations/([^/]+)/overview", path):
            found = self.hub.organizations.get(unquote(match[1]))
            return self._json(found) if found else self._error(404, None, "no such organization")
        if match := re.fullmatch(r"/api/(kernels|models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            repository = self._repository(_KINDS[match[1]], match[2])
            return self._api(repository, match[3] or "") if repository else None
        if match := re.fullmatch(r"/(?:(kernels|datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._repository(_KINDS[match[1] or "models"], match[2])
            return self._file(repository, unquote(match[3]), unquote(match[4])) if repository else None
        if match := re.fullmatch(r"/_large/([^/]+)/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            data = self.hub.repositories[match[1], unquote(match[2])].commits[match[3]][unquote(match[4])]
            return self._bytes(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        return self._error(404, None, f"not found: {path}")

    def _repository(self, kind: str, name: str) -> Repository | None:
        """The repository where the caller may read it; the Hub hides the others from anonymous callers with a 401."""
        found = self.hub.repositories.get((kind, unquote(name)))
        known = (self.headers.get("Authorization") or "").removeprefix("Bearer ") in self.hub.tokens
        if found is None or (found.private and not known):
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        if found.gated and not known:
            self._error(401, "GatedRepo", "Access to this repository is restricted")
            return None
        return found

    def _api(self, repository: Repository, rest: str) -> None:
        if rest == "refs":
            return self._json(
                {
                    "branches": _refs("heads", repository.branches),
                    "tags": _refs("tags", repository.tags),
                    "converts": [],
                    "pullRequests": [],
                }
            )
        match = re.fullmatch(r"(?:(revision|tree)/([^/]+)(?:/(.*))?)?", rest)
        if match is None:
            return self._error(404, None, f"not implemented: {rest}")
        revision = unquote(match[2] or "main")
        sha = repository.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if match[1] == "tree":
            return self._tree(repository, sha, unquote(match[3] or "").strip("/"))
        info = {
            "_id": "0", "id": repository.name, "author": repository.name.split("/")[0], "sha": sha, "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z", "private": repository.private, "gated": repository.gated,
            "downloads": 0, "likes": 0,
        }  # fmt: skip
        if repository.kind != "kernel":  # huggingface_hub 1.10.2 cannot read siblings of kernel repositories
            info["siblings"] = [{"rfilename": path} for path in repository.commits[sha]]
        return self._json(info, {"X-Repo-Commit": sha})

    def _tree(self, repository: Repository, sha: str, folder: str) -> None:
        query = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        recursive = query.get("recursive", "").lower() in ("1", "true")
        entries = self._entries(repository.commits[sha], folder, recursive=recursive)
        if folder and not entries:
            return self._error(404, "EntryNotFound", f"{folder} does not exist", {"X-Repo-Commit": sha})
        start, headers = int(query.get("cursor") or 0), {"X-Repo-Commit": sha}
        end = start + self.hub.page_size
        if end < len(entries):
            following = "&".join(f"{name}={quote(value)}" for name, value in {**query, "cursor": str(end)}.items())
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{following}>; rel="next"'
        return self._json(entries[start:end], headers)

    def _entries(self, files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path, data in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                if recursive or depth == 1:
                    name = prefix + "/".join(parts[:depth])
                    found[name] = {"type": "directory", "path": name, "oid": blob_id(name.encode()), "size": 0}
            if recursive or len(parts) == 1:
                found[path] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
                if self._is_large(data):
                    large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                    found[path]["lfs"] = large
        return list(found.values())

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        sha = repository.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        data = repository.commits[sha].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        headers = {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": sha}
        if not self._is_large(data):
            return self._bytes(data, headers)
        # Another host name than that of the Hub: the client stops at such a redirect and reads the X-Linked headers.
        location = f"http://localhost:{self.hub.port}/_large/{repository.kind}/{repository.name}/{sha}/{quote(path)}"
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        return self._reply(302, b"", {**headers, **linked, "Location": location})

    def _is_large(self, data: bytes) -> bool:
        return self.hub.lfs_over is not None and len(data) > self.hub.lfs_over

    def _bytes(self, data: bytes, headers: Mapping[str, str]) -> None:
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if self.command == "GET" and self.hub.fault(self.path, "corrupt"):
            data = bytes(byte ^ 1 for byte in data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2]) if match[2] else len(data) - 1
            span = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return self._reply(206, data[first : last + 1], {**headers, **span})
        return self._reply(200, data, headers)

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._reply(
            status, json.dumps({"error": message}).encode(), {"X-Error-Message": message, **named, **(headers or {})}
        )

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._log(status)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": "fake", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.fault(self.path, "cut"):
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def _log(self, status: int) -> None:
        if self.path == "/api/agent-harnesses":  # telemetry of the Hub client
            return
        authorization, agent = self.headers.get("Authorization"), self.headers.get("User-Agent", "")
        self.hub.requests.append(Request(self.command, self.path, status, authorization, agent))


def blob_id(data: bytes) -> str:
    """The id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_files(source: Tree) -> dict[str, bytes]:
    """The files of a directory, or of a dict from path to text or bytes, by their path."""
    if isinstance(source, Mapping):
        return {path: data.encode() if isinstance(data, str) else data for path, data in source.items()}
    files = (file for file in sorted(Path(source).rglob("*")) if file.is_file())
    named = {file.relative_to(source): file for file in files}
    return {path.as_posix(): file.read_bytes() for path, file in named.items() if not _IGNORED & set(path.parts)}


def kernel_files(
    name: str = "norm",
    *,
    layers: str | None = None,
    init: str = "",
    variants: Sequence[str] = ("torch-universal",),
    backend: str = "cpu",
    extra: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of a kernel repository in Python.

    `layers` is the text of `layers.py`, `init` goes before the import of it, `extra` are further files of each variant,
    and `metadata` replaces keys of `metadata.json` (None takes one out). The id follows from the content unless given.
    """
    files: dict[str, str] = {"README.md": f"# {name}\n"}
    for variant in variants:
        digest = hashlib.sha1(repr((name, variant, init, layers, extra)).encode()).hexdigest()[:12]
        content = {
            "name": name, "id": f"_{name.replace('-', '_')}_{digest}", "version": 1, "license": "apache-2.0",
            "python-depends": [], "backend": {"type": backend}, **(metadata or {}),
        }  # fmt: skip
        folder = f"build/{variant}"
        files[f"{folder}/metadata.json"] = json.dumps({key: v for key, v in content.items() if v is not None})
        files[f"{folder}/__init__.py"] = init + ("\nfrom . import layers\n" if layers is not None else "")
        if layers is not None:
            files[f"{folder}/layers.py"] = layers
        files |= {f"{folder}/{path}": text for path, text in (extra or {}).items()}
    return read_files(files)


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a tree of files and return its folder."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def forget_kernels() -> None:
    """Make the `kernels` library and Kernelwise forget what they have loaded and resolved in this process."""
    import sys

    from kernels import LayerRepository, get_loaded_kernels
    from kernels.layer import layer

    from kernelwise.sources import _import, _kernels_compat

    loaded = {kernel.metadata.id for kernel in get_loaded_kernels()}
    tops = loaded | {module.__name__ for module in _import._imported.values()}
    for name in [name for name in sys.modules if name in tops or name.split(".")[0] in tops]:
        del sys.modules[name]
    _kernels_compat.loaded_kernels().clear()
    _import._imported.clear()
    layer._CACHED_LAYER.clear()
    LayerRepository._resolve_revision.cache_clear()


def _refs(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in names.items()]


def main() -> None:
    """Serve a directory of repositories until interrupted."""
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on the loopback interface.")
    parser.add_argument("root", type=Path, help="ROOT/<org>/<repo>/<branch>/build/<variant>/...")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--trust", nargs="*", default=[])
    arguments = parser.parse_args()
    with FakeHub(port=arguments.port, trusted=arguments.trust) as hub:
        for folder in sorted(path for path in arguments.root.glob("*/*") if path.is_dir()):
            branches = {branch.name: branch for branch in folder.iterdir() if branch.is_dir()}
            hub.add(f"{folder.parent.name}/{folder.name}", branches)
        print(hub.url, *sorted(name for _, name in hub.repositories), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
