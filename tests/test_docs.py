"""The documentation says what the code does: commands, options, fields, examples and links.

    LEAN_MERGE_WRITE_DOCS=1 python -m pytest tests/test_docs.py

writes docs/cli.md and the example in docs/memory.md anew.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.models import ArgumentInfo, OptionInfo

from lean_merge import MergeRecipe, cli
from lean_merge.checkpoints import open_checkpoint
from lean_merge.cli import app
from lean_merge.cli.describe import inspect_dict, plan_dict
from lean_merge.cli.methodtable import methods_list
from lean_merge.demo.run import FAMILY, family_recipe
from lean_merge.engine import early_look
from lean_merge.outputs.checkpoint import CheckpointOutput
from lean_merge.plan import formulas
from lean_merge.plan import plan as make_plan
from lean_merge.plan.parameters import build_method
from lean_merge.tasks import tiles

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
CLI = ROOT / "docs" / "cli.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("bench/**/*.md")])
EXIT_CODES = "[formats.md](formats.md#exit-codes)"
TYPES = {"str": "text", "int": "whole number", "float": "number", "Path": "path"}


# --- docs/cli.md --------------------------------------------------------------------------


def commands() -> dict[str, Callable[..., None]]:
    """The functions behind the commands, by name, in the order in which help lists them."""
    found = {}
    for command in app.registered_commands:
        assert command.callback is not None
        found[command.name or command.callback.__name__] = command.callback
    return found


def flags(name: str, option: OptionInfo) -> list[str]:
    """All spellings of an option, as typer derives them."""
    # The first spelling stands where a default would, outside of Annotated.
    spelt = [each for each in (option.default, *(option.param_decls or ())) if _is_flag(each)]
    return spelt or [f"--{name.strip('_').replace('_', '-')}"]


def _is_flag(value: object) -> bool:
    return isinstance(value, str) and value.startswith("-")


def options(callback: Callable[..., None]) -> Iterator[tuple[str, str, str, str]]:
    """Of each parameter: its spelling, kind, default and help, as markdown."""
    for parameter in inspect.signature(callback, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        assert isinstance(info, ArgumentInfo | OptionInfo)
        default = parameter.default
        required = default is inspect.Parameter.empty
        shown = "required" if required else "" if default in (None, False) else f"`{default}`"
        if isinstance(info, ArgumentInfo):
            spelling = f"`{info.metavar or parameter.name.upper()}`"
        else:
            both = [each for flag in flags(parameter.name, info) for each in flag.split("/")]
            spelling = ", ".join(f"`{flag}`" for flag in both)
        yield spelling, _kind(kind, info), shown, info.help or ""


def _kind(kind: Any, info: ArgumentInfo | OptionInfo) -> str:
    inner = [each for each in get_args(kind) if each is not type(None)]
    word = inner[0] if inner and not hasattr(kind, "__name__") else kind
    listed = getattr(word, "__origin__", None) is list
    word = get_args(word)[0] if listed else word
    name = "switch" if word is bool else TYPES[word.__name__]
    if info.metavar and isinstance(info, OptionInfo):
        name = f"`{info.metavar}`"
    if info.min is not None:
        name += f" from {info.min}"
    return f"{name}, repeatable" if listed else name


def cli_page() -> str:
    """docs/cli.md, from the signatures that typer reads."""
    lines = [
        "# Command line",
        "",
        "<!-- Written by tests/test_docs.py; see there how to write it anew. -->",
        "",
        "`lean-merge COMMAND --help` lists the same. `python -m lean_merge` is the same program.",
        f"Recipes, reports and exit codes: {EXIT_CODES}.",
        "`lean-merge --version` prints the version.",
        "",
        "Flags that are not given leave the recipe file, or the default there, as it is.",
    ]
    for name, callback in commands().items():
        rows = list(options(callback))
        summary = inspect.cleandoc(callback.__doc__ or "")
        lines += ["", f"## lean-merge {name}", "", summary, ""]
        lines += ["| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def test_the_command_line_page_is_up_to_date():
    page = cli_page()
    if os.environ.get("LEAN_MERGE_WRITE_DOCS") == "1":
        CLI.write_text(page, encoding="utf-8")
    assert CLI.read_text(encoding="utf-8") == page, "write it with LEAN_MERGE_WRITE_DOCS=1"


def help_text(*arguments: str) -> str:
    """What --help prints, in a terminal of 100 columns."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "100")
        cli.main([*arguments, "--help"])
    return printed.getvalue()


def test_every_command_and_option_of_help_is_documented():
    page = CLI.read_text(encoding="utf-8")
    listed = help_text()
    for name in commands():
        assert re.search(rf"^\s+{name}\s", listed, re.MULTILINE), name
        section = page.split(f"## lean-merge {name}\n")[1].split("\n## ")[0]
        shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text(name))) - {"--help"}
        documented = set(re.findall(r"`(--[a-z][a-z-]*)`", section))
        assert shown == documented, name


def test_every_option_says_what_it_does():
    for name, callback in commands().items():
        for spelling, _, _, meaning in options(callback):
            assert meaning, f"{name} {spelling}"


