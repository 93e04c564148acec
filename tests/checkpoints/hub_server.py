"""A hub on this machine: what a repository holds, its files with redirect and Range, commits."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

RIGHT_TOKEN = "hf_right"
_LARGE = (".safetensors", ".bin", ".pkl", ".pth")


@dataclass
class Fault:
    """What goes wrong, how often, with requests for a place whose path has `match`."""

    place: str
    """"info", "file" (on the hub), "large" (elsewhere, after the redirect), "put" or "commit"."""
    match: str = ""
    times: int = 10**9
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    flipped_byte: int | None = None


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    knows_range: bool = True
    sizes: dict[str, object] = field(default_factory=dict)
    """Sizes that the listing states instead of the true ones."""
    siblings: object = None
    """What the listing has in place of the files."""


class HubServer:
    """Serves `repositories` at `address` and what is large at another port, until it is closed."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, dict[str, str]]] = []
        """Part, method, path and headers of each."""
        self.commits: list[dict] = []
        self._uploads: dict[str, bytes] = {}
        self._servers = []
        for part in ("hub", "large"):
            handler = type(part, (_Handler,), {"part": part, "hub": self})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self._servers.append(server)
        self.address, self.elsewhere = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, place: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.place == place and fault.match in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


def commit_of(repository: Repository) -> str:
    files = [(name, sha256(data)) for name, data in sorted(repository.files.items())]
    return hashlib.sha1(repr(files).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(maxsize=256)
def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: HubServer
    part: str

    def log_message(self, *args):
        pass

    def answer(self, status, data=None, headers=(), error=None):
        body = b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (*dict(headers).items(), ("Content-Type", "application/json")):
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def repository(self, name, *, reads_files):
        """Return a repository, or answer why it is not to be had."""
        found = self.hub.repositories.get(name)
        is_right = self.token == RIGHT_TOKEN
        if self.token not in (None, RIGHT_TOKEN):
            message = "Invalid credentials in Authorization header"
            self.answer(401, {"error": message}, {"X-Error-Message": message})
        elif found is None or (found.private and not is_right):
            self.answer(404 if is_right else 401, {"error": "not found"}, error="RepoNotFound")
        elif found.gated and reads_files and not is_right:
            self.answer(401 if self.token is None else 403, {"error": "gated"}, error="GatedRepo")
        else:
            return found
        return None

    def do_GET(self):
        if self.path == "/api/agent-harnesses":  # asked by the library once a process
            return self.answer(404)
        self.hub.requests.append((self.part, self.command, self.path, dict(self.headers)))
        path = unquote(urlsplit(self.path).path)
        if self.part == "large":
            return self.send_large(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.send_listing(found[1], found[2] or "main", path)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*found.groups())
        return self.answer(404, {"error": path})

    do_HEAD = do_GET  # noqa: N815

    def send_listing(self, name, revision, path):
        if fault := self.hub.fault("info", path):
            return self.answer(fault.status, {"error": "fault"}, fault.headers)
        repository = self.repository(name, reads_files=False)
        if repository is None:
            return None
        if revision not in ("main", "v1", commit_of(repository)):
            return self.answer(404, {"error": revision}, error="RevisionNotFound")
        siblings = []
        for file, data in repository.files.items():
            size = repository.sizes.get(file, len(data))
            sibling = {"rfilename": file, "size": size, "blobId": blob_id(data)}
            if file.endswith(_LARGE):
                sibling["lfs"] = {"sha256": sha256(data), "size": size, "pointerSize": 134}
            siblings.append(sibling)
        siblings = siblings if repository.siblings is None else repository.siblings
        listing = {"id": name, "sha": commit_of(repository), "siblings": siblings}
        return self.answer(200, listing)

    def send_file(self, name, revision, file):
        repository = self.repository(name, reads_files=True)
        if repository is None:
            return None
        commit = {"X-Repo-Commit": commit_of(repository)}
        if file not in repository.files:
            return self.answer(404, {"error": file}, commit, "EntryNotFound")
        data = repository.files[file]
        if not file.endswith(_LARGE):
            etag = {"ETag": f'"{blob_id(data)}"'}
            return self.send_content("file", file, data, commit | etag, repository)
        digest = sha256(data)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        place = f"{self.hub.elsewhere}/{name}/{digest}"
        return self.answer(302, None, {**commit, **linked, "Location": place})

    def send_large(self, path):
        name, _, digest = path.strip("/").rpartition("/")
        repository = self.hub.repositories[name]
        for file, data in repository.files.items():
            if sha256(data) == digest:
                return self.send_content("large", file, data, {"ETag": f'"{digest}"'}, repository)
        return self.answer(404)

    def send_content(self, place, file, data, headers, repository):
        fault = self.hub.fault(place, file) if self.command == "GET" else None
        if fault and fault.status:
            return self.answer(fault.status, {"error": "fault"}, fault.headers)
        span = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span and repository.knows_range else 0
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault and fault.flipped_byte is not None:
            data = bytearray(data)
            data[fault.flipped_byte] ^= 0xFF
        body = bytes(data[start:])
        if fault and fault.cut_after is not None:
            body = body[: fault.cut_after]
            self.close_connection = True
        self.wfile.write(body)
        if self.close_connection:
            self.wfile.flush()
            self.connection.shutdown(2)
        return None

    def body(self):
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_PUT(self):
        data = self.body()
        self.hub.requests.append((self.part, "PUT", self.path, dict(self.headers)))
        if fault := self.hub.fault("put", self.path):
            return self.answer(fault.status)
        digest = self.path.rpartition("/")[2]
        self.hub._uploads[digest] = data
        return self.answer(200 if sha256(data) == digest else 400)

    def do_POST(self):
        body = self.body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.part, "POST", path, dict(self.headers)))
        if "readonly" in path or b"readonly" in body:
            return self.answer(403, {"error": "Forbidden"})
        if self.token != RIGHT_TOKEN:
            return self.answer(401, {"error": "Unauthorized"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories.setdefault(name, Repository({}, private=is_private))
            return self.answer(200, {"url": f"{self.hub.address}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/missing" in path:
            return self.answer(404, {"error": "no revision"}, error="RevisionNotFound")
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(_LARGE) else "regular" for name in names}
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            return self.answer(200, {"files": files})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            place = f"{self.hub.elsewhere}/{found[1]}"
            objects = [
                {**o, "actions": {"upload": {"header": {}, "href": f"{place}/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            return self.take_commit(found[1], path, body)
        return self.answer(404, {"error": path})

    def take_commit(self, name, path, body):
        if fault := self.hub.fault("commit", path):
            return self.answer(fault.status)
        files = self.hub.repositories[name].files
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub._uploads[value["oid"]]
        commit = commit_of(self.hub.repositories[name])
        url = f"{self.hub.address}/{name}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
