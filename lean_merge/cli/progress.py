"""Show on a terminal what a command does, how far it has come, and how long it will take.

The line is drawn on the standard error, and only if that is a terminal. It names the phase, and has
the width of the terminal. A thread draws it again twice a second, so that time is seen to pass
while a large weight is at work.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from lean_merge.errors import plain
from lean_merge.sizes import format_size

if TYPE_CHECKING:
    from lean_merge.engine import EarlyLook, Event
    from lean_merge.plan import Plan

EVERY = 0.5
"""Seconds between two drawings of the line."""
_ANALYSIS = "analysis"
_BOLD, _DIM, _PLAIN, _CLEAR = "\x1b[1m", "\x1b[2m", "\x1b[0m", "\r\x1b[2K"


def clock(seconds: float) -> str:
    """Return a time as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cut_in_the_middle(name: str, width: int) -> str:
    """Return `name` in at most `width` columns: its beginning and its end tell it apart."""
    if len(name) <= width:
        return name
    if width < 5:
        return ""
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def status_line(
    phase: str, name: str, *, done: int, total: int, elapsed: float, width: int, more: str = ""
) -> tuple[str, str]:
    """Return the two parts of the line, the second of which is less important.

    Parameters
    ----------
    phase, name
        What is done, and the tensor that was finished last.
    done, total
        Bytes; without a total, neither the share nor the time left is known.
    elapsed
        Seconds since the phase began.
    width
        The columns that both parts may take together.
    more
        What else there is to say.
    """
    told = f"{phase}  {clock(elapsed)}"
    if total:
        share = min(done / total, 1.0)
        told = f"{phase} {share:>4.0%}  {format_size(done)} of {format_size(total)}"
        told += f"  {clock(elapsed)} elapsed"
        if done:
            told += f", {clock(elapsed * (1 - share) / share)} left"
    told = f"{told}{more}"[:width]
    space = width - len(told) - 2
    return told, f"  {cut_in_the_middle(name, space)}" if name and space > 4 else ""


class StatusLine:
    """A line at the bottom of a terminal that says what is going on; it is closed at first."""

    def __init__(self) -> None:
        self._stream: TextIO | None = None
        self._lock = threading.RLock()
        self._phase, self._name, self._done, self._total = "", "", 0, 0
        self._more = ""
        self._start, self._ticks = 0.0, False

    @property
    def is_open(self) -> bool:
        """Return whether a command shows the line."""
        return self._stream is not None

    @property
    def phase(self) -> str:
        """Return the phase that was begun last."""
        return self._phase

    @contextmanager
    def opened(self, stream: TextIO) -> Iterator[None]:
        """Draw the line on a terminal while the block runs."""
        self._stream = stream
        ended = threading.Event()

        def draw_again() -> None:
            while not ended.wait(EVERY):
                with self._lock:
                    if self._ticks:
                        self._draw()

        thread = threading.Thread(target=draw_again, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.rest()
            self._stream = None

    def begin(self, phase: str, total: int = 0, *, ticks: bool = True) -> None:
        """Begin a phase, of `total` bytes if that is known, and draw it at once.

        With `ticks` it is drawn again and again; without, others may write to the terminal.
        """
        with self._lock:
            self._phase, self._name, self._done, self._total = phase, "", 0, total
            self._more = ""
            self._start, self._ticks = time.monotonic(), ticks
            self._draw()

    def advance(self, name: str, nbytes: int, more: str = "") -> None:
        """Note that a tensor of `nbytes` bytes is done; the next drawing shows it, and `more`."""
        with self._lock:
            self._name, self._done, self._more = name, self._done + nbytes, more

    def clear(self) -> None:
        """Remove the line for a moment, so that other text can be written."""
        with self._lock:
            if self._phase:
                self._write(_CLEAR)

    def rest(self) -> None:
        """Remove the line until the next phase begins."""
        with self._lock:
            self.clear()
            self._phase, self._ticks = "", False

    def _draw(self) -> None:
        if self._stream is None:
            return
        first, second = status_line(
            self._phase,
            plain(self._name),
            done=self._done,
            total=self._total,
            elapsed=time.monotonic() - self._start,
            width=max(20, shutil.get_terminal_size().columns - 1),
            more=self._more,
        )
        if not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            first, second = f"{_BOLD}{first}{_PLAIN}", f"{_DIM}{second}{_PLAIN}"
        self._write(f"{_CLEAR}{first}{second}")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, UnicodeError, ValueError):
                # Whoever cannot see the line misses nothing else.
                self._stream = None


LINE = StatusLine()
"""The line of this process."""


@contextmanager
def starting(quiet: bool) -> Iterator[None]:
    """Show the line while a command runs, from its very start, if it is at a terminal."""
    from lean_merge.cli.app import SPEAKS

    if quiet or not SPEAKS.get() or LINE.is_open or not sys.stderr.isatty():
        yield
        return
    with LINE.opened(sys.stderr):
        LINE.begin("starting", ticks=False)
        yield


class Progress:
    """The news of a plan that is carried out, which are shown in the line.

    Parameters
    ----------
    plan
        The plan.
    warn
        Receives each warning for people.
    """

    def __init__(self, plan: Plan, warn: Callable[[str], None]) -> None:
        self._plan, self._warn = plan, warn
        self._output = plan.output.name
        self._left = sum(task.tensor.nbytes for task in plan.tasks)
        self._totals = {
            _ANALYSIS: sum(task.tensor.nbytes for task in plan.weights),
            self._output: self._left,
        }
        LINE.begin("looking at a few rows of every model")

    def look(self, seen: EarlyLook) -> None:
        """Receive the early look, and say what rounding will keep."""
        from lean_merge.cli.rounding import advice

        for warning in (*seen.warnings, advice(seen.kept, at_most=True)):
            if warning is not None:
                self._warn(warning)
        LINE.begin("reading the first weights")

    def __call__(self, event: Event) -> None:
        """Receive the news that a tensor is done."""
        phase = "analysing" if event.output == _ANALYSIS else "merging"
        if LINE.phase != phase:
            LINE.begin(phase, self._totals.get(event.output, 0))
        LINE.advance(event.name, event.nbytes, come(self._plan))
        for warning in event.warnings:
            self._warn(warning)
        if event.output == self._output:
            self._left -= event.nbytes
            if self._left <= 0:
                LINE.begin("finishing: bringing everything to the disk")


def come(plan: Plan) -> str:
    """Tell how much of what travels has come, and how fast; nothing if all inputs are local."""
    if not plan.prediction.travels:
        return ""
    from lean_merge.checkpoints.remote.client import TRAFFIC

    come, rate = format_size(TRAFFIC.received), format_size(TRAFFIC.rate)
    return f", {come} of {format_size(plan.prediction.travels)} came, {rate}/s"


@contextmanager
def progress(
    plan: Plan, quiet: bool, warn: Callable[[str], None] | None = None
) -> Iterator[Progress]:
    """Show the progress of a plan while the block runs; `warn` receives its warnings."""
    from lean_merge.cli.app import echo
    from lean_merge.engine import ON_LOOK

    def told(text: str) -> None:
        if not quiet:
            echo(f"warning: {text}", err=True)

    with starting(quiet):
        shown = Progress(plan, warn or told)
        listening = ON_LOOK.set(shown.look)
        try:
            yield shown
        finally:
            ON_LOOK.reset(listening)
        LINE.rest()
