"""The command line: parse, call the public API, show progress, map errors to exit codes."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from tqdm import tqdm

from lean_merge import describe
from lean_merge.api import check_has_folder
from lean_merge.api import merge as merge_api
from lean_merge.checkpoints import downloads_shown
from lean_merge.engine.run import Event
from lean_merge.errors import LeanMergeError, RecipeError, plain
from lean_merge.identity import run_facts
from lean_merge.output import check_output
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.recipe import MergeRecipe, load_recipe_file
from lean_merge.resources import Resources
from lean_merge.sizes import parse_size
from lean_merge.sweep import Evaluation, Grid, PointEvent, sweep
from lean_merge.verify import verify
from lean_merge.version import __version__

EXIT_FAILED, EXIT_USAGE, EXIT_DIFFERENT, EXIT_INTERRUPTED = 1, 2, 3, 5
_SIGINT_OF_TYPER = 130
_CommandLineError: type[Any] = next(
    each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException"
)
"""Of the click that typer uses: newer typers carry their own."""

app = typer.Typer(
    name="lean-merge",
    help="Merge the abilities of a text model into a multimodal one, by streaming IP-Merging.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE.yml]", help="Recipe; flags override it.")
]
Base = Annotated[str | None, typer.Option(help="Base LLM: folder or hub id.")]
Mllm = Annotated[str | None, typer.Option(help="MLLM that receives: folder or hub id.")]
Experts = Annotated[
    list[str] | None,
    typer.Option("--expert", "--math", help="Expert LLM that gives; may be repeated."),
]
MethodName = Annotated[str | None, typer.Option("--method", help="See lean-merge methods.")]
Threshold = Annotated[float | None, typer.Option(help="S_alpha: select from this similarity.")]
SelectBy = Annotated[str | None, typer.Option(help="first or max similarity.")]
Temperature = Annotated[float | None, typer.Option(help="tau of the importance softmax.")]
Nuclear = Annotated[str | None, typer.Option(help="full or top_q sums of singular values.")]
Stages = Annotated[str | None, typer.Option(help="select[,rescale][,project].")]
Scale = Annotated[float | None, typer.Option(help="Factor of the update.")]
Rank = Annotated[str | None, typer.Option(help="auto, or directions to compute.")]
Svd = Annotated[str | None, typer.Option(help="randomized or exact.")]
Importance = Annotated[str | None, typer.Option(help="softmax or relative.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other parameter of the method."),
]
Output = Annotated[
    str | None,
    typer.Option(help="checkpoint; lora, an adapter; or none, the analysis alone."),
]
LoraRank = Annotated[
    str | None, typer.Option(help="auto keeps each update; or the rank of every weight.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Merge only what this regex, or 'layers: 0-15', names; may be repeated."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Copy what this regex, or 'layers: 0-15', names.")
]
OutDtype = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16, of in-scope weights or adapter."),
]
Rounding = Annotated[str | None, typer.Option(help="nearest or stochastic.")]
ShardSize = Annotated[str | None, typer.Option(help="Largest shard: 5GB, 2GiB, 500MB.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Go on where weights do not map; say what is left.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Memory = Annotated[
    str | None, typer.Option(help="Ceiling on anonymous memory; default half of what is free.")
]
Vram = Annotated[str | None, typer.Option(help="Ceiling on device memory.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Worker threads, of which 4 are used at most; default one a processor."),
]
NoResume = Annotated[
    bool, typer.Option("--no-resume", help="Start over instead of going on with unfinished output.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _recipe(file: Path | None, given: dict[str, Any], parameters: dict[str, Any]) -> MergeRecipe:
    """The recipe file's data with the flags that were given put over it."""
    data = load_recipe_file(file) if file is not None else {}
    data |= {name: value for name, value in given.items() if value is not None}
    flags = {name: value for name, value in parameters.items() if value is not None}
    if flags:
        common = data.get("parameters") or {}
        if not isinstance(common, dict):
            raise RecipeError("parameters must be a mapping in the recipe.")
        data["parameters"] = common | flags
        experts = data.get("experts")
        for expert in experts if isinstance(experts, list) else []:
            if isinstance(expert, dict) and isinstance(expert.get("parameters"), dict):
                own = expert["parameters"]
                expert["parameters"] = {n: v for n, v in own.items() if n not in flags}
    missing = [
        flag
        for flag, name in (
            ("--base", "base_model"),
            ("--mllm", "mllm_model"),
            ("--expert", "experts"),
        )
        if not data.get(name)
    ]
    if missing:
        raise RecipeError(f"Missing {', '.join(missing)}; give them, or a recipe file.")
    return MergeRecipe.from_dict(data)


