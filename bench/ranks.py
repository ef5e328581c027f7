"""Measure merges by several processes: `python bench/ranks.py [--scaling] [--kills 50] ...`.

--scaling compares one process of one thread with two, on models in memory-backed files, so that the
processor is the limit. Both ways begin with the start of Python and end with the sealed output, and
must give the same bytes. Rounds alternate, and the machine should be idle.

--kills N ends single ranks by SIGKILL at random moments; others, of another number, go on. Every
output must be the one of a merge that nobody disturbed.

--hosts merges by two ranks that have a network of their own each, joined by one virtual cable, and
each see the models and the output below a folder of their own. It needs root on Linux.

--model prints the times on paper of docs/scale.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import measure
from measure import GB, ROOT, note, table
from synthetic import add_size, shapes_of, write_triple

sys.path.insert(0, str(ROOT / "tests"))

PROGRAM = ("-c", "from lean_merge.cli import main; main()")
KINDS: dict[str, Sequence[str]] = {
    "ip_merging, checkpoint": (),
    "ip_merging, lora of rank 32": ("--output", "lora", "--lora-rank", "32"),
    "ties over the model": ("--method", "ties", "--set", "trim_over=model"),
}


def command(folder: Path, out: Path, *options: str) -> list[str]:
    """The merge of a triple by one thread."""
    roles = [f"--{role}={folder / role}" for role in ("base", "mllm", "expert")]
    limits = ("--device", "cpu", "--threads", "1", "--memory", "2GiB", "--quiet")
    return [sys.executable, *PROGRAM, "merge", *roles, "--out", str(out), *limits, *options]


def environment(rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    """The variables by which a launcher tells a process which rank it is."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return {**os.environ, **threads, **place, **{k: str(v) for k, v in ours.items()}, **more}


def timed(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> list[float]:
    """Run commands side by side; the seconds until the last ends, and the CPU seconds of each."""
    start = time.perf_counter()
    running = [
        subprocess.Popen(one, env=own) for one, own in zip(commands, environments, strict=True)
    ]
    spent = []
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"rank ended with {process.returncode}"
        spent.append(usage.ru_utime + usage.ru_stime)
    return [time.perf_counter() - start, *spent]


def weights_of(out: Path) -> dict[str, bytes]:
    """The digests of the weight files."""
    import hashlib

    files = sorted(out.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).digest() for file in files}


def scaling(folder: Path, rounds: int, size: int) -> str:
    """The table of one process beside `size` of them."""
    rows = []
    for kind, options in KINDS.items():
        found: dict[int, list[list[float]]] = {1: [], size: []}
        for number in range(rounds):
            written = {}
            for ranks in (1, size) if number % 2 == 0 else (size, 1):
                out = folder / f"out{ranks}"
                commands = [command(folder, out, *options)] * ranks
                port = 20000 + random.randrange(10000)
                own = [environment(rank, ranks, port) for rank in range(ranks)]
                found[ranks].append(timed(commands, own))
                written[ranks] = weights_of(out)
                shutil.rmtree(out)
            assert written[1] == written[size], f"{kind}: other bytes"
        one, all_ = (median(each[0] for each in found[ranks]) for ranks in (1, size))
        spent = [median(each[1] for each in found[1])]
        spent += [median(max(each[1:]) for each in found[size])]
        rows.append(
            (
                kind,
                *(f"{seconds:.1f}" for seconds in (one, all_)),
                f"{one / (size * all_):.2f}",
                *(f"{seconds:.1f}" for seconds in spent),
                f"{spent[0] / (size * spent[1]):.2f}",
            )
        )
    return table(
        (
            *("merge", "1 process, s", f"{size} processes, s", "efficiency"),
            *("CPU s of 1", "most CPU s of a rank", "efficiency by CPU s"),
        ),
        rows,
    )


# --- kills -------------------------------------------------------------------------------------


def announced(scene: Any, out: Path, ready: Path) -> None:
    """What dies: a merge that says when it begins."""
    from support.scenes import often

    (ready / os.environ["RANK"]).touch()
    with often():
        scene.merge(out)


def kills(count: int, seed: int) -> str:
    """Kill single ranks at random moments of merges of every kind."""
    from support.families import contents
    from support.ranks import Ranks
    from support.scenes import SCENES, assert_never_half_done, assert_same, make_scene

    seeded, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name:
        for kind, options in SCENES.items():
            scene = make_scene(Path(name, kind), options)
            found: Counter[str] = Counter()
            victims: Counter[int] = Counter()
            folder, ready = Path(name, kind, "killed"), Path(name, kind, "ready")
            span = 0.0
            while victims.total() < count:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                for _ in range(6):
                    size = seeded.choice((2, 2, 3, 4))
                    victim = seeded.randrange(size)
                    shutil.rmtree(ready, ignore_errors=True)
                    ready.mkdir()
                    ranks = Ranks(size, announced, scene, folder / "out", ready)
                    while len(list(ready.iterdir())) < size:
                        time.sleep(0.01)
                    begun = time.perf_counter()
                    if span:
                        time.sleep(seeded.random() * 1.2 * span)
                        ranks.kill(victim)
                    ends = ranks.join()
                    state = assert_never_half_done(folder, scene)
                    if not span:
                        span = time.perf_counter() - begun
                    if ends[victim].code == -signal.SIGKILL:
                        victims[victim] += 1
                        found[state] += 1
                        others = [end for rank, end in enumerate(ends) if rank != victim]
                        told = [f"rank {victim} has ended" in end.error for end in others]
                        assert all(told) or state == "complete", [end.error for end in others]
                    if state == "complete":
                        break
                scene.merge(folder / "out")
                assert_same(contents(folder / "out"), scene.expected)
                assert [each.name for each in folder.iterdir()] == ["out"]
            of = ", ".join(f"rank {rank}: {number}" for rank, number in sorted(victims.items()))
            left = ", ".join(f"{state} {number}" for state, number in sorted(found.items()))
            rows.append((kind, str(victims.total()), of, left, "0"))
            note(str(rows[-1]))
    return table(("merge", "kills", "of", "what was found", "lost"), rows)


