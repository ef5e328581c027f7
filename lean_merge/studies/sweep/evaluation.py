"""Measure a result by a command of the user, which prints a number."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.errors import OutputError, RecipeError, plain, shown
from lean_merge.studies.sweep.grid import AXES

FACTS = ("path", "name", "output", "mllm", "base")
"""The placeholders that a command may name besides the swept parameters."""
GRACE = 5.0
"""The seconds that a command has to end by itself after it is asked to."""
MAX_NUMBERS = 200
_TAIL = 256 << 10
"""The result is looked for in this many bytes at the end of the output."""
_MAX_LINES = 1000
"""A value may begin in this many of the last lines, and is read to its end."""
_LONGEST_LINE = 200
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_LINE_START = re.compile(r"(?:^|(?<=[\r\n]))[ \t]*")
_LINE_END = re.compile(r"[ \t]*(?:[\r\n]|\Z)")

Result = float | dict[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A command that measures one result.

    Parameters
    ----------
    command
        The command line, which is split into words as a shell would, and run without one. In the
        words, `{path}`, `{name}`, `{output}`, `{mllm}`, `{base}` and the swept parameters are
        replaced; other braces stay. The same values are in the command's environment, as
        LEAN_MERGE_PATH, LEAN_MERGE_THRESHOLD and so on.
    shell
        Whether the system's shell runs the command; the values are quoted then.
    timeout
        Seconds after which the command is ended, with all that it started.

    Raises
    ------
    RecipeError
        The command is empty, or its quotes do not match, or the timeout is not a time.
    """

    command: str
    shell: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout < 1e9:
            raise RecipeError(f"The timeout must be a time in seconds, not {shown(self.timeout)}.")
        if not isinstance(self.command, str) or not self.command.strip() or "\0" in self.command:
            raise RecipeError(f"{shown(self.command)} is not a command.")
        try:
            shlex.split(self.command)
        except ValueError as error:
            if not self.shell:
                raise RecipeError(
                    f"The command {shown(self.command)} cannot be split into words ({error}); "
                    "quote it as in a shell."
                ) from error

    def check(self, swept: Mapping[str, Any]) -> None:
        """Refuse a command that names a parameter that is not `swept`, with a RecipeError."""
        for name in _PLACEHOLDER.findall(self.command):
            if name in AXES and name not in swept:
                raise RecipeError(
                    f"The command names {{{name}}}, which is not swept; give --{AXES[name]}, or "
                    "write its value."
                )

    def arguments(self, facts: Mapping[str, str]) -> list[str] | str:
        """Return the command to run, with `facts` in the place of its placeholders."""

        def put(text: str, quote: bool) -> str:
            def value(match: re.Match[str]) -> str:
                found = facts.get(match[1])
                return match[0] if found is None else shlex.quote(found) if quote else found

            return _PLACEHOLDER.sub(value, text)

        if self.shell:
            return put(self.command, True)
        return [put(word, False) for word in shlex.split(self.command)]


@dataclass(frozen=True, slots=True)
class Measured:
    """The outcome of a command: its result, or why there is none, and the seconds it took."""

    result: Result | None
    error: str | None
    seconds: float


def measure(evaluation: Evaluation, facts: Mapping[str, str], *, logs: Path) -> Measured:
    """Run the command once.

    Parameters
    ----------
    evaluation
        The command.
    facts
        The values of the placeholders, which are in the command's environment too.
    logs
        The folder for NAME.stdout.txt and NAME.stderr.txt; those of an earlier run are replaced.

    Returns
    -------
    Measured
        The result, or the error of a command that fails. Whatever the command started is ended
        when this function returns or raises.

    Raises
    ------
    OutputError
        The logs cannot be written.
    """
    files = [logs / f"{facts['name']}.{stream}.txt" for stream in ("stdout", "stderr")]
    start = time.monotonic()
    try:
        logs.mkdir(exist_ok=True)
        for file in files:
            # The log is never written through a link.
            file.unlink(missing_ok=True)
        with open(files[0], "xb") as out, open(files[1], "xb") as err:
            fault = _run(evaluation, facts, out.fileno(), err.fileno())
        tails = [_tail(file) for file in files]
    except OSError as error:
        raise OutputError(
            f"{error.filename or logs}: cannot be written ({error.strerror or error}); check the "
            "rights and the disk."
        ) from error
    result: Result | None = None
    if fault is None:
        result, fault = read_result(tails[0])
    if fault is not None and (last := _last_line(tails[1])):
        fault += f"; its last words: {last}"
    return Measured(result, fault, time.monotonic() - start)


