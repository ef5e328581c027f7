"""The options that several commands share, and what they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lean_merge.checkpoints import open_checkpoint
from lean_merge.cli import describe
from lean_merge.errors import RecipeError
from lean_merge.mapping import language_layout
from lean_merge.plan.resources import Resources
from lean_merge.recipe import MergeRecipe, load_recipe_file
from lean_merge.sizes import parse_size

MERGEKITS = ("models", "slices", "modules", "gate_mode")
"""Keys that only mergekit's own recipes have."""
RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE.yml]", help="The recipe, which flags override.")
]
Base = Annotated[str | None, typer.Option(help="The base LLM, as a folder or a hub id.")]
Mllm = Annotated[
    str | None,
    typer.Option(help="The MLLM that receives, likewise; without one the base receives."),
]
Experts = Annotated[
    list[str] | None,
    typer.Option("--expert", "--math", help="An expert LLM that gives; may be repeated."),
]
MethodName = Annotated[
    str | None, typer.Option("--method", help="The merge method; lean-merge methods lists them.")
]


def _threshold(text: str | None) -> str | None:
    """Refuse what is neither a number nor auto."""
    if text is not None and text != "auto":
        try:
            float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a number, nor auto.") from None
    return text


Threshold = Annotated[
    str | None,
    typer.Option(
        callback=_threshold, help="Select weights from this similarity on; auto finds one."
    ),
]
SelectBy = Annotated[str | None, typer.Option(help="Compare the first or the max similarity.")]
Temperature = Annotated[float | None, typer.Option(help="The tau of the importance softmax.")]
Nuclear = Annotated[
    str | None, typer.Option(help="Rescale by full or by top_q sums of singular values.")
]
Stages = Annotated[str | None, typer.Option(help="The stages to run: select[,rescale][,project].")]
UpdateScale = Annotated[float | None, typer.Option(help="The factor of the update.")]
Rank = Annotated[str | None, typer.Option(help="How many directions to compute, or auto.")]
Svd = Annotated[str | None, typer.Option(help="Compute singular vectors randomized or exact.")]
Importance = Annotated[str | None, typer.Option(help="Weigh directions by softmax or relative.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set any other parameter of the method."),
]
OutputKind = Annotated[
    str | None,
    typer.Option(help="Write a checkpoint, a lora adapter, or none: the report alone."),
]
LoraRank = Annotated[
    str | None, typer.Option(help="The rank of every weight; auto keeps each update whole.")
]
ScopeName = Annotated[
    str | None,
    typer.Option(help="Merge matrices, or language: norms, biases, embeddings and head as well."),
]
LoraUniformRank = Annotated[
    bool | None,
    typer.Option(
        "--lora-uniform-rank/--no-lora-uniform-rank",
        help="Fill every module of an adapter with zeros up to the largest rank, or not.",
    ),
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
    typer.Option(help="Write merged weights as auto, float32, bfloat16 or float16."),
]
Rounding = Annotated[str | None, typer.Option(help="Round to the nearest number, or stochastic.")]
ShardSize = Annotated[
    str | None, typer.Option(help="The size of the largest shard: 5GB, 2GiB, 500MB.")
]
Seed = Annotated[int | None, typer.Option(help="The seed of all random numbers.")]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Go on where weights do not map; say what is left.")
]
AllowTextMllm = Annotated[
    bool,
    typer.Option("--allow-text-mllm", help="Take an MLLM of text alone beside one that has more."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Go on where a model was hardly tuned from the base.")
]
Device = Annotated[str, typer.Option(help="Compute on auto, cpu, cuda or cuda:N.")]
Memory = Annotated[
    str | None,
    typer.Option(help="The most anonymous memory to take; by default half of what is free."),
]
Vram = Annotated[str | None, typer.Option(help="The most device memory to take.")]
Threads = Annotated[
    int | None,
    typer.Option(
        help="The number of threads, of which 4 help at most; by default one for each processor."
    ),
]
FromAnalysis = Annotated[
    Path | None,
    typer.Option("--analysis", help="Decide from this analysis of the same models."),
]
NoResume = Annotated[
    bool, typer.Option("--no-resume", help="Start over instead of going on with unfinished output.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _recipe(file: Path | None, given: dict[str, Any], parameters: dict[str, Any]) -> MergeRecipe:
    """Return the recipe of a file, in which the flags that were given replace what it says."""
    data = load_recipe_file(file) if file is not None else {}
    if any(key in data for key in MERGEKITS):
        data = _mergekits(data, given)
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
    needed = {"--base": "base_model", "--expert": "experts"}
    missing = [flag for flag, name in needed.items() if not data.get(name)]
    if missing:
        raise RecipeError(f"Missing {', '.join(missing)}; give them, or a recipe file.")
    return MergeRecipe.from_dict(data)


def _mergekits(data: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that mergekit's recipe stands for, with the flags that were given."""
    from lean_merge.recipe.mergekit import translated

    for key in ("base_model", "merge_method"):
        if given.get(key) is not None:
            data[key] = given[key]
    scope = given.get("scope") or "language"
    found = translated(data, mllm=given.get("mllm_model"), scope=scope)
    if found.layers is not None:
        base = open_checkpoint(found.recipe["base_model"])
        layers = next(iter(language_layout(base).values()), found.layers)
        if layers != found.layers:
            raise RecipeError(
                f"slices: their layer_range ends at layer {found.layers}, and the models have "
                f"{layers} layers; lean-merge merges all, and does not stack layers anew."
            )
    return found.recipe


def _rank(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text


def work_of(
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
    scale: UpdateScale = None,
    rank: Rank = None,
    svd: Svd = None,
    importance: Importance = None,
    set_: Set = None,
    scope: ScopeName = None,
    include: Include = None,
    exclude: Exclude = None,
    output: OutputKind = None,
    lora_rank: LoraRank = None,
    lora_uniform_rank: LoraUniformRank = None,
    out_dtype: OutDtype = None,
    rounding: Rounding = None,
    shard_size: ShardSize = None,
    seed: Seed = None,
    allow_partial: AllowPartial = False,
    allow_text_mllm: AllowTextMllm = False,
    force: Force = False,
    device: Device = "auto",
    memory: Memory = None,
    vram: Vram = None,
    threads: Threads = None,
) -> tuple[MergeRecipe, Resources]:
    """Return the recipe and the resources that the options shared by several commands ask for."""
    parameters: dict[str, Any] = {
        "threshold": None if threshold is None else describe.parse_value(threshold),
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
        "scope": scope,
        "include": list(include) if include else None,
        "exclude": list(exclude) if exclude else None,
        "output": output,
        "lora_rank": _rank(lora_rank),
        "lora_uniform_rank": lora_uniform_rank,
        "out_dtype": out_dtype,
        "rounding": rounding,
        "shard_size": shard_size,
        "seed": seed,
        "allow_partial": allow_partial or None,
        "allow_text_mllm": allow_text_mllm or None,
        "force": force or None,
    }
    resources = resources_of(device, memory, vram, threads)
    return _recipe(recipe, wanted, parameters), resources


def resources_of(
    device: str, memory: str | None, vram: str | None, threads: int | None
) -> Resources:
    """Return the resources that the options ask for."""
    return Resources(
        device=device,
        memory=None if memory is None else parse_size(memory),
        vram=None if vram is None else parse_size(vram),
        threads=threads,
    )


def shares_options_of_work(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command the options of `work_of`, which it receives as `work`, before its own.

    Where both have an option of one name, the command keeps its own.
    """
    own = inspect.signature(command, eval_str=True).parameters
    every = inspect.signature(work_of, eval_str=True).parameters
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
