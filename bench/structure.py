"""Measure how much of the package a reader must take in, at one commit or more.

    python bench/structure.py 574d0c6 HEAD

Prints, for each tree: files and lines of package and tests; what `merge` imports; the calls from
the command line to the write of a row, and from the same start to the read of one; the places
outside the outputs that ask for a kind of output by its name; docstrings that are fragments. A tree
is a folder, or a commit, which is checked out into a temporary folder.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"checkpoint", "lora", "stream"}
FRAGMENT = re.compile(r"(Of|As|That of|Those)\b")


@contextlib.contextmanager
def tree(name: str) -> Iterator[Path]:
    """The folder `name`, or a commit of that name in a temporary worktree."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(place), name], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for file in sorted((root / "lean_merge").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(files: dict[str, Path], start: str) -> set[str]:
    """All modules that `start` imports, directly or through others, inside functions too."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(files[name].read_text("utf-8"))):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
            for one in wanted:
                # A module is imported together with the packages that it lies in.
                while one.startswith("lean_merge."):
                    if one in files:
                        waiting.append(one)
                    one = one.rpartition(".")[0]
    return seen


def asks_for_kinds(files: dict[str, Path]) -> list[str]:
    """Comparisons with the name of a kind of output, outside the outputs and the command line."""
    found = []
    for name, file in files.items():
        if name.startswith(("lean_merge.outputs", "lean_merge.cli", "lean_merge.demo")):
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Compare):
                continue
            values = [each for side in (node.left, *node.comparators) for each in ast.walk(side)]
            words = {each.value for each in values if isinstance(each, ast.Constant)}
            names = {each.id for each in values if isinstance(each, ast.Name)}
            about = {each.attr for each in values if isinstance(each, ast.Attribute)} | names
            if words & KINDS or "ANALYSIS" in names or ("none" in words and "output" in about):
                found.append(f"{name}:{node.lineno}")
    return found


def fragments(files: dict[str, Path]) -> int:
    """Docstrings that begin as no sentence does."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    return sum(
        bool(FRAGMENT.match(ast.get_docstring(node) or ""))
        for file in files.values()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, kinds)
    )


def size(files: list[Path]) -> str:
    lines = sum(len(file.read_text("utf-8").splitlines()) for file in files)
    return f"{len(files)} files, {lines:,} lines"


# Run in a process of its own, with the tree's package: merges two small weights by the command
# line, and keeps the calls that lead to the first write and to the first read of a row. Work that
# is handed to a thread is joined to the call that handed it over.
PROBE = r"""
import json, os, sys, threading, traceback
import torch
from pathlib import Path
from safetensors.torch import save_file

folder = Path(sys.argv[1])
generator = torch.Generator().manual_seed(0)
def save(role, shift):
    weights = {}
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        base = torch.randn(64, 64, generator=torch.Generator().manual_seed(len(name)))
        tuned = base + shift * torch.randn(64, 64, generator=generator)
        weights[f"model.layers.0.{name}.weight"] = tuned
    (folder / role).mkdir()
    save_file(weights, folder / role / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1}
    (folder / role / "config.json").write_text(json.dumps(config))
for role, shift in (("base", 0.0), ("mllm", 0.02), ("expert", 0.02)):
    save(role, shift)

given = {}
chains = {}
here = os.sep + "lean_merge" + os.sep

def frames():
    return [
        f"{each.filename.rpartition(here)[2]}:{each.name}"
        for each in traceback.extract_stack()
        if here in each.filename
    ]

def whole():
    return given.get(threading.get_ident(), []) + frames()

from lean_merge.engine import workers
from lean_merge import cli

def follow(owner, name, position):
    # The function that is handed over carries the calls which led to it.
    real = getattr(owner, name)
    def handed(self, *args, **kwargs):
        args = list(args)
        function, before = args[position], whole()
        def carried(*a, **k):
            ident = threading.get_ident()
            kept, given[ident] = given.get(ident), before
            try:
                return function(*a, **k)
            finally:
                given[ident] = kept or []
        args[position] = carried
        return real(self, *args, **kwargs)
    setattr(owner, name, handed)

for owner, name, position in json.loads(sys.argv[2]):
    module, _, kind = owner.rpartition(".")
    __import__(module)
    if hasattr(getattr(sys.modules[module], kind), name):
        follow(getattr(sys.modules[module], kind), name, position)

def note(key, size):
    chain = whole()
    about = any(word in call for call in chain for word in ("update", "rows", "tile"))
    if key not in chains and size >= 64 * 4 and about:
        chains[key] = chain

pwrite, preadv = os.pwrite, os.preadv
def writing(fd, data, offset):
    note("write", len(memoryview(data).cast("B")))
    return pwrite(fd, data, offset)
def reading(fd, buffers, offset, *rest):
    note("read", sum(memoryview(b).nbytes for b in buffers))
    return preadv(fd, buffers, offset, *rest)
os.pwrite, os.preadv = writing, reading
if hasattr(os, "pwritev"):
    pwritev = os.pwritev
    def writing_many(fd, buffers, offset, *rest):
        note("write", sum(memoryview(b).nbytes for b in buffers))
        return pwritev(fd, buffers, offset, *rest)
    os.pwritev = writing_many
arguments = ["merge", "--out", str(folder / "out"), "--threshold", "0", "--device", "cpu"]
for role in ("base", "mllm", "expert"):
    arguments += [f"--{role}", str(folder / role)]
try:
    cli.main(arguments)
except SystemExit as end:
    assert not end.code, end.code
(folder / "chains.json").write_text(json.dumps(chains))
"""
HANDED = [
    ("lean_merge.engine.workers.Workers", "submit", 0),
    ("lean_merge.engine.workers.Workers", "_submit", 1),
]
"""Where the package, now or before, hands a function to a thread: class, method, and position of
the function."""


def chains(root: Path) -> dict[str, list[str]]:
    """The calls to the first write and to the first read of a merged row."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROBE, folder, json.dumps(HANDED)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        found: dict[str, list[str]] = json.loads((Path(folder) / "chains.json").read_text())
    return found


def describe(root: Path, *, names: bool) -> None:
    """Print all measures of a tree."""
    files = modules(root)
    start = next(name for name in ("lean_merge.merge", "lean_merge.api") if name in files)
    needed = imported(files, start)
    top = {name.split(".")[1] for name in files if "." in name}
    print(f"package: {size(list(files.values()))}; {len(top)} rooms at the top")
    print(f"tests: {size(sorted((root / 'tests').rglob('*.py')))}")
    print(f"{start} imports {size([files[name] for name in needed])}")
    places = asks_for_kinds(files)
    print(f"places that ask for a kind of output: {len(places)} {' '.join(places)}")
    print(f"docstrings that are fragments: {fragments(files)}")
    for what, chain in sorted(chains(root).items()):
        count = len({each.partition(":")[0] for each in chain})
        print(f"from the command line to the {what} of a row: {len(chain)} calls in {count} files")
        if names:
            print(*(f"    {each}" for each in chain), sep="\n")


def main() -> None:
    """Measure the trees named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", default=["."], help="folders or commits")
    parser.add_argument("--names", action="store_true", help="name the calls")
    options = parser.parse_args()
    for name in options.trees:
        with tree(name) as root:
            print(f"== {name}")
            describe(root, names=options.names)


if __name__ == "__main__":
    main()
