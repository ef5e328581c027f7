"""Several processes that work together as the ranks of one job, forked from a warm interpreter."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from lean_merge.engine import CREW, Event, RunResult, run
from lean_merge.outputs.base import Sink
from lean_merge.plan import Plan
from lean_merge.store.joining import JoinedFolder, share, take_over
from lean_merge.studies.ranks import joined
from lean_merge.studies.ranks.job import Job
from lean_merge.studies.ranks.sharing import deal, edges

PATIENCE = 120
"""After so many seconds a rank that has not ended is taken for one that never will."""


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, and what its work returned or the error that it raised."""

    code: int | None
    result: Any = None
    error: str = ""


class Ranks:
    """Ranks that have been started; `join` waits for their ends."""

    def __init__(self, size: int, work: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        # The server imports torch once and computes nothing, so its forks are cheap and safe.
        context.set_forkserver_preload(["lean_merge", "support.scenes", "support.ranks"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.started: list[tuple[BaseProcess, Connection]] = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            given = (theirs, rank, size, port, work, args)
            process = context.Process(target=_be_rank, args=given)
            process.start()
            theirs.close()
            self.started.append((process, ours))

    def kill(self, rank: int) -> None:
        """Kill a rank by SIGKILL."""
        self.started[rank][0].kill()

    def join(self) -> list[Ended]:
        """Wait until every rank has ended."""
        ends = []
        for process, ours in self.started:
            process.join(PATIENCE)
            assert process.exitcode is not None, "a rank does not end"
            try:
                result, error = ours.recv()
            except EOFError:
                result, error = None, "it was killed"
            ends.append(Ended(process.exitcode, result, error))
        return ends


def _be_rank(
    told: Connection, rank: int, size: int, port: int, work: Callable[..., Any], args: Any
) -> None:
    # The loopback device is there without a network, too.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        with joined():
            told.send((work(*args), ""))
    except BaseException as error:
        told.send((None, f"{type(error).__name__}: {error}"))


def in_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `work` returns in each of `size` ranks, none of which may fail."""
    ends = Ranks(size, work, *args).join()
    assert [each.error for each in ends] == [""] * size
    return [each.result for each in ends]


class OneLink:
    """What a rank finds in the place of links if all ranks are one process."""

    rank = 0

    def check(self) -> None:
        """Nobody is lost."""


class InTurn(Job):
    """A crew whose ranks are one process, which carries out one share after another.

    Rank 0 comes last, so that whatever interrupts it finds the others' journals on the disk.
    """

    def __init__(self, size: int) -> None:
        self.link = OneLink()
        super().__init__(self.link)  # type: ignore[arg-type]
        self.size = size

    def together(self, plan: Plan, out: Path, work: Callable[[], Any]) -> Any:
        """Do the work."""
        self.at_work = True
        try:
            return work()
        finally:
            self.at_work = False

    def run(self, plan: Plan, sink: Sink, on_event: Callable[[Event], None]) -> RunResult:
        """Run all shares, each as its rank would, through a folder of its own."""
        folder = sink.folder
        assert folder is not None
        todo = [n for n, task in enumerate(plan.tasks) if sink.finished(task) is None]
        shares = deal(plan, todo, self.size)
        start, blocks_from = share(folder, plan.output.bytes_on_disk, self.size)
        for rank in reversed(range(1, self.size)):
            self.link.rank = rank
            with JoinedFolder(
                folder.path, plan.shards, start, part=rank, blocks_from=blocks_from[rank]
            ) as joined_folder:
                self._share(plan, plan.output.sink(joined_folder), shares, on_event)
        self.link.rank = 0
        result, _ = self._share(plan, sink, shares, on_event)
        names = {plan.tasks[n].tensor.name: rank for rank, own in enumerate(shares) for n in own}
        take_over(folder, edges(folder.shards, names))
        alone = CREW.set(None)
        try:
            whole = run(plan, sink, lambda event: None)
        finally:
            CREW.reset(alone)
        return replace(whole, seconds=result.seconds)

    def spread(self, weights: Any, products: Any) -> Any:
        """Compute all."""
        return products(weights)


@contextmanager
def in_turn(size: int) -> Iterator[None]:
    """Let merges inside of the block be made by so many ranks, one after another."""
    before = CREW.set(InTurn(size))
    try:
        yield
    finally:
        CREW.reset(before)
