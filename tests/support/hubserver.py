"""A server on loopback that speaks the hub's protocol: the hub itself, and a second host for bytes.

The hub knows repositories, which are folders org/name below a root: it lists them, answers HEAD
with marks and sizes, sends small files, and redirects whoever asks for weights to the second host,
by URLs that are signed and may expire. The second host sends ranges. Both can be told to fail.
`python -m support.hubserver ROOT` runs it as a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from support.families import Triple

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1.0", COMMIT)
_CHUNK = 128 << 10


@dataclass
class Fault:
    """One wrong answer.

    `status` and `headers` replace those of the answer; `cut` closes the connection after so many
    bytes of the body, `length` is added to the stated length, `shift` to the range that is sent,
    `whole` ignores the range, and `etag` is another mark.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    length: int = 0
    shift: int = 0
    whole: bool = False
    etag: str = ""


class _Host(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, site: HubServer, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.site = site

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that go away."""


class HubServer:
    """Both hosts, what they were asked for, and how they are to fail.

    Attributes
    ----------
    sent
        The bytes of weights that the second host sent.
    ranges
        Each range of weights that it was asked for: name, first and last byte.
    faults, hub_faults
        Wrong answers to give next to requests for weights, and to HEADs of weights at the hub.
    token
        The token without which the hub tells nothing; "" for none.
    leaks
        Headers with a token that reached the second host.
    uses
        How often a signed URL may be used.
    delay, rate
        Seconds before the first byte of each answer with weights, and bytes a second of all of
        them together; 0 for none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sent = 0
        self.ranges: list[tuple[str, int, int]] = []
        self.fetched: list[str] = []
        self.requests = 0
        self.faults: deque[Fault] = deque()
        self.hub_faults: deque[Fault] = deque()
        self.token = ""
        self.refusal: tuple[int, str] | None = None
        self.leaks: list[str] = []
        self.commits: set[str] = set()
        self.uses = 1 << 30
        self.delay, self.rate = 0.0, 0.0
        self.used: dict[str, int] = {}
        self.lock = threading.Lock()
        self.free_at = 0.0
        self.hub = _Host(self, _Hub)
        self.store = _Host(self, _Store)
        self._threads = [
            threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            for host in (self.hub, self.store)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    @property
    def plain(self) -> str:
        """Where the second host has every file under its own path, without any signature."""
        return f"http://127.0.0.1:{self.store.server_port}/plain"

    def forget(self) -> None:
        """Count anew, and fail no more."""
        with self.lock:
            self.sent = self.requests = 0
            self.ranges, self.fetched, self.leaks, self.used = [], [], [], {}
            self.commits = set()
        self.faults.clear()
        self.hub_faults.clear()
        self.token, self.refusal, self.uses = "", None, 1 << 30

    def close(self) -> None:
        for host in (self.hub, self.store):
            host.shutdown()
            host.server_close()
        for thread in self._threads:
            thread.join()

    def pace(self, nbytes: int) -> None:
        """Sleep as long as the link takes for so many bytes after those of everyone else."""
        if not self.rate:
            return
        with self.lock:
            now = time.monotonic()
            self.free_at = max(self.free_at, now - 0.01) + nbytes / self.rate
            wait = self.free_at - now
        if wait > 0.002:
            time.sleep(wait)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Host

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    @property
    def site(self) -> HubServer:
        return self.server.site

    @property
    def path_only(self) -> str:
        return unquote(urlsplit(self.path).path)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.site.lock:
            self.site.requests += 1
        self.reply()

    def reply(self) -> None:
        raise NotImplementedError


class _Hub(_Handler):
    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def reply(self) -> None:
        site, path = self.site, self.path_only
        if site.refusal is not None:
            return self.refuse(*site.refusal)
        if site.token and self.headers.get("Authorization") != f"Bearer {site.token}":
            return self.refuse(401, "GatedRepo")
        facts = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = tree or file or facts
        folder = site.root / match[1] if match else site.root / "none"
        if match is None or not folder.is_dir():
            return self.refuse(404, "RepoNotFound")
        if (match[2] or "main") not in REVISIONS:
            return self.refuse(404, "RevisionNotFound")
        names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        if file:
            with site.lock:
                site.commits.add(match[2])
            return self.file(folder, file[3], names)
        if tree:
            return self.json([self.entry(folder, name) for name in names])
        siblings = [
            {"rfilename": name, "size": size, "blobId": oid, **({"lfs": lfs} if lfs else {})}
            for name in names
            for _, size, oid, lfs in [facts_of(folder / name)]
        ]
        return self.json({"id": match[1], "sha": COMMIT, "siblings": siblings})

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def entry(self, folder: Path, name: str) -> dict[str, object]:
        _, size, oid, lfs = facts_of(folder / name)
        return {"type": "file", "path": name, "size": size, "oid": oid} | (
            {"lfs": {"oid": lfs["sha256"], "size": size, "pointerSize": 100}} if lfs else {}
        )

    def file(self, folder: Path, name: str, names: list[str]) -> None:
        if name not in names:
            return self.refuse(404, "EntryNotFound")
        site = self.site
        _, size, oid, lfs = facts_of(folder / name)
        if self.command == "GET":
            with site.lock:
                site.fetched.append(name)
        if not lfs:
            data = (folder / name).read_bytes()
            return self.answer(200, data, {"ETag": f'"{oid}"', "X-Repo-Commit": COMMIT})
        fault = site.hub_faults.popleft() if site.hub_faults else Fault()
        if fault.status:
            return self.answer(fault.status, b"", fault.headers)
        with site.lock:
            signature = f"SIGNATURE-{len(site.used)}"
            site.used[signature] = 0
        place = quote(f"/{folder.relative_to(site.root).as_posix()}/{name}")
        return self.answer(
            302,
            b"",
            {
                "Location": f"http://127.0.0.1:{site.store.server_port}{place}?sig={signature}",
                "X-Linked-Etag": f'"{fault.etag or lfs["sha256"]}"',
                "X-Linked-Size": str(size),
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{oid}"',
            },
        )


class _Store(_Handler):
    def reply(self) -> None:
        site, path = self.site, self.path_only
        if "Authorization" in self.headers:
            with site.lock:
                site.leaks.append(self.headers["Authorization"])
        if path == "/stats":
            return self.answer(200, json.dumps({"sent": site.sent}).encode())
        if path.startswith("/plain/"):
            path = path.removeprefix("/plain")
        else:
            signature = parse_qs(urlsplit(self.path).query).get("sig", [""])[0]
            with site.lock:
                uses = site.used.get(signature, site.uses)
                site.used[signature] = uses + 1
            if uses >= site.uses:
                return self.answer(403)
        file = site.root / path.lstrip("/")
        if not file.is_file():
            return self.answer(404)
        self.send_range(file)

    def send_range(self, file: Path) -> None:
        site, size = self.site, file.stat().st_size
        is_weights = file.suffix == ".safetensors"
        fault = site.faults.popleft() if is_weights and site.faults else Fault()
        if fault.status:
            return self.answer(fault.status, b"", fault.headers)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, stop, status = 0, size, 200
        headers = {"ETag": f'"{fault.etag or facts_of(file)[2]}"', "Accept-Ranges": "bytes"}
        if asked and not fault.whole:
            first, stop, status = int(asked[1]), min(int(asked[2]) + 1, size), 206
            if first >= size:
                return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
            first, stop = first + fault.shift, stop + fault.shift
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{size}"
        if is_weights:
            with site.lock:
                site.ranges.append((file.name, first, stop))
        if site.delay:
            time.sleep(site.delay)
        self.send_response(status)
        headers["Content-Length"] = str(stop - first + fault.length)
        for name, value in {**headers, **fault.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault.cut is not None:
            stop = min(stop, first + fault.cut)
        self.close_connection |= fault.cut is not None or fault.length != 0
        with file.open("rb") as stream:
            while first < stop:
                count = min(_CHUNK, stop - first)
                site.pace(count)
                # It counts before it is sent, so that whoever has it finds it counted.
                if is_weights:
                    with site.lock:
                        site.sent += count
                self.connection.sendfile(stream, first, count)
                first += count


def facts_of(file: Path) -> tuple[str, int, str, dict[str, Any] | None]:
    """A file's name, size, Git's id, and the facts of large files, which weights are."""
    status = file.stat()
    return _facts(file, status.st_size, status.st_mtime_ns)


@cache
def _facts(file: Path, size: int, time_ns: int) -> tuple[str, int, str, dict[str, Any] | None]:
    if file.suffix != ".safetensors":
        oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
        return file.name, size, oid, None
    # Nobody hashes the content here, so that large files can be served at once.
    sha = hashlib.sha256(f"{file} {size} {time_ns}".encode()).hexdigest()
    return file.name, size, sha[:40], {"sha256": sha, "size": size, "pointerSize": 100}


def main() -> None:
    site = HubServer(Path(sys.argv[1]))
    site.delay, site.rate = (float(each) for each in (*sys.argv[2:4], "0", "0")[:2])
    print(site.url, site.plain, flush=True)
    sys.stdin.read()
    site.close()


if __name__ == "__main__":
    main()


def named(triple: Triple) -> dict[str, Path]:
    """Return the folders of a triple by the names that they have at the hub."""
    experts = {f"expert-{number}": path for number, path in enumerate(triple.experts, 1)}
    return {"base": triple.base, "mllm": triple.mllm, **experts}
