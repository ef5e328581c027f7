"""The commands methods, inspect and demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument

from lean_merge.cli.app import app, echo
from lean_merge.cli.helping import LOOKING, METHOD, MODELS, OUTPUT, RUN
from lean_merge.cli.listing import method_text, methods_text
from lean_merge.cli.methodtable import by_name, methods_list
from lean_merge.cli.options import Debug, Json, method_names, option
from lean_merge.recipe import reject_unknown


@app.command("methods", rich_help_panel=LOOKING)
def methods_command(
    name: Annotated[
        str | None,
        Argument(
            help="A method, which is explained with its parameters.",
            rich_help_panel=METHOD,
            autocompletion=method_names,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List all methods and what they need, or explain one and its parameters."""
    if name is None:
        echo(json.dumps(methods_list()) if as_json else methods_text(methods_list()))
        return
    found = by_name()
    name = name.strip().lower().replace("-", "_")
    reject_unknown([name], found, "the list of methods")
    echo(json.dumps(found[name]) if as_json else method_text(found[name]))


@app.command("inspect", rich_help_panel=LOOKING)
def inspect_command(
    checkpoint: Annotated[
        str,
        Argument(
            metavar="MODEL", help="A folder, a weight file or a hub id.", rich_help_panel=MODELS
        ),
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's tensors, dtypes, shapes, sizes and language model, from headers alone."""
    from lean_merge.cli import describe

    facts = describe.inspect_dict(checkpoint)
    echo(json.dumps(facts) if as_json else describe.inspect_text(facts))


@app.command("demo", rich_help_panel=LOOKING)
def demo_command(
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            metavar="DIR",
            help="Keep the merged models in this folder. By default they are deleted.",
        ),
    ] = None,
    problems: Annotated[
        int,
        option(
            RUN,
            metavar="NUMBER",
            min=10,
            help="How many problems each model has to solve per task.",
        ),
    ] = 500,
    model: Annotated[
        Path | None,
        option(
            RUN,
            "--measure",
            metavar="MODEL",
            help="Merge nothing, but measure this model of the family and print counts as JSON.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge small trained models that come with the program, and measure every result."""
    from lean_merge.demo.run import count_right, run_demo, table

    if model is not None:
        echo(json.dumps(count_right(model, problems=problems)))
        return
    results = run_demo(out, problems=problems, say=lambda line: echo(line, err=True))
    echo(json.dumps(results) if as_json else table(results))
