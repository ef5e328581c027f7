"""Measure merges of models on another machine: `python bench/remote.py [--size 1b] [--rounds 3]`.

A server in a process of its own (tests/support/hubserver.py) speaks the hub's protocol on loopback.
It waits before each answer and sends at a limited rate, as a distant link does. Each round merges
in a fresh process. Printed are the share of the link that the merge used from its first request to
its sealed output, the bytes that were planned and sent, and the peak of anonymous memory beside the
prediction. --clients compares ways to fetch ranges, on a link without limits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import measure
from speed import triple_of
from synthetic import add_size, shapes_of

GBIT = 1e9 / 8
ROLES = ("base", "mllm", "expert")
RANGE, FETCHED, CONNECTIONS = 4 << 20, 128 << 20, 8


@contextmanager
def served(root: Path, delay: float, rate: float) -> Iterator[tuple[str, str]]:
    """Serve the models below root/org; yield the addresses of the hub and of its second host."""
    server = subprocess.Popen(
        [sys.executable, "-m", "support.hubserver", str(root), str(delay), str(rate)],
        cwd=measure.ROOT / "tests",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        hub, plain = server.stdout.readline().split()
        yield hub, plain
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()


def sent(plain: str) -> int:
    """Return the bytes of weights that the server has sent so far."""
    with urlopen(plain.removesuffix("plain") + "stats") as answer:
        found: int = json.load(answer)["sent"]
    return found


def merge_once(out: str, method: str) -> None:
    """Merge the models of the hub, and print what the run took."""
    from lean_merge import MergeRecipe, Resources, merge, plan
    from lean_merge.checkpoints.remote.client import TRAFFIC

    base, mllm, expert = (f"hf://org/{role}" for role in ROLES)
    work = plan(MergeRecipe(base, mllm, (expert,), merge_method=method), Resources(device="cpu"))
    opened, start, used = TRAFFIC.received, time.perf_counter(), time.process_time()
    report = merge(work, out).report
    facts = {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - used,
        "received": TRAFFIC.received - opened,
        "planned": work.prediction.travels,
        "predicted": report["memory"]["predicted_anonymous"],
        "peak": report["memory"]["peak_anonymous"],
    }
    print(json.dumps(facts))


def merges(options: argparse.Namespace, root: Path) -> str:
    """Merge in each round; return the table."""
    rows, shares = [], []
    for number in range(1, options.rounds + 1):
        with served(root, options.delay / 1e3, options.rate * GBIT) as (hub, plain):
            out = root / "out"
            done = measure.watch(
                [sys.executable, __file__, "--once", str(out), options.method],
                HF_ENDPOINT=hub,
                HF_HOME=str(root / "home"),
                PYTHONPATH=os.pathsep.join([str(measure.ROOT), *sys.path]),
            )
            facts, came = json.loads(done.output.splitlines()[-1]), sent(plain)
        subprocess.run(["rm", "-rf", str(out)], check=True)
        share = facts["received"] / facts["seconds"] / (options.rate * GBIT)
        shares.append(share)
        assert came <= 1.02 * facts["planned"], (came, facts["planned"])
        assert facts["peak"] <= facts["predicted"], facts
        rows.append(
            [
                number,
                f"{facts['seconds']:.1f}",
                f"{facts['processor']:.1f}",
                f"{share:.1%}",
                f"{came / 1e9:.3f}",
                f"{came / facts['planned']:.4f}",
                f"{facts['peak'] / 2**20:.0f} of {facts['predicted'] / 2**20:.0f}",
            ]
        )
    header = [
        "round",
        "seconds",
        "processor",
        "of the link",
        "GB sent",
        "sent / planned",
        "MiB at most",
    ]
    table = measure.table(header, rows)
    return f"{table}\n\nMedian share of the link: {median(shares):.1%}"


# --- clients --------------------------------------------------------------------------------------


def _urllib3(url: str) -> Callable[[int], int]:
    from lean_merge.checkpoints.remote.client import Location, RangedFile

    file = RangedFile(url, None, "", lambda: Location(url))

    def get(start: int) -> int:
        out = bytearray(RANGE)
        file.fetch(start, [memoryview(out)])
        return len(out)

    return get


def _requests(url: str) -> Callable[[int], int]:
    import requests

    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))

    def get(start: int) -> int:
        out, at = bytearray(RANGE), 0
        with session.get(url, headers=_asking(start), stream=True) as response:
            for part in response.iter_content(256 << 10):
                out[at : at + len(part)] = part
                at += len(part)
        return at

    return get


def _hub_session(url: str) -> Callable[[int], int]:
    from huggingface_hub import get_session

    session = get_session()

    def get(start: int) -> int:
        out, at = bytearray(RANGE), 0
        with session.stream("GET", url, headers=_asking(start)) as response:
            for part in response.iter_raw():
                out[at : at + len(part)] = part
                at += len(part)
        return at

    return get


def _hub_files(url: str) -> Callable[[int], int]:
    from huggingface_hub.utils import http_backoff

    # HfFileSystem's files fetch a range by this call, and hold its whole body as bytes.
    return lambda start: len(http_backoff("GET", url, headers=_asking(start), timeout=30).content)


def _asking(start: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{start + RANGE - 1}", "Accept-Encoding": "identity"}


CLIENTS = {
    "urllib3": _urllib3,
    "requests": _requests,
    "huggingface_hub's session (httpx)": _hub_session,
    "huggingface_hub's HfFileSystem": _hub_files,
}


def fetch_once(name: str, url: str) -> None:
    """Fetch by one client, and print seconds of the wall and of the processor for a gigabyte."""
    get = CLIENTS[name](url)
    get(0)
    start, before = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        count = sum(pool.map(get, range(0, FETCHED, RANGE)))
    assert count == FETCHED
    wall, processor = time.perf_counter() - start, time.process_time() - before
    print(json.dumps([wall / (count / 1e9), processor / (count / 1e9)]))


def clients(options: argparse.Namespace, root: Path) -> str:
    """Fetch by every client in turn; return the table of medians."""
    file = root / "range.safetensors"
    with file.open("wb") as stream:
        stream.truncate(FETCHED)
    found: dict[str, list[list[float]]] = {name: [] for name in CLIENTS}
    with served(root, 0, 0) as (_, plain):
        for _ in range(options.rounds):
            for name, values in found.items():
                command = [sys.executable, __file__, "--client", name, f"{plain}/{file.name}"]
                done = measure.watch(command, PYTHONPATH=str(measure.ROOT))
                values.append(json.loads(done.output.splitlines()[-1]))
    rows = [
        [name, f"{1e3 / median(wall):.0f}", f"{median(processor):.2f}"]
        for name, values in found.items()
        for wall, processor in [zip(*values, strict=True)]
    ]
    return measure.table(["client", "MB/s", "processor seconds a GB"], rows)


def main() -> None:
    """Measure, print, and exit with 1 if the median share of the link is under --least."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_size(parser, size="1b", layers=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds")
    parser.add_argument("--rate", type=float, default=1.0, help="Gbit/s")
    parser.add_argument("--least", type=float, default=0.85, help="median share of the link")
    parser.add_argument("--triple", type=Path, help="an existing triple of these shapes")
    parser.add_argument("--scratch", type=Path, help="where to write")
    parser.add_argument("--clients", action="store_true")
    parser.add_argument("--method", default="ip_merging")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        return merge_once(*options.once)
    if options.client:
        return fetch_once(*options.client)
    print(measure.machine())
    if options.clients:
        with measure.scratch(options.scratch, FETCHED) as root:
            print(clients(options, root))
        return None
    with (
        triple_of(options, shapes_of(options)) as triple,
        measure.scratch(options.scratch, shapes_of(options).nbytes) as root,
    ):
        (root / "org").mkdir()
        for role in ROLES:
            (root / "org" / role).symlink_to(triple / role)
        text = merges(options, root)
    print(text)
    if float(text.rsplit(" ", 1)[1].rstrip("%")) < 100 * options.least:
        sys.exit(1)


if __name__ == "__main__":
    main()
