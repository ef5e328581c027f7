"""Read ranges of files over HTTP into memory, whatever the server and the network do.

Ranges come by urllib3, which takes a third of the processor's time that the session of
huggingface_hub takes (docs/remote.md has the figures). What the hub's protocol asks for beside
that, such as tokens and redirects, stays with huggingface_hub.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from lean_merge.checkpoints.elsewhere import Arrivals, FarFile, Ranges, Room, Tasks
from lean_merge.errors import CheckpointError

MOST_CONNECTIONS = 16
_PIECE = 256 << 10
_JOINED = 4 << 20
_FEW = 8
"""So many spans are asked for one by one; of more, those that lie close together come at once."""
_GAP = 64 << 10
_FAILURES, _TRIES = 8, 64
"""How many requests in a row may fail without a byte, and how many one range may take at most."""
_LONGEST_WAIT = 900.0
_TIMEOUT = urllib3.Timeout(connect=20, read=60)
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOVED = frozenset({301, 302, 303, 307, 308})
_EXPIRED = frozenset({401, 403, 404, 410})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_RATE_LIMIT = re.compile(r"\bt=(\d+)")
NEVER = threading.Event()
"""An event that is never set, for reads that nothing ends early."""


class ClosedError(Exception):
    """The caller wants no more bytes."""


class AbsentError(CheckpointError):
    """There is no file at an address, or none that everyone may read."""


class AgainError(Exception):
    """A request failed, and another may not, after `wait` seconds if the server told any."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Traffic:
    """Counts what comes from other machines, and measures delay and bandwidth.

    Attributes
    ----------
    received
        The bytes of bodies that have come.
    """

    def __init__(self) -> None:
        self.received = 0
        self._lock = threading.Lock()
        self._delay = 0.0
        self._rate = 0.0
        self._since, self._before = time.monotonic(), 0
        self._not_before = 0.0

    def came(self, nbytes: int) -> None:
        """Take note of bytes that have come."""
        with self._lock:
            self.received += nbytes
            now = time.monotonic()
            if (elapsed := now - self._since) > 0.5:
                self._rate = (self.received - self._before) / elapsed
                self._since, self._before = now, self.received

    def delayed(self, seconds: float) -> None:
        """Take note of the time between a request and the first byte of its answer."""
        with self._lock:
            self._delay += (seconds - self._delay) * (0.2 if self._delay else 1.0)

    @property
    def rate(self) -> float:
        """Return the bytes a second that came lately."""
        return self._rate

    @property
    def under_way(self) -> float:
        """Return bandwidth times delay: the bytes that a link holds which is never idle."""
        return self._rate * self._delay

    def hold_on(self, seconds: float) -> None:
        """Take note that a server asks for no request in the next seconds."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def wait(self, closed: threading.Event) -> None:
        """Wait until requests are welcome again."""
        while (left := self._not_before - time.monotonic()) > 0 and not closed.wait(left):
            pass


TRAFFIC = Traffic()


@dataclass(frozen=True, slots=True)
class Location:
    """The URL at which a file's bytes are now, and the headers to ask for them.

    Both may hold secrets, so they are never shown. `is_passing` tells that the URL was made for us
    and may expire.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_passing: bool = False


