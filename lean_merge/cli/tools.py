"""The commands methods, inspect and demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lean_merge.cli import describe
from lean_merge.cli.app import app, echo
from lean_merge.cli.options import Debug, Json
from lean_merge.methods import canonical_name
from lean_merge.recipe import reject_unknown


@app.command("methods")
def methods_command(
    name: Annotated[
        str | None, typer.Argument(help="A method, whose parameters are listed.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods and what they need, or the parameters of one with their defaults."""
    methods = describe.methods_list()
    if name is None:
        echo(json.dumps(methods) if as_json else describe.methods_text(methods))
        return
    found = {each["name"]: each for each in methods}
    reject_unknown([canonical_name(name)], found, "the list of methods")
    method = found[canonical_name(name)]
    echo(json.dumps(method) if as_json else describe.method_text(method))


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a weight file or a hub id.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show names, dtypes, shapes, sizes and the language model's layout, from headers alone."""
    facts = describe.inspect_dict(checkpoint)
    echo(json.dumps(facts) if as_json else describe.inspect_text(facts))


@app.command("demo")
def demo_command(
    out: Annotated[
        Path | None, typer.Option(help="Keep the merged models here, not in a temporary folder.")
    ] = None,
    problems: Annotated[
        int, typer.Option(min=10, help="How many held-out problems each task has.")
    ] = 500,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge the embedded family, real and trained, and evaluate it on held-out problems."""
    from lean_merge.demo.run import run_demo, table

    results = run_demo(out, problems=problems, say=lambda line: echo(line, err=True))
    echo(json.dumps(results) if as_json else table(results))