def _run(evaluation: Evaluation, facts: Mapping[str, str], out: int, err: int) -> str | None:
    """Run the command to its end; return what went wrong, or None."""
    environment = {f"LEAN_MERGE_{name.upper()}": value for name, value in facts.items()}
    arguments = evaluation.arguments(facts)
    try:
        process = subprocess.Popen(
            arguments,
            shell=evaluation.shell,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | environment,
            # It gets a process group of its own, so that all that it starts can be ended with it.
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        first = arguments if isinstance(arguments, str) else arguments[0]
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"the command {shown(first)} could not be started ({reason})"
    try:
        code = process.wait(evaluation.timeout)
    except subprocess.TimeoutExpired:
        return f"the command took longer than {evaluation.timeout:g} s"
    finally:
        _end(process)
    if code < 0:
        return f"the command was ended by signal {-code}"
    return None if code == 0 else f"the command ended with exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started in its process group, gently at first."""
    try:
        if not _signal(process, "SIGTERM"):
            return
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            process.poll()
            if not _signal(process, None):
                return
            time.sleep(0.02)
    finally:
        _signal(process, "SIGKILL")
        process.wait()


def _signal(process: subprocess.Popen[bytes], name: str | None) -> bool:
    """Send a signal to the group of a process; return whether there was anyone to get it."""
    if sys.platform == "win32":
        if process.poll() is None and name is not None:
            process.kill()
        return process.poll() is None
    try:
        os.killpg(process.pid, 0 if name is None else getattr(signal, name))
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _tail(file: Path) -> str:
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - _TAIL))
        return stream.read(_TAIL).decode("utf-8", "replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return plain(lines[-1])[:_LONGEST_LINE] if lines else ""


def read_result(text: str) -> tuple[Result | None, str | None]:
    """Return the number, or numbers by name, in the last JSON value of `text`; and what is wrong.

    A value begins at the beginning of a line, and ends at the end of one. The numbers of an object
    are taken, and those of objects inside it under dotted names; anything else is left out.
    """
    found = None
    for value in _values(text):
        found = (value,)
    if found is None:
        return None, "the command printed no JSON value on its standard output"
    (value,) = found
    if isinstance(value, dict):
        numbers = dict(_numbers(value))
        if not numbers:
            return None, "the last JSON value that the command printed holds no finite number"
        if len(numbers) > MAX_NUMBERS:
            return None, (
                f"the last JSON value that the command printed holds {len(numbers)} numbers, and "
                f"at most {MAX_NUMBERS} are taken"
            )
        return numbers, None
    number = _number(value)
    if number is None:
        kind = "a number that is not finite" if isinstance(value, float) else shown(value)
        return None, f"the last JSON value that the command printed is {kind}, not a finite number"
    return number, None


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON values that stand on lines of their own, in their order."""
    decoder, end = json.JSONDecoder(), 0
    for line in deque(_LINE_START.finditer(text), maxlen=_MAX_LINES):
        if line.start() < end:
            continue
        try:
            value, stop = decoder.raw_decode(text, line.end())
        except (ValueError, RecursionError):
            continue
        if _LINE_END.match(text, stop):
            end = stop
            yield value


def _numbers(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _numbers(item, f"{prefix}{name}.")
        elif (number := _number(item)) is not None:
            yield f"{prefix}{name}", number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(float(value)) else None
    except OverflowError:
        return None
