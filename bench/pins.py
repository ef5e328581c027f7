"""Whether two versions of the package write the same bytes.

    python bench/pins.py OLD NEW [--only CASE ...] [--dropped KEY ...] [--added KEY ...]

OLD and NEW are commits, or folders that hold the package. Commits are checked out into a temporary
folder, and removed afterwards. The inputs are made once (`bench/pininputs.py`); then one process
for each tree carries out every case (`bench/pincases.py`) through the public API and the command
line, so that internals may move. Weight files, recipes, cards, side files and streamed tensors are
compared by SHA-256; reports, analyses, journals, tables and what commands print, by their content
without the keys below, which tell of times, versions and memory; pages (HTML) not at all. One line
a case is printed, with the names of keys that differ, are gone or are new. The exit code is 1 if
any case differs, or raises.

A field of a report that was dropped or added on purpose is allowed by name: `--dropped
memory.pinned`. A KEY means every key, and part of a key, of those words in that order.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pininputs import write_inputs

ROOT = Path(__file__).resolve().parents[1]
VOLATILE: Mapping[str, str] = {
    "seconds": "times",
    "lean_merge": "the version",
    "analysis.sha256": "the digest of an analysis, which holds times",
    "bytes_own": "counts reports, whose length differs with the times in them",
    "memory.start_anonymous": "what the process held",
    "memory.peak_anonymous": "what the process held",
    "memory.peak_file_backed": "what the process held",
    "memory.predicted_anonymous": "counts what the process held",
    "predicted.peak_memory": "counts what the process held",
}
"""Keys that are not compared, and why. In journals, beside them: the digest of every line, the
length and digest of reports and analyses, and the digest of the whole."""
TIGHT: Mapping[str, str] = {
    "memory.limit": "the smallest that works, beside what the process held",
    "bytes": "which rows are read again depends on what the process held",
    "result.bytes_read": "the same",
    "result.expected": "the same",
}
"""Keys that are not compared either where a case gives little memory."""
GONE = object()


@contextmanager
def tree_of(named: str, scratch: Path) -> Iterator[Path]:
    """The folder of a tree; that of a commit lasts for as long as the context."""
    if Path(named).is_dir():
        yield Path(named).resolve()
        return
    git = ["git", "-C", str(ROOT)]
    subprocess.run(
        [*git, "worktree", "add", "--detach", "--quiet", str(scratch), named], check=True
    )
    try:
        yield scratch
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(scratch)], check=True)


def carried_out(tree: Path, place: Path, inputs: str, names: Sequence[str]) -> dict[str, Any]:
    """What every case wrote with the package of a tree."""
    if not (tree / "lean_merge" / "__init__.py").is_file():
        sys.exit(f"{tree} does not hold the package.")
    place.mkdir()
    script = ROOT / "bench" / "pincases.py"
    command = [sys.executable, str(script), inputs, "results.json", *names]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=place, env=environment, check=True)
    found: dict[str, Any] = json.loads((place / "results.json").read_text(encoding="utf-8"))
    return found


def matches(path: str, keys: Sequence[str]) -> bool:
    """Whether a key's path has the words of one of `keys` in it, in their order."""
    return any(f".{key}." in f".{path}." for key in keys)


def values(content: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(the place, with numbers; the key's path, without; the value) of all that is no container.

    A container that is empty counts as a value.
    """
    yield from _values(content, path, path)


def _values(content: Any, place: str, path: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(content, dict) and content:
        for key, each in content.items():
            start = f"{path}." if path else ""
            yield from _values(each, f"{place}.{key}" if place else key, f"{start}{key}")
    elif isinstance(content, list) and content:
        for index, each in enumerate(content):
            yield from _values(each, f"{place}[{index}]", path)
    else:
        yield place, path, content


def differences(
    old: Any, new: Any, *, volatile: Sequence[str], dropped: Sequence[str], added: Sequence[str]
) -> list[str]:
    """The keys of two contents that differ, are gone or are new; each named once."""
    before = {place: (path, value) for place, path, value in values(old)}
    after = {place: (path, value) for place, path, value in values(new)}
    kinds: dict[tuple[str, str], list[str]] = {}
    for place in [*before, *(place for place in after if place not in before)]:
        path, was = before.get(place, ("", GONE))
        path, now = after.get(place, (path, GONE))
        if matches(path, volatile) or (was is not GONE and repr(was) == repr(now)):
            continue
        if was is GONE:
            word, allowed = "is new", added
        elif now is GONE:
            word, allowed = "is gone", dropped
        else:
            word, allowed = "differs", ()
        if not matches(path, allowed):
            shown = f"{place}: {_short(was)} -> {_short(now)}"
            kinds.setdefault((path, word), []).append(shown)
    return [
        f"{path} {word}, in {len(all_shown)} place{'s' * (len(all_shown) > 1)} ({all_shown[0]})"
        for (path, word), all_shown in kinds.items()
    ]


def _short(value: Any) -> str:
    text = "nothing" if value is GONE else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def of_case(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    dropped: Sequence[str] = (),
    added: Sequence[str] = (),
) -> list[str]:
    """What differs between the records of one case."""
    for side, record in (("OLD", old), ("NEW", new)):
        if record["failure"]:
            return [f"raises on {side}:\n{record['failure'].rstrip()}"]
    volatile = [*VOLATILE, *(TIGHT if old["tight"] else ())]
    options: dict[str, Sequence[str]] = {"volatile": volatile, "dropped": dropped, "added": added}
    found = []
    before, after = old["files"], new["files"]
    names = [*before, *(name for name in after if name not in before)]
    # What is compared by its bytes first.
    for name in sorted(names, key=lambda each: "sha256" not in before.get(each, {})):
        if name not in after:
            found.append(f"{name} is not written")
        elif name not in before:
            found.append(f"{name} is new")
        else:
            changes = differences(before[name], after[name], **options)
            found += [f"{name}: {change}" for change in changes]
    return found + differences(old["found"], new["found"], **options)


def main() -> None:
    """Parse the arguments, run both trees, print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", metavar="OLD", help="a commit, or a folder")
    parser.add_argument("new", metavar="NEW", help="the same")
    parser.add_argument("--only", metavar="CASE", nargs="+", default=[], help="cases by name")
    parser.add_argument("--dropped", metavar="KEY", action="append", default=[])
    parser.add_argument("--added", metavar="KEY", action="append", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pins-") as folder, ExitStack() as stack:
        place = Path(folder).resolve()
        write_inputs(place / "inputs")
        records = []
        for side, named in (("old", arguments.old), ("new", arguments.new)):
            tree = stack.enter_context(tree_of(named, place / f"tree-{side}"))
            start = time.perf_counter()
            records.append(carried_out(tree, place / side, "../inputs", arguments.only))
            took = time.perf_counter() - start
            print(f"{side}: {named}, {took:.0f} s", file=sys.stderr, flush=True)
    differing = 0
    old, new = records
    for name, record in old.items():
        options = {"dropped": arguments.dropped, "added": arguments.added}
        found = of_case(record, new[name], **options)
        differing += bool(found)
        print(f"{'DIFFERS' if found else 'equal  '} {name}")
        for line in found:
            print(f"        {line}")
    print(f"{len(old) - differing} of {len(old)} cases are equal, {differing} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
