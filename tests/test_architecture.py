"""One direction through the house: who may import whom, read from the source."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lean_merge

ROOT = Path(lean_merge.__file__).parent
PACKAGE = "lean_merge"
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = [PACKAGE, *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


@cache
def imported(name: str, *, at_import: bool = False) -> tuple[tuple[str, str], ...]:
    """(module, symbol) of every import in a module; the symbol is "" for a whole module.

    `at_import` leaves out those inside functions.
    """
    return tuple(_imported(name, at_import))


def _imported(name: str, at_import: bool) -> Iterator[tuple[str, str]]:
    nodes = list(ast.walk(TREES[name]))
    if at_import:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        inner = {id(n) for f in nodes if isinstance(f, functions) for n in ast.walk(f)}
        nodes = [node for node in nodes if id(node) not in inner]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in MODULES else (str(node.module), alias.name)


def room_of(name: str) -> str:
    """The second part of a module's name; the package itself is a room of its own."""
    return [*name.split("."), PACKAGE][1]


def rooms(name: str) -> set[str]:
    """The rooms of ours that a module imports: errors, checkpoints, methods, ..."""
    return {room_of(module) for module, _ in imported(name) if module.split(".")[0] == PACKAGE}


def others(name: str) -> set[str]:
    """The packages that are not ours, standard library included."""
    return {module.split(".")[0] for module, _ in imported(name)} - {PACKAGE, "__future__"}


def of_room(room: str) -> list[str]:
    """The modules of a room, which is a folder or a file."""
    whole = f"{PACKAGE}.{room}"
    found = [name for name in MODULES if name == whole or name.startswith(f"{whole}.")]
    assert found, f"there is no room {room}"
    return found


def outside(packages: set[str]) -> set[str]:
    """Those that the standard library lacks."""
    return packages - set(sys.stdlib_module_names)


PAGE = ROOT.parent / "docs" / "architecture.md"


def table() -> dict[str, set[str]]:
    """The table of rooms in docs/architecture.md: what each may import, of ours."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 10
    return {room: set(re.findall(r"`(\w+)`", needs)) for room, needs in rows}


RULES = table()


@pytest.mark.parametrize("room", sorted({room_of(n) for n in MODULES} - {PACKAGE}))
def test_the_table_of_rooms_is_what_the_imports_are(room: str):
    """A room without a row, an import that no row allows, and a row that is stale all fail."""
    used = set().union(*(rooms(name) for name in of_room(room))) - {room}
    assert room in RULES, "docs/architecture.md lacks this room"
    assert used - RULES[room] == set(), "imported, and not in the table of docs/architecture.md"
    assert RULES[room] - used == set(), "in the table of docs/architecture.md, and not imported"


def test_no_circle_leads_through_the_rooms():
    list(TopologicalSorter(RULES).static_order())


def test_the_table_has_no_room_that_does_not_exist():
    assert RULES.keys() <= {room_of(name) for name in MODULES}


@pytest.mark.parametrize("room", ["recipe", "mapping", "store", "checkpoints", "memory", "sizes"])
def test_files_and_wishes_know_no_policy(room: str):
    for name in of_room(room):
        assert not rooms(name) & {"methods", "plan", "engine", "report", "merge", "cli"}, name


def test_mathematics_touches_no_files():
    for name in of_room("linalg"):
        assert outside(others(name)) <= {"torch", "scipy", "numpy"}, name
    for name in of_room("methods"):
        assert outside(others(name)) <= {"torch"}, name
    files = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "glob", "subprocess"}
    for name in [*of_room("linalg"), *of_room("methods")]:
        assert not others(name) & files, name
        calls = {
            node.func.id
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print", "input", "eval", "exec"}, name


def test_a_plan_opens_no_tensor_data():
    for name in of_room("plan"):
        names = {symbol for _, symbol in imported(name)}
        modules = {module for module, _ in imported(name)}
        assert not names & {"TensorReader", "as_bytes", "OutputFolder"}, name
        assert not modules & {"lean_merge.checkpoints.reader", "lean_merge.store.folder"}, name
        assert "engine" not in rooms(name), name


def test_nothing_reaches_behind_the_face_of_the_engine():
    face = f"{PACKAGE}.engine"
    for name in set(MODULES) - set(of_room("engine")):
        behind = {module for module, _ in imported(name) if module.startswith(f"{face}.")}
        assert not behind, f"{name} imports {behind}; {face} says what others may use"


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("typer", {"cli"}),
        ("click", {"cli"}),
        ("tqdm", {"cli"}),
        ("transformers", {"demo", "drift", "outputs"}),
        ("accelerate", {"drift"}),
        ("peft", {"outputs"}),
        ("tokenizers", {"demo"}),
        ("sklearn", {"demo"}),
        ("PIL", {"demo"}),
        ("huggingface_hub", {"checkpoints", "cli"}),
        ("re2", {"checkpoints"}),
        ("urllib3", {"checkpoints"}),
        ("psutil", {"memory"}),
        ("plotly", {"page"}),
        ("scipy", {"linalg"}),
    ],
)
def test_a_package_stays_in_its_room(package: str, homes: set[str]):
    users = {room_of(name) for name in MODULES if package in others(name)}
    assert users <= homes


def test_only_declared_packages_are_imported():
    known = {"torch", "safetensors", "numpy", "scipy", "psutil", "tqdm", "typer", "yaml"}
    known |= {"isal", "re2", "urllib3", "accelerate"}
    known |= {"huggingface_hub", "transformers", "peft", "tokenizers", "sklearn", "PIL", "plotly"}
    for name in MODULES:
        assert outside(others(name)) <= known, name


def test_plotly_is_imported_only_where_a_page_is_written():
    for name in MODULES:
        packages = {module.split(".")[0] for module, _ in imported(name, at_import=True)}
        assert "plotly" not in packages, name


def test_nothing_but_the_command_line_prints_or_exits():
    for name, tree in TREES.items():
        if room_of(name) in ("cli", "__main__"):
            continue
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"print", "sys.exit", "exit", "input"}, name


def test_modules_import_each_other_in_no_circle():
    graph = {
        name: {module for module, _ in imported(name, at_import=True) if module in MODULES}
        for name in MODULES
    }
    for name, needed in graph.items():
        needed.discard(name)
        # `from lean_merge import memory` in lean_merge.merge is the module, not the package.
        assert PACKAGE not in needed, name
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str):
    text = ast.get_docstring(TREES[name])
    assert text and text.strip().splitlines()[0].endswith((".", ":", "?"))


MADE = {"empty", "zeros", "ones", "full", "rand", "randn", "linspace"}
"""Functions of torch that make tensors of the process's default dtype unless they are told."""