# --- two hosts ---------------------------------------------------------------------------------


@contextlib.contextmanager
def two_networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a virtual cable between them; yield their names."""
    call: Callable[..., Any] = functools.partial(subprocess.run, check=True)
    names = [f"lean{os.getpid()}-{side}" for side in (0, 1)]
    try:
        for name in names:
            call(["ip", "netns", "add", name])
        ends = ["leanveth0", "leanveth1"]
        call(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
        for side, (name, end) in enumerate(zip(names, ends, strict=True)):
            call(["ip", "link", "set", end, "netns", name])
            inside = ["ip", "-n", name]
            call([*inside, "addr", "add", f"10.77.0.{side + 1}/24", "dev", end])
            call([*inside, "link", "set", end, "up"])
            call([*inside, "link", "set", "lo", "up"])
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def hosts(folder: Path) -> str:
    """Merge by two ranks on networks and below folders of their own; compare with one process."""
    timed([command(folder, folder / "one")], [environment(0, 1, 1)])
    shared = tempfile.mkdtemp(prefix="lean-hosts-")
    commands, own = [], []
    try:
        with two_networks() as names:
            for rank, name in enumerate(names):
                place = Path(shared, f"host{rank}")
                place.mkdir()
                inner = command(place, place / "two")
                mounted = f'mount --bind "{folder}" "{place}" && exec "$@"'
                outer = ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", mounted, "sh"]
                commands.append([*outer, *inner])
                own.append(
                    environment(
                        rank,
                        2,
                        29400,
                        MASTER_ADDR="10.77.0.1",
                        GLOO_SOCKET_IFNAME=f"leanveth{rank}",
                        LOCAL_RANK="0",
                        LOCAL_WORLD_SIZE="1",
                    )
                )
            seconds = timed(commands, own)[0]
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    same = weights_of(folder / "one") == weights_of(folder / "two")
    assert same, "the hosts wrote other bytes"
    sealed = not list((folder / "two").glob("*.partial"))
    assert sealed, "the output is not sealed"
    return (
        f"Two network namespaces, each with the folder mounted at a place of its own: sealed in "
        f"{seconds:.1f} s, the same bytes as one process."
    )


# --- on paper ----------------------------------------------------------------------------------

READ_PER_WRITTEN, SECONDS_PER_GB = 52.4 / 13.50, (78.8 + 19.0) / 13.50
"""Bytes read, and seconds of one core, for each byte and GB written: the whole 7B in RESULTS.md."""
START = 8.0
"""Seconds until the first tensor and after the last: imports, headers, the early look, the seal."""
MODELS = {"7B": 13.5, "70B": 141.0, "235B": 470.0, "671B": 1342.0}
"""GB of the output in bfloat16: two bytes for each parameter."""
MACHINES = {
    "laptop, 1 process of 4 threads, disk of 2 GB/s": (4, 2.0),
    "workstation, 4 processes of 4 threads, disk of 6 GB/s": (16, 6.0),
    "server, 16 processes of 4 threads, disks of 20 GB/s": (64, 20.0),
    "cluster, 8 nodes of 16 processes of 4 threads, shared disks of 50 GB/s": (512, 50.0),
}
"""The cores at work, and GB/s of what is read and written together."""


def on_paper() -> str:
    """The table of times by the model that docs/scale.md explains."""
    rows = []
    for machine, (cores, disk) in MACHINES.items():
        cells = []
        for written in MODELS.values():
            moved = written * (1 + READ_PER_WRITTEN) / disk
            computed = written * SECONDS_PER_GB / (cores * 0.9)
            cells.append(shown_time(START + max(moved, computed), moved > computed))
        rows.append((machine, *cells))
    return table(("machine", *MODELS), rows)


def shown_time(seconds: float, by_disk: bool) -> str:
    """A time for people, and what decides it."""
    text = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{text} ({'disk' if by_disk else 'cores'})"


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_size(parser, size="1b", layers=8)
    parser.add_argument("--scaling", action="store_true", help="one process beside several")
    parser.add_argument("--ranks", type=int, default=2, help="how many processes to compare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0, help="of each kind of merge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", action="store_true", help="two network namespaces")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), help="where to write")
    parser.add_argument("--model", action="store_true", help="the model of the time, on paper")
    arguments = parser.parse_args()
    if arguments.model:
        print(on_paper())
    if arguments.kills:
        print(kills(arguments.kills, arguments.seed))
    if arguments.scaling or arguments.hosts:
        shapes = shapes_of(arguments)
        with measure.scratch(arguments.scratch, shapes.nbytes * 2) as folder:
            note(f"writing a triple of {shapes.nbytes / GB:.1f} GB")
            write_triple(folder, shapes)
            if arguments.hosts:
                print(hosts(folder))
            if arguments.scaling:
                print(scaling(folder, arguments.rounds, arguments.ranks))


if __name__ == "__main__":
    main()
