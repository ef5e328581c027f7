"""Whatever a server and the network do wrong, the bytes are right or the error says what to do."""

from __future__ import annotations

import logging
import socket
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from support.families import Triple
from support.hubserver import COMMIT, Fault, HubServer

from lean_merge import open_checkpoint
from lean_merge.checkpoints.remote import client
from lean_merge.checkpoints.remote.client import Location, RangedFile, Traffic
from lean_merge.errors import CheckpointError


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for servers that do not say how long."""
    monkeypatch.setattr(client, "PAUSE", 0.0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that servers ask to wait, none of which passes."""
    waits: list[float] = []
    monkeypatch.setattr(Traffic, "hold_on", lambda self, seconds: waits.append(seconds))
    return waits


@pytest.fixture
def content(triple: Triple) -> bytes:
    return (triple.base / "model.safetensors").read_bytes()


@pytest.fixture
def far(hub: HubServer) -> RangedFile:
    """The base's weights at a URL that nobody redirects."""
    url = f"{hub.plain}/org/base/model.safetensors"
    return RangedFile("the file", None, "", lambda: Location(url))


def read(file: RangedFile, start: int, stop: int) -> bytes:
    out = bytearray(stop - start)
    file.fetch(start, [memoryview(out)])
    return bytes(out)


PASSING = {
    "cut at once": Fault(cut=0),
    "cut in the middle": Fault(cut=700),
    "429": Fault(429),
    "408": Fault(408),
    "500": Fault(500),
    "503": Fault(503),
    "another range": Fault(shift=8),
    "too long": Fault(length=5),
    "too short": Fault(length=-5),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(hub: HubServer, far: RangedFile, content: bytes, fault: Fault):
    read(far, 0, 1)
    hub.sent = 0
    hub.faults.extend([fault] * 3)
    assert read(far, 100, 5000) == content[100:5000]
    assert not hub.faults
    # A range is resumed where it was cut: nothing travels twice.
    if not fault.shift and not fault.length:
        assert hub.sent == 4900


def test_a_range_may_fill_several_places(far: RangedFile, hub: HubServer, content: bytes):
    hub.faults.append(Fault(cut=30))
    parts = [bytearray(n) for n in (10, 0, 50, 1)]
    far.fetch(7, [memoryview(part) for part in parts])
    assert b"".join(parts) == content[7:68]
    assert [first for _, first, _ in hub.ranges] == [7, 37]


@pytest.mark.parametrize("count", [3, 40])
def test_spans_that_lie_close_come_together(
    far: RangedFile, hub: HubServer, content: bytes, count: int
):
    spans = [(50 * n, 50 * n + 20) for n in range(count)]
    out = bytearray(20 * count)
    far.read(spans, memoryview(out))
    assert bytes(out) == b"".join(content[start:stop] for start, stop in spans)
    assert len(hub.ranges) == (count if count < 9 else 1)


def test_a_server_that_never_recovers_is_given_up(hub: HubServer, far: RangedFile):
    hub.faults.extend([Fault(503)] * 100)
    with pytest.raises(CheckpointError, match=r"the file: cannot be read \(status 503, 8 times\)"):
        read(far, 0, 10)


WAITS = {
    "seconds": ({"Retry-After": "7"}, 7),
    "window": ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"api";q=500;w=300'}, 55),
    "both": ({"Retry-After": "3", "RateLimit": '"api";r=0;t=55'}, 3),
    "for ever": ({"Retry-After": "1000000"}, 900),
    "nonsense": ({"Retry-After": "soon"}, None),
}


@pytest.mark.parametrize(("headers", "seconds"), WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_is_waited_for_as_it_asks(
    hub: HubServer,
    far: RangedFile,
    told: list[float],
    headers: dict[str, str],
    seconds: int | None,
    status: int,
):
    hub.faults.append(Fault(status, headers))
    read(far, 0, 10)
    assert told == ([] if seconds is None else [seconds])


def test_a_date_to_wait_for(hub: HubServer, far: RangedFile, told: list[float]):
    hub.faults.append(Fault(429, {"Retry-After": formatdate(time.time() + 100, usegmt=True)}))
    read(far, 0, 10)
    assert len(told) == 1 and 0 < told[0] <= 101


def test_all_connections_wait_together():
    traffic, closed = Traffic(), threading.Event()
    traffic.hold_on(0.05)
    start = time.monotonic()
    traffic.wait(closed)
    assert time.monotonic() - start >= 0.05
    traffic.hold_on(1000)
    closed.set()
    traffic.wait(closed)


LASTING = {
    "ranges ignored": (Fault(whole=True), "ignores ranges"),
    "another file": (Fault(etag="other"), "has changed since it was opened"),
    "absent": (Fault(404), "is not there"),
    "forbidden": (Fault(403), "may not be read"),
    "login": (Fault(401), "needs a login"),
    "beyond the end": (Fault(416), "is shorter than when it was opened"),
    "unknown": (Fault(418), "status 418"),
}


@pytest.mark.parametrize(("fault", "words"), LASTING.values(), ids=LASTING)
def test_what_does_not_pass_is_told(hub: HubServer, far: RangedFile, fault: Fault, words: str):
    read(far, 0, 1)
    hub.faults.append(fault)
    before = hub.sent
    with pytest.raises(CheckpointError, match=f"the file: .*{words}"):
        read(far, 0, 1000)
    assert len(hub.faults) == 0 and hub.sent - before <= 1 << 20


def test_a_file_that_grew(hub: HubServer, far: RangedFile):
    read(far, 0, 1)
    far.size = (far.size or 0) - 1
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        read(far, 0, 10)


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/?sig=SECRET"
        file = RangedFile("the file", 10, "", lambda: Location(url, is_passing=True))
        with pytest.raises(CheckpointError, match="no connection, 8 times") as caught:
            read(file, 0, 10)
    assert "SECRET" not in str(caught.value) and caught.value.__suppress_context__


# --- the hub -----------------------------------------------------------------------------------


def weights_of(hub: HubServer) -> tuple[RangedFile, bytes]:
    from lean_merge.checkpoints.elsewhere import FAR_FILES

    (file,) = open_checkpoint("hf://org/base").files
    found = FAR_FILES[file]
    assert isinstance(found, RangedFile)
    found._location = None
    hub.forget()
    return found, (hub.root / "org" / "base" / "model.safetensors").read_bytes()


def test_a_signed_place_that_expires_is_asked_for_again(hub: HubServer):
    file, content = weights_of(hub)
    hub.uses = 2
    for start in range(0, 500, 100):
        assert read(file, start, start + 100) == content[start : start + 100]
    assert len(hub.used) == 3 and hub.commits == {COMMIT}


@pytest.mark.parametrize("fault", [Fault(429, {"Retry-After": "0"}), Fault(500), Fault(503)])
def test_a_busy_hub_is_asked_again(hub: HubServer, fault: Fault):
    file, content = weights_of(hub)
    hub.hub_faults.extend([fault] * 2)
    assert read(file, 5, 50) == content[5:50]


def test_another_mark_at_the_hub_stops_the_run(hub: HubServer):
    file, _ = weights_of(hub)
    hub.hub_faults.append(Fault(etag="other"))
    with pytest.raises(CheckpointError, match=f"hf://org/base@{COMMIT}/.* has changed"):
        read(file, 0, 10)


REFUSALS = {
    "gated": ((403, "GatedRepo"), "is gated; accept its licence"),
    "private": ((401, "RepoNotFound"), "neither a folder here nor a model on the hub"),
    "broken": ((500, "Broken"), "cannot be reached"),
}


@pytest.mark.parametrize(("refusal", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_hub_refuses(hub: HubServer, refusal: tuple[int, str], words: str):
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=f"hf://org/base.*: .*{words}"):
        open_checkpoint("hf://org/base")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://org/absent", "neither a folder here nor a model"),
        ("hf://org/base@v9", "has no such revision"),
        ("hf://org", "write hf://org/name"),
        ("hf://org/base@../x y", "write hf://org/name"),
        ("http://example.com/model.safetensors", "write https://"),
        ("https://me:TOKEN@example.com/model.safetensors", "may hold a secret"),
        ("https://example.com/model.safetensors?sig=TOKEN", "may hold a secret"),
        ("https://example.com/model.bin", "is no .safetensors file and no index"),
    ],
)
def test_addresses_that_cannot_be_read(hub: HubServer, address: str, words: str):
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(address)
    assert "TOKEN" not in str(caught.value)


def test_offline_refuses_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for address in ("hf://org/base", "https://example.com/model.safetensors"):
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
            open_checkpoint(address)
    assert hub.requests == 0


def test_the_token_goes_to_the_hub_alone_and_into_no_message(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    hub.token = "hf_SECRET"
    with pytest.raises(CheckpointError, match="is gated"):
        open_checkpoint("hf://org/expert-2")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    checkpoint = open_checkpoint("hf://org/expert-2")
    assert checkpoint.tensors and hub.sent and not hub.leaks
    hub.token = "hf_OTHER"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("hf://org/expert-2")
    # The hub's own client tells signatures, though no token, to whoever traces its connections.
    logs = [each.getMessage() for each in caplog.records if not each.name.startswith("httpcore")]
    assert any("org/expert-2/model.safetensors" in text for text in logs)
    for text in (*logs, str(caught.value), repr(checkpoint)):
        assert "SECRET" not in text and "SIGNATURE" not in text
    assert "SECRET" not in caplog.text


def test_weights_in_pickles_are_not_read_from_afar(hub: HubServer, tmp_path: Path):
    folder = hub.root / "org" / "pickled"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"no safetensors weights .* org/pickled without hf"):
        open_checkpoint("hf://org/pickled")