def test_every_new_tensor_says_its_dtype():
    """The default dtype is the caller's, and is no part of a merge."""
    for name, tree in TREES.items():
        calls = [each for each in ast.walk(tree) if isinstance(each, ast.Call)]
        silent = [
            ast.unparse(call)
            for call in calls
            if isinstance(call.func, ast.Attribute)
            and ast.unparse(call.func.value) == "torch"
            and call.func.attr in MADE
            and not {"dtype", "out"} & {keyword.arg for keyword in call.keywords}
        ]
        assert not silent, name


FRAGMENTS = {"Of", "As", "What", "How", "Whether", "Which", "Where", "Who", "Why"}


def test_no_docstring_begins_as_a_fragment():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, tree in TREES.items():
        found = [ast.get_docstring(each) for each in ast.walk(tree) if isinstance(each, kinds)]
        assert not [text for text in found if text and text.split()[0] in FRAGMENTS], name


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield a module's classes, without leading underscores, public functions and constants."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name.lstrip("_")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))


def test_a_name_means_one_thing():
    """Type variables, the `FORM` of each form of input, and an alias are the exceptions.

    Both `recipe` and `mapping` define the alias, because neither may import the other.
    """
    homes: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for name in set(defined(tree)):
            if not name.startswith("_") and len(name) > 1 and name not in {"FORM", "NameRules"}:
                homes.setdefault(name, []).append(module)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_public_names_exist_and_are_all_that_is_imported():
    assert len(set(lean_merge.__all__)) == len(lean_merge.__all__)
    for name in lean_merge.__all__:
        assert getattr(lean_merge, name) is not None
    symbols = {symbol for module, symbol in imported(PACKAGE) if module.startswith(PACKAGE)}
    homes = {name for names in lean_merge._HOMES.values() for name in names}
    assert symbols == homes == set(lean_merge.__all__)


@pytest.mark.parametrize("name", ["merge", "plan", "verify"])
def test_a_function_is_not_hidden_by_the_module_of_its_name(name: str):
    """The import of a submodule binds its name in the package, before or after the function."""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    lean_merge.__dict__.pop(name, None)
    for _ in range(2):
        assert getattr(lean_merge, name) is getattr(module, name)
        setattr(lean_merge, name, module)
    with pytest.raises(AttributeError, match="no attribute 'mege'"):
        lean_merge.mege  # noqa: B018


def test_every_error_is_exported_and_has_its_exit_code():
    from lean_merge import errors

    raised = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LeanMergeError)
    }
    assert raised <= set(lean_merge.__all__)
    codes = {name: getattr(errors, name).exit_code for name in raised}
    assert {name for name, code in codes.items() if code != 1} == {"RecipeError", "BudgetError"}
    assert (codes["RecipeError"], codes["BudgetError"]) == (2, 4)


START = """
import contextlib, io, sys
from lean_merge import cli

for words in (["--help"], ["merge", "--help"], ["methods"], ["methods", "ties"], ["--version"]):
    with contextlib.redirect_stdout(io.StringIO()) as told:
        cli.main(words)
    assert told.getvalue()
heavy = {"torch", "numpy", "scipy", "tqdm", "rich", "lean_merge.plan"} & sys.modules.keys()
assert not heavy, heavy

import lean_merge.merge
assert "torch" in sys.modules and "scipy" not in sys.modules
assert lean_merge.merge is sys.modules["lean_merge.merge"].merge
"""


def test_help_starts_without_torch_and_a_merge_without_scipy():
    """Torch takes a second. Of scipy, 10 to 40 MiB would be held that `--memory` counts."""
    subprocess.run([sys.executable, "-c", START], check=True)


def test_the_table_of_methods_is_what_the_methods_say():
    """LEAN_MERGE_WRITE_DOCS=1 writes the table anew."""
    from lean_merge.cli.asking import told_methods
    from lean_merge.cli.methodtable import TABLE, methods_list, registering

    told = json.dumps(told_methods(), indent=1) + "\n"
    if os.environ.get("LEAN_MERGE_WRITE_DOCS") == "1":
        TABLE.write_text(told, encoding="utf-8")
        methods_list.cache_clear()
    assert TABLE.read_text(encoding="utf-8") == told, "write it with LEAN_MERGE_WRITE_DOCS=1"
    assert registering() == {method["name"] for method in methods_list()}