def _rank(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text


def _work(
    recipe: RecipeFile = None,
    base: Base = None,
    mllm: Mllm = None,
    expert: Experts = None,
    method: MethodName = None,
    threshold: Threshold = None,
    select_by: SelectBy = None,
    temperature: Temperature = None,
    nuclear: Nuclear = None,
    stages: Stages = None,
    scale: Scale = None,
    rank: Rank = None,
    svd: Svd = None,
    importance: Importance = None,
    set_: Set = None,
    include: Include = None,
    exclude: Exclude = None,
    output: Output = None,
    lora_rank: LoraRank = None,
    out_dtype: OutDtype = None,
    rounding: Rounding = None,
    shard_size: ShardSize = None,
    seed: Seed = None,
    allow_partial: AllowPartial = False,
    device: Device = "auto",
    memory: Memory = None,
    vram: Vram = None,
    threads: Threads = None,
) -> tuple[MergeRecipe, Resources]:
    """What the options shared by `merge` and `plan` ask for."""
    parameters: dict[str, Any] = {
        "threshold": threshold,
        "select_by": select_by,
        "temperature": temperature,
        "nuclear": nuclear,
        "stages": stages,
        "scale": scale,
        "rank": _rank(rank),
        "svd": svd,
        "importance": importance,
    }
    for pair in set_ or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set takes NAME=VALUE, not {pair!r}.")
        parameters[name] = describe.parse_value(value)
    wanted = {
        "base_model": base,
        "mllm_model": mllm,
        "experts": list(expert) if expert else None,
        "merge_method": method,
        "include": list(include) if include else None,
        "exclude": list(exclude) if exclude else None,
        "output": output,
        "lora_rank": _rank(lora_rank),
        "out_dtype": out_dtype,
        "rounding": rounding,
        "shard_size": shard_size,
        "seed": seed,
        "allow_partial": allow_partial or None,
    }
    resources = _resources(device, memory, vram, threads)
    return _recipe(recipe, wanted, parameters), resources


def _resources(device: str, memory: str | None, vram: str | None, threads: int | None) -> Resources:
    return Resources(
        device=device,
        memory=None if memory is None else parse_size(memory),
        vram=None if vram is None else parse_size(vram),
        threads=threads,
    )


def _shares_options_of_work(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command `_work`'s parameters before its own; it receives the plan's arguments.

    One of the same name is the command's own.
    """
    own = inspect.signature(command, eval_str=True).parameters
    every = inspect.signature(_work, eval_str=True).parameters
    shared = {name: parameter for name, parameter in every.items() if name not in own}
    listed = [*shared.values(), *(p for name, p in own.items() if name != "work")]
    order = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in listed]

    def wrapped(**arguments: Any) -> int | None:
        work = {name: arguments.pop(name) for name in shared}
        return command(work=work, **arguments)

    wrapped.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__annotations__ = {p.name: p.annotation for p in order}
    return wrapped


@app.command("merge")
@_shares_options_of_work
def merge_command(
    work: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="Output folder; --output none needs none.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output once the new is complete.")
    ] = False,
    no_resume: NoResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge, and write a checkpoint that from_pretrained loads, or an adapter that PEFT loads.

    Onto its own unfinished output it goes on where it stopped; onto its own complete output there
    is nothing to do.
    """
    if out is None and work["recipe"] is None and work["output"] != "none":
        raise RecipeError("Missing --out, the output folder; or give --output none.")
    recipe, resources = _work(**work)
    check_has_folder(recipe, out)
    with downloads_shown(not quiet):
        plan = make_plan(recipe, resources)
    if not (quiet or as_json):
        for line in describe.warnings_of(plan):
            _echo(f"warning: {line}", err=True)
    with _progress(plan, quiet) as on_event:
        result = merge_api(plan, out, overwrite=overwrite, resume=not no_resume, on_event=on_event)
    if not (quiet or as_json) and result.was_complete:
        _echo(f"{result.path} is complete already; nothing to do.", err=True)
    elif not (quiet or as_json) and result.reused:
        _echo(f"{result.reused} of {len(plan.tasks)} tensors were on the disk.", err=True)
    if as_json:
        _echo(json.dumps(result.report))
    elif not quiet:
        _echo(describe.result_text(result.path, result.report))


@app.command("plan")
@_shares_options_of_work
def plan_command(
    work: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="Check that this folder could be written; it is not.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Allow that the folder is not empty.")
    ] = False,
    no_resume: NoResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Read headers only: what would be merged and copied, memory, disk, bytes."""
    with downloads_shown(not quiet):
        plan = make_plan(*_work(**work))
    if out is not None:
        check_output(
            out,
            plan.shards,
            inputs=plan.inputs,
            overwrite=overwrite,
            run=run_facts(plan, out),
            resume=not no_resume,
        )
    if quiet:
        return
    _echo(json.dumps(describe.plan_dict(plan)) if as_json else describe.plan_text(plan))


@app.command("sweep")
@_shares_options_of_work
def sweep_command(
    work: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder of the table and of all results.")],
    thresholds: Annotated[
        str | None,
        typer.Option(help="0.1:0.9:0.1 is start:stop:step, both included; or 0.3,0.5,auto."),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option(help="Sets as 'select;select,rescale'; may be repeated."),
    ] = None,
    scales: Annotated[str | None, typer.Option(help="As thresholds.")] = None,
    temperatures: Annotated[str | None, typer.Option(help="As thresholds.")] = None,
    analysis: Annotated[
        Path | None,
        typer.Option(help="Folder of an analysis of these models; default: one is made in OUT."),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Measure each result; {path}, {name}, {mllm}, {threshold} and so on are put in, "
            "and the last JSON value that it prints is kept.",
        ),
    ] = None,
    evaluate_shell: Annotated[
        bool, typer.Option("--evaluate-shell", help="Run COMMAND by the shell.")
    ] = False,
    evaluate_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which COMMAND is ended.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of another recipe or input.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Merge at every point of a grid from one analysis, measure, and print a table.

    Points that come out the same are made once, and equal files are hard links. The same command
    goes on where it stopped. The exit code is 1 if any point could not be made or measured.
    """
    grid = Grid(
        thresholds=thresholds or (),
        stages=tuple(stages or ()),
        scales=scales or (),
        temperatures=temperatures or (),
    )
    evaluation = None
    if evaluate is not None:
        evaluation = Evaluation(evaluate, evaluate_shell, evaluate_timeout)
    recipe, resources = _work(**work)

    def on_event(event: PointEvent | Event) -> None:
        if isinstance(event, PointEvent) and not (quiet or as_json):
            _echo(f"{event.number} of {event.total}: {event.record['name']}", err=True)

    with downloads_shown(not quiet):
        result = sweep(
            recipe,
            grid,
            out,
            analysis=analysis,
            evaluate=evaluation,
            resources=resources,
            overwrite=overwrite,
            on_event=on_event,
        )
    if as_json:
        _echo(json.dumps(result.table))
    elif not (quiet and result.ok):
        _echo(describe.sweep_text(result.table))
    return 0 if result.ok else EXIT_FAILED


@app.command("verify")
def verify_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a complete output.")],
    full: Annotated[
        bool, typer.Option("--full", help="Merge all weights again, not a sample.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the sample; default another one each time.")
    ] = None,
    without_inputs: Annotated[
        bool, typer.Option("--without-inputs", help="Compare with the journal only.")
    ] = False,
    device: Device = "auto",
    memory: Memory = None,
    vram: Vram = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Read an output again, all of it, and say what differs; exit code 3 if anything does.

    Every file is compared with the journal, tensors out of scope with the MLLM's, and a sample of
    the others is merged again: a twentieth, but at least 8.
    """
    result = verify(
        out,
        full=full,
        seed=seed,
        with_inputs=not without_inputs,
        resources=_resources(device, memory, vram, threads),
    )
    if as_json:
        _echo(json.dumps(describe.verification_dict(result)))
    elif not (quiet and result.ok):
        _echo(describe.verification_text(result))
    return 0 if result.ok else EXIT_DIFFERENT


@app.command("methods")
def methods_command(as_json: Json = False, debug: Debug = False) -> None:
    """List the methods, their parameters and references."""
    methods = describe.methods_list()
    _echo(json.dumps(methods) if as_json else describe.methods_text(methods))


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="Folder, weight file or hub id.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show names, dtypes, shapes, sizes and the language model's layout, from headers alone."""
    facts = describe.inspect_dict(checkpoint)
    _echo(json.dumps(facts) if as_json else describe.inspect_text(facts))


@app.command("demo")
def demo_command(
    out: Annotated[
        Path | None, typer.Option(help="Keep the merged models here; default: a temporary folder.")
    ] = None,
    problems: Annotated[int, typer.Option(min=10, help="Held-out problems for each task.")] = 500,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge the embedded family, real and trained, and evaluate it on held-out problems."""
    from lean_merge.demo.run import run_demo, table

    results = run_demo(out, problems=problems, say=lambda line: _echo(line, err=True))
    _echo(json.dumps(results) if as_json else table(results))


@contextmanager
def _progress(plan: Plan, quiet: bool) -> Iterator[Callable[[Event], None]]:
    total = sum(task.tensor.nbytes for task in plan.tasks)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:

        def on_event(event: Event) -> None:
            bar.set_postfix_str(event.name[-40:], refresh=False)
            bar.update(event.nbytes)
            if not quiet:
                for line in event.warnings:
                    bar.write(f"warning: {line}", file=sys.stderr)

        yield on_event


def _version(wanted: bool) -> None:
    if wanted:
        _echo(f"lean-merge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _echo(text: str, *, err: bool = False) -> None:
    """Print, with what would steer a terminal escaped: names come from strangers' files."""
    typer.echo(plain(text), err=err)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run, and leave with a documented exit code (docs/formats.md)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminate)
    try:
        # `verify` returns a code, other commands None; newer typers make a code of Ctrl-C.
        code = app(arguments, standalone_mode=False)
        if code == _SIGINT_OF_TYPER:
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except _CommandLineError as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except LeanMergeError as error:
        _fail(str(error), error.exit_code, arguments)
    except (KeyboardInterrupt, typer.Abort):
        message = "interrupted; the same command goes on where it stopped"
        _fail(message, EXIT_INTERRUPTED, arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except MemoryError:
        _fail("out of memory; give less with --memory", EXIT_FAILED, arguments)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}", EXIT_FAILED, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> None:
    if "--debug" in arguments:
        import traceback

        traceback.print_exc()
    print(f"lean-merge: {plain(message)}", file=sys.stderr)
    sys.exit(code)