class RangedFile(FarFile):
    """A file that a server sends by ranges.

    Parameters
    ----------
    label
        Its address, for messages.
    size
        Its length; None if only the first answer will tell.
    etag
        The mark of its content.
    locate
        A function that finds its present location, and raises CheckpointError if it has none or is
        no longer the same file.
    """

    def __init__(
        self, label: str, size: int | None, etag: str, locate: Callable[[], Location]
    ) -> None:
        self.label, self.size, self.etag = label, size, etag
        self._locate = locate
        self._location: Location | None = None
        self._marks: dict[str, str] = {}
        self._lock = threading.Lock()

    def read(self, ranges: Ranges, out: memoryview) -> None:
        if len(ranges) <= _FEW:
            done = 0
            for start, stop in ranges:
                self.fetch(start, [out[done : done + stop - start]])
                done += stop - start
            return
        for first, last, group in _joined(ranges):
            whole = bytearray(last - first)
            self.fetch(first, [memoryview(whole)])
            for start, stop, at in group:
                out[at : at + stop - start] = whole[start - first : stop - first]

    def arrivals(self, tasks: Tasks, room: Room, *, again: bool) -> Arrivals:
        from lean_merge.checkpoints.remote.arrivals import MovingWindow

        return MovingWindow(tasks, room, again=again)

    def fetch(
        self, start: int, parts: Sequence[memoryview], closed: threading.Event = NEVER
    ) -> None:
        """Fill `parts`, one after the other, with the bytes from `start` on.

        A cut connection is resumed where it was cut, and a busy server is waited for.

        Raises
        ------
        CheckpointError
            The bytes cannot be had, or the file has changed.
        ClosedError
            `closed` was set meanwhile.
        """
        sink = _Filling(parts)
        failures = tries = 0
        while sink.left:
            if closed.is_set():
                raise ClosedError
            TRAFFIC.wait(closed)
            before = sink.left
            try:
                self._request(start + sink.done, sink, closed)
            except AgainError as error:
                tries += 1
                failures = 0 if sink.left < before else failures + 1
                if failures >= _FAILURES or tries >= _TRIES:
                    raise CheckpointError(
                        f"{self.label}: cannot be read ({error}, {tries} times); run the command "
                        "again when the server and the connection are well."
                    ) from None
                if error.wait is not None:
                    TRAFFIC.hold_on(error.wait)
                elif failures:
                    closed.wait(min(30.0, PAUSE * 2 ** (failures - 1)))

    def _request(self, first: int, sink: _Filling, closed: threading.Event) -> None:
        """Ask once for all that the sink still lacks."""
        with self._lock:
            if self._location is None:
                self._location = self._locate()
            location = self._location
        stop = first + sink.left
        headers = {
            "Accept-Encoding": "identity",
            **location.headers,
            "Range": f"bytes={first}-{stop - 1}",
        }
        asked = time.monotonic()
        try:
            response = _pool(location.url).request(
                "GET",
                location.url,
                headers=headers,
                preload_content=False,
                redirect=False,
                retries=False,
                timeout=_TIMEOUT,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise AgainError(_reason(error)) from None
        try:
            TRAFFIC.delayed(time.monotonic() - asked)
            self._check(response, location, first, stop)
            while sink.left:
                if closed.is_set():
                    raise ClosedError
                room = sink.room()
                # Of a connection that is cut, `read1` alone gives all that came.
                data = response.read1(room.nbytes)
                if not data:
                    raise AgainError("the answer was too short")
                room[: len(data)] = data
                sink.took(len(data))
                TRAFFIC.came(len(data))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise AgainError(_reason(error)) from None
        finally:
            # What is left of a body would otherwise be read before the connection is used again.
            if sink.left:
                response.close()
            response.release_conn()

    def _check(
        self, response: urllib3.BaseHTTPResponse, location: Location, first: int, stop: int
    ) -> None:
        """Raise unless the answer has just the bytes [first, stop) of the same file."""
        status, headers = response.status, response.headers
        raise_if_busy(status, headers)
        if status in _MOVED or (status in _EXPIRED and location.is_passing):
            with self._lock:
                if self._location is location:
                    self._location = self._moved(location, headers.get("Location"))
            raise AgainError(f"status {status}", 0.0)
        if status == 416 and self.size is None and headers.get("Content-Range") == "bytes */0":
            self.size = 0
        if status == 200 and (first, stop) != (0, self.size):
            raise CheckpointError(
                f"{self.label}: its server ignores ranges and sends whole files; download it, and "
                "pass the folder."
            )
        if status not in (200, 206):
            kind = AbsentError if status in _EXPIRED else CheckpointError
            raise kind(f"{self.label}: {_meaning(status)}.")
        if status == 206:
            match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
            if match is None or (int(match[1]), int(match[2])) != (first, stop - 1):
                raise AgainError("the answer was another range")
            if match[3] != "*":
                self._check_size(int(match[3]))
        length = headers.get("Content-Length")
        if length is not None and length != str(stop - first):
            raise AgainError("the answer had another length")
        mark = headers.get("ETag") or headers.get("Last-Modified") or ""
        with self._lock:
            if self._marks.setdefault(urlsplit(location.url).netloc, mark) != mark:
                raise self.changed()
            self.etag = self.etag or mark

    def _moved(self, location: Location, target: str | None) -> Location | None:
        """Return the place that a redirect names; None to ask anew for a place that expired."""
        if target is None:
            return None
        url = urljoin(location.url, target)
        before, now = urlsplit(location.url), urlsplit(url)
        if now.scheme not in ("https", before.scheme):
            raise CheckpointError(
                f"{self.label}: its server redirects to a place without TLS; pass another address."
            )
        headers = location.headers if now.netloc == before.netloc else {}
        return Location(url, headers, is_passing=True)

    def learn_size(self) -> int:
        """Return the file's length, after asking for its first byte if it is not known."""
        if self.size is None:
            try:
                self.fetch(0, [memoryview(bytearray(1))])
            except CheckpointError:
                if self.size is None:
                    raise
        assert self.size is not None
        return self.size

    def _check_size(self, size: int) -> None:
        if self.size is None:
            self.size = size
        elif self.size != size:
            raise self.changed()

    def changed(self) -> CheckpointError:
        """Return the error for a file that is no longer what it was when it was opened."""
        return CheckpointError(
            f"{self.label}: has changed since it was opened, so what was read may be a mixture; "
            "merge again with --no-resume."
        )


PAUSE = 0.5
"""Seconds to wait after a first failure; each further one doubles them."""


class _Filling:
    """Memory in several parts that is filled from the first byte to the last."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = [part.cast("B") for part in parts]
        self.left = sum(part.nbytes for part in self._parts)
        self.done = self._at = self._number = 0

    def room(self) -> memoryview:
        """Return the next bytes to fill, at most `_PIECE`."""
        while self._at == self._parts[self._number].nbytes:
            self._number, self._at = self._number + 1, 0
        return self._parts[self._number][self._at : self._at + _PIECE]

    def took(self, count: int) -> None:
        """Take note that the first bytes of `room` are filled."""
        self._at += count
        self.done += count
        self.left -= count


def _joined(ranges: Ranges) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Group ranges that lie close together: first, last, and (start, stop, place in the output)."""
    group: list[tuple[int, int, int]] = []
    first = last = at = 0
    for start, stop in ranges:
        near = last <= start <= last + _GAP and stop - first <= _JOINED
        if group and not near:
            yield first, last, group
            group = []
        if not group:
            first = start
        group.append((start, stop, at))
        at, last = at + stop - start, stop
    if group:
        yield first, last, group


def raise_if_busy(status: int, headers: Mapping[str, str]) -> None:
    """Raise AgainError for a status that passes, with the time to wait if the server tells it."""
    if status in _BUSY:
        raise AgainError(f"status {status}", _told(headers))


def _told(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds a server asks to wait; None if it does not say."""
    after = headers.get("Retry-After", "").strip()
    wait: float | None = None
    if after.isdigit():
        wait = float(after)
    elif after:
        with suppress(TypeError, ValueError, OverflowError):
            wait = parsedate_to_datetime(after).timestamp() - time.time()
    if wait is None and (match := _RATE_LIMIT.search(headers.get("RateLimit", ""))):
        wait = float(match[1])
    return None if wait is None else min(_LONGEST_WAIT, max(0.0, wait))


def _meaning(status: int) -> str:
    if status == 401:
        return "needs a login (status 401); log in with `hf auth login`, or check the address"
    if status == 403:
        return "may not be read (status 403); ask its owner for access, or log in"
    if status in (404, 410):
        return f"is not there (status {status}); check the address and the revision"
    if status == 416:
        return "is shorter than when it was opened (status 416); merge again with --no-resume"
    return f"is answered with status {status}, which is not understood; check the address"


def _reason(error: Exception) -> str:
    """Return why a request failed, without the URL that the error's own text may show."""
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return "no connection"
    if isinstance(error, (urllib3.exceptions.TimeoutError, TimeoutError)):
        return "no answer in time"
    if isinstance(error, (urllib3.exceptions.SSLError, ssl.SSLError)):
        return "the server's certificate is not trusted, or TLS failed"
    return "the connection was cut"


class _WithoutQueries(logging.Filter):
    """Keeps the queries of URLs, which may be signatures, out of urllib3's debug messages."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                each.partition("?")[0] if isinstance(each, str) else each for each in record.args
            )
        return True


def _pool(url: str) -> urllib3.PoolManager:
    """Return the pool of connections for a URL: direct ones, or those of the system's proxy."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    return _pool_of("" if proxy is None or proxy_bypass(parts.hostname or "") else proxy)


@cache
def _pool_of(proxy: str) -> urllib3.PoolManager:
    logging.getLogger("urllib3.connectionpool").addFilter(_WithoutQueries())
    context = ssl.create_default_context()
    if proxy:
        return urllib3.ProxyManager(
            proxy, num_pools=8, maxsize=MOST_CONNECTIONS, ssl_context=context
        )
    return urllib3.PoolManager(num_pools=8, maxsize=MOST_CONNECTIONS, ssl_context=context)
