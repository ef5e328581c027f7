"""Messages between the processes of a job, by torch.distributed, and the news that one has ended.

Every rank has a link to rank 0, and to nobody else. On each link two threads work, one that sends
and one that receives, so that messages never wait for what a rank is computing. The system closes
the connections of a process that ends, however it ends, and so its peer learns of that at once. A
machine that vanishes closes nothing; so both sides send a sign of life from time to time, and what
is silent for long counts as lost.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

from lean_merge.errors import LeanMergeError

ALIVE_EVERY = 10.0
"""A link on which nothing was sent for so many seconds sends a sign of life."""
SILENCE = timedelta(minutes=5)
"""A rank that is silent for so long counts as lost."""


class RankError(LeanMergeError):
    """Another rank has ended, or cannot go on."""

    def __init__(self, message: str, exit_code: int = LeanMergeError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Message:
    """A message: the rank that sent it, its kind, and what it holds."""

    sender: int
    kind: str
    content: Any = None


class Links:
    """The links of this rank: those of rank 0 to all others, or that of another rank to rank 0.

    `torch.distributed` is initialised. As a context manager it ends the threads, which waits until
    the peers do the same.

    Attributes
    ----------
    rank, size
        This rank's number, and how many ranks there are.
    """

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        peers = range(1, self.size) if self.rank == 0 else (0,)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outboxes: Mapping[int, queue.SimpleQueue[tuple[str, Any]]] = {
            peer: queue.SimpleQueue() for peer in peers
        }
        self._fault: RankError | None = None
        self._threads = [
            threading.Thread(target=work, args=(peer,), name=f"rank {peer}", daemon=True)
            for peer in peers
            for work in (self._receive_from, self._send_to)
        ]

    def __enter__(self) -> Links:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.tell("bye")
        for thread in self._threads:
            thread.join()

    def send(self, peer: int, kind: str, content: Any = None) -> None:
        """Send a message to one peer, in the background."""
        self._outboxes[peer].put((kind, content))

    def tell(self, kind: str, content: Any = None) -> None:
        """Send a message to all peers, in the background."""
        for peer in self._outboxes:
            self.send(peer, kind, content)

    def receive(self, *kinds: str) -> Message:
        """Wait for the next message, which must be of one of `kinds`. Raises RankError."""
        self.check()
        message = self._inbox.get()
        self.check()
        if message.kind not in kinds:
            raise RankError(
                f"rank {message.sender} is at another step ({message.kind}, not {kinds[0]}); start "
                "all ranks by the same command."
            )
        return message

    def gather(self, kind: str, own: Any) -> list[Any]:
        """Return what every rank gives to its own call of this, by rank. Raises RankError."""
        if self.rank != 0:
            self.tell(kind, own)
            found: list[Any] = self.receive(kind).content
            return found
        given = {0: own}
        while len(given) < self.size:
            message = self.receive(kind)
            given[message.sender] = message.content
        everything = [given[rank] for rank in range(self.size)]
        self.tell(kind, everything)
        return everything

    def check(self) -> None:
        """Raise RankError if a peer is lost, or has said that it cannot go on."""
        if self._fault is not None:
            raise self._fault

    def fail(self, error: BaseException, code: int) -> None:
        """Say that this rank cannot go on because of `error`, unless others cannot either."""
        if self._fault is None:
            text = str(error) if isinstance(error, LeanMergeError) else ""
            self.tell("failed", (f"rank {self.rank}: {text or type(error).__name__}", code))
        elif self.rank == 0:
            self.tell("failed", (str(self._fault), self._fault.exit_code))

    def _set_fault(self, text: str, code: int = LeanMergeError.exit_code) -> None:
        if self._fault is None:
            self._fault = RankError(text, code)
        # Whoever waits for a message looks at the fault first.
        self._inbox.put(Message(self.rank, "failed"))

    def _receive_from(self, peer: int) -> None:
        while True:
            try:
                kind, content = _received(peer)
            except RuntimeError as error:
                how = "is silent" if "Timed out" in str(error) else "has ended"
                self._set_fault(
                    f"rank {peer} {how}, so all ranks stop; the same command goes on where they "
                    "stopped."
                )
                self._outboxes[peer].put(("bye", None))
                return
            if kind == "failed":
                self._set_fault(*content)
            elif kind != "alive":
                self._inbox.put(Message(peer, kind, content))
            if kind == "bye":
                return

    def _send_to(self, peer: int) -> None:
        while True:
            try:
                message = self._outboxes[peer].get(timeout=ALIVE_EVERY)
            except queue.Empty:
                message = ("alive", None)
            try:
                torch.distributed.send_object_list([message], dst=peer)
            except RuntimeError:
                # The thread that receives will say so.
                return
            if message[0] == "bye":
                return


def _received(peer: int) -> tuple[str, Any]:
    held: list[Any] = [None]
    torch.distributed.recv_object_list(held, src=peer)
    kind, content = held[0]
    return kind, content