# --- docs/memory.md -----------------------------------------------------------------------


def memory_example() -> str:
    """The worked example: a 7B down_proj in bfloat16, one expert, two workers."""
    weight = formulas.WeightShape(
        out_features=4096, in_features=11008, roles=2, stored_item=2, task_item=2, arithmetic_item=2
    )
    shape = weight.out_features, weight.in_features
    method = build_method(family_recipe())
    cost, rank = method.cost(shape, item=weight.arithmetic_item), method.largest_rank(shape)
    least = formulas.host_bytes(weight, widest=cost.widest, workspace=cost.workspace, workers=2)
    resident = weight.tiles * weight.resident_tile
    waiting = CheckpointOutput.waiting_bytes(method.update_bytes(shape), 0, weight.held)
    worker, apply = formulas.worker_bytes(weight, cost.widest), formulas.apply_bytes(weight)
    lanes = f"lanes: {tiles.LANES + 1} x {weight.roles} x {shape[1]} x {cost.widest} x 4 bytes"
    rows = {
        f"two workers: 2 x {worker / MIB:.1f}": 2 * worker,
        lanes: formulas.lane_bytes(weight, cost.widest),
        "workspace: Krylov blocks, vectors, images, small problems": cost.workspace,
        f"writing and copying: 2 x {apply / MIB:.1f}": 2 * apply,
        "slack": formulas.SLACK,
        "**no tile resident: the smallest that works**": least,
        f"all {weight.tiles} tiles of two task vectors: "
        f"{weight.tiles} x {weight.resident_tile / MIB:.2f}": resident,
        f"two updates that wait: 2 x {sum(shape)} x {rank} x 4 bytes": waiting,
        "**all resident: full speed**": least + resident + waiting,
    }
    read, written = (
        tiles.strip_rows(shape[1], elements)
        for elements in (tiles.READ_ELEMENTS, tiles.STRIP_ELEMENTS)
    )
    tile = f"{tiles.tile_rows(shape[1])} rows a tile, {read} read and {written} written at once"
    lines = [f"| {tile} | MiB |", "|---|---|"]
    lines += [f"| {what} | {size / MIB:.1f} |" for what, size in rows.items()]
    return "\n" + "\n".join(lines) + "\n"


def test_the_example_of_the_memory_page_is_what_the_formulas_give():
    page = ROOT / "docs" / "memory.md"
    head, rest = page.read_text(encoding="utf-8").split("<!-- example -->\n")
    shown, tail = rest.split("<!-- end of example -->")
    if os.environ.get("LEAN_MERGE_WRITE_DOCS") == "1":
        shown = memory_example() + "\n"
        text = f"{head}<!-- example -->\n{shown}<!-- end of example -->{tail}"
        page.write_text(text, encoding="utf-8")
    assert shown.strip() == memory_example().strip(), "write it with LEAN_MERGE_WRITE_DOCS=1"


# --- examples -----------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readmes_test_command_is_one_line_and_what_ci_extracts():
    """The same lines of sed as in .ci/run, read from there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"<!-- test command -->\n```sh\n([^\n]+)\n```\n", text)
    assert "constraints.txt" in found and " -m pytest" in found
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (extraction,) = re.findall(r"^command=\$\((.*)\)$", script, re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", extraction],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_the_documentation_are_recipes(page: Path):
    for text in blocks(page, "yaml"):
        build_method(MergeRecipe.from_yaml(text))


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_example_of_the_readme_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(
        r"<!-- adapter example -->\n```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL
    )
    code, wanted = found
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == wanted
    assert (tmp_path / "sums-adapter" / "adapter_model.safetensors").stat().st_size < 12000


def test_the_readme_and_the_formats_show_a_recipe():
    assert blocks(ROOT / "README.md", "yaml") and blocks(ROOT / "docs" / "formats.md", "yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_compiles(page: Path):
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


def test_the_examples_of_new_methods_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The two methods of docs/adding-a-method.md, and their tests."""
    from lean_merge.methods import all_methods, registry

    all_methods()  # the copy of the table must be complete before it is exchanged
    linear, elementwise, tests = blocks(ROOT / "docs" / "adding-a-method.md", "python")
    assert elementwise.count("\n") < 40
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    modules = {"negation_example": linear, "magmax_example": elementwise, "example_tests": tests}
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    examples = [importlib.import_module(name) for name in modules][-1]

    found = [name for name in vars(examples) if name.startswith("test_")]
    assert len(found) == 2 and set(examples.METHODS) == {"negation", "magmax"}
    for name in found:
        for method in examples.METHODS:
            folder = tmp_path / f"{name} {method}"
            folder.mkdir()
            getattr(examples, name)(folder, method)


# --- fields -------------------------------------------------------------------------------


def section(page: str, heading: str) -> str:
    """What stands under a heading of docs/formats.md, its subsections included."""
    level = heading.split(" ")[0]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    body = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{len(level)}}} ", body, maxsplit=1, flags=re.MULTILINE)[0]


def documented(text: str) -> set[str]:
    """The names in backquotes in the first cells of a section's tables."""
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def paths(data: dict[str, Any], nested: set[str]) -> set[str]:
    """Keys, with those of the mappings named in `nested` as outer.inner."""
    found = set()
    for key, value in data.items():
        found |= {f"{key}.{inner}" for inner in value} if key in nested else {key}
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a merge of the embedded family."""
    from lean_merge import Resources, merge

    out = tmp_path_factory.mktemp("docs") / "out"
    return merge(family_recipe(), out, resources=Resources(device="cpu", threads=1)).report


def test_every_field_of_the_report_is_documented_and_no_other(report: dict[str, Any]):
    text = section("formats.md", "## `lean_merge_report.json`")
    top, row = text.split("### A row of `weights`")
    assert documented(top) == paths(report, {"counts", "changed", "bytes", "memory"})
    assert documented(row) == set(report["weights"][0])
    phases = re.search(r"\| `seconds` \|(.*)\|", top)
    assert phases is not None
    assert set(re.findall(r"`(\w+)`", phases[1])) == set(report["seconds"])


def test_every_field_of_a_row_is_explained_in_the_mathematics(report: dict[str, Any]):
    names = documented(section("method.md", "## The report's fields"))
    identity = {"name", "weight", "expert"}
    assert names == set(report["weights"][0]) - identity


def test_every_field_of_a_plan_is_documented():
    fields = documented(section("formats.md", "## `lean-merge plan --json`"))
    work = make_plan(family_recipe())
    told = plan_dict(work, early_look(work))
    assert fields == paths(told, {"counts", "predicted", "look"})


def test_every_field_of_a_sweep_is_documented_and_no_other(tmp_path: Path):
    from lean_merge import Grid, Resources, sweep

    recipe, cpu = family_recipe(output="none"), Resources(device="cpu", threads=1)
    table = sweep(recipe, Grid(thresholds=[0.9]), tmp_path / "out", resources=cpu).table
    top, row = section("sweep.md", "### The table").split("A row of `points`:")
    assert documented(top) == set(table)
    assert documented(row) == set(table["points"][0])


def test_every_field_of_an_inspection_is_documented():
    fields = documented(section("formats.md", "## `lean-merge inspect --json`"))
    facts = inspect_dict(str(FAMILY / "mllm"))
    assert fields == set(facts)
    text = section("formats.md", "## `lean-merge inspect --json`")
    assert all(f"`{key}`" in text for key in facts["tensors"][0])
    assert open_checkpoint(FAMILY / "mllm").tensors


def test_every_field_of_the_list_of_methods_is_documented():
    text = section("formats.md", "## `lean-merge methods --json`")
    for method in methods_list():
        assert all(f"`{key}`" in text for key in method)
        assert all(f"`{key}`" in text for each in method["parameters"] for key in each)


def test_every_key_of_a_recipe_and_parameter_of_a_method_is_documented():
    text = section("formats.md", "## Recipe")
    assert all(f"| `{name}` |" in text for name in MergeRecipe.__dataclass_fields__)
    for method in methods_list():
        assert f"`{method['name']}`" in text
        for parameter in method["parameters"]:
            assert f"`{parameter['name']}`" in text, parameter
    parameters = {each["name"]: each for each in methods_list()}["ip_merging"]["parameters"]
    for parameter in parameters:
        default = parameter["default"]
        shown = f"[{', '.join(default)}]" if isinstance(default, list) else str(default)
        assert re.search(rf"\| `{parameter['name']}` \|.*\| `{re.escape(shown)}` \|", text)


def test_exit_codes_are_those_of_the_program():
    from lean_merge import errors

    text = section("formats.md", "## Exit codes")
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", text, re.MULTILINE)}
    of_errors = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.LeanMergeError)
    }
    used = {cli.EXIT_FAILED, cli.EXIT_USAGE, cli.EXIT_INTERRUPTED}
    assert codes == {0, 3} | of_errors | used


# --- links and paths ----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub derives them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_resolve(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def test_files_that_the_documentation_names_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        example = {
            "lean_merge/methods/negation.py",
            "lean_merge/methods/magmax.py",
            "tests/methods/test_negation_and_magmax.py",
        }
        for name in set(re.findall(r"`((?:tests|bench|docs|lean_merge)/[\w./-]+)`", text)):
            assert name in example or (ROOT / name).exists(), f"{page.name}: {name}"


def test_nothing_names_a_place_on_someones_machine():
    """Spelt in two parts here, so that this file passes too."""
    places = [f"/{name}/" for name in ("wo" + "rk", "ro" + "ot", "tm" + "p", "ho" + "me")]
    pattern = re.compile("|".join(rf"(?<![\w.*~]){place}" for place in places))
    folders = [ROOT / name for name in ("lean_merge", "docs", "tests", "bench")]
    files = [each for folder in folders for each in folder.rglob("*") if each.is_file()]
    for file in [*files, *PAGES]:
        if {"__pycache__", ".hypothesis"} & set(file.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        assert not pattern.search(text), file
