"""The options that several commands share, and what they ask for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lean_merge.cli.helping import METHOD, MODELS, OUTPUT, RESOURCES, RUN
from lean_merge.cli.methodtable import by_name, default_of
from lean_merge.cli.progress import starting
from lean_merge.errors import RecipeError
from lean_merge.recipe import (
    OUT_DTYPES,
    ROUNDINGS,
    MergeRecipe,
    load_recipe_file,
    parse_yaml,
    reject_unknown,
)
from lean_merge.sizes import parse_size

if TYPE_CHECKING:
    from lean_merge.plan.resources import Resources

MERGEKITS = ("models", "slices", "modules", "gate_mode")
"""Keys that only mergekit's own recipes have."""
IGNORED: Mapping[str, tuple[str, ...]] = {
    "checkpoint": ("lora_rank", "lora_uniform_rank"),
    "lora": ("shard_size", "rounding"),
    "none": ("lora_rank", "lora_uniform_rank", "shard_size", "out_dtype", "rounding"),
}
"""The options that have no effect with an output."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MergeRecipe)}


def option(group: str, *flags: str, help: str, **settings: Any) -> Any:
    """Declare an option that help shows in a group."""
    return typer.Option(*flags, help=help, rich_help_panel=group, **settings)


def _own(parameter: str, text: str) -> str:
    """Return help on a parameter of IP-Merging, with its default."""
    return f"{text} The default of ip_merging is {default_of('ip_merging', parameter)}."


def method_names(incomplete: str) -> list[str]:
    """Return the methods whose names begin in this way, for the shell to complete."""
    return [name for name in by_name() if name.startswith(incomplete)]


def _words(*words: str) -> Callable[[str], list[str]]:
    """Return a function that completes one of the words."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


RecipeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RECIPE.yml]",
        help="A recipe in YAML, ours or mergekit's. Options replace what it says.",
        rich_help_panel=MODELS,
    ),
]
Base = Annotated[
    str | None,
    option(
        MODELS,
        metavar="MODEL",
        help="The language model that the others were tuned from: a folder, a weight file, or a "
        "hub id such as org/name or org/name@revision.",
    ),
]
Mllm = Annotated[
    str | None,
    option(
        MODELS,
        metavar="MODEL",
        help="The multimodal model that receives. Without one the base receives.",
    ),
]
Experts = Annotated[
    list[str] | None,
    option(
        MODELS,
        "--expert",
        "--math",
        metavar="MODEL",
        help="A model whose abilities are merged in. Repeat the option for several experts.",
    ),
]
Parents = Annotated[
    list[str] | None,
    option(
        MODELS,
        "--parent",
        metavar="[N=]MODEL",
        help="The model that expert N was tuned from, if that is not the base: 2=MODEL is the "
        "second expert's. A single expert needs no number.",
    ),
]
ScopeName = Annotated[
    str | None,
    option(
        MODELS,
        metavar="SCOPE",
        help="Merge the matrices of the layers (matrices), or all of the language model: norms, "
        "biases, embeddings and head too (language). The default is matrices.",
        autocompletion=_words("matrices", "language"),
    ),
]
Include = Annotated[
    list[str] | None,
    option(
        MODELS,
        metavar="PATTERN",
        help="Merge only weights whose names match this regular expression, or whose layers are "
        "in a range such as 'layers: 0-15'. Repeat it for several.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    option(
        MODELS,
        metavar="PATTERN",
        help="Copy weights that match instead of merging them. Repeat it for several.",
    ),
]
AllowPartial = Annotated[
    bool,
    option(
        MODELS,
        "--allow-partial",
        help="Go on if some weights have no counterpart in every model. They are copied, and the "
        "report lists them.",
    ),
]
AllowTextMllm = Annotated[
    bool,
    option(
        MODELS,
        "--allow-text-mllm",
        help="Accept an MLLM of text alone beside a model that has vision or audio.",
    ),
]
Force = Annotated[
    bool,
    option(
        MODELS,
        "--force",
        help="Go on if a model was hardly tuned from the base, or has its rows in another order.",
    ),
]
MethodName = Annotated[
    str | None,
    option(
        METHOD,
        "--method",
        metavar="NAME",
        help="The merge method. `lean-merge methods` lists all, and `lean-merge methods NAME` "
        f"explains one and its parameters. The default is {_DEFAULTS['merge_method']}.",
        autocompletion=method_names,
    ),
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
    option(
        METHOD,
        metavar="NUMBER",
        callback=_threshold,
        help=_own(
            "threshold",
            "Merge only weights whose similarity to the MLLM's own tuning is at least this, from 0 "
            "to 1; auto finds a threshold first.",
        ),
    ),
]
SelectBy = Annotated[
    str | None,
    option(
        METHOD,
        metavar="WHICH",
        help=_own("select_by", "Compare the threshold with the first or the max similarity."),
        autocompletion=_words("first", "max"),
    ),
]
Temperature = Annotated[
    float | None,
    option(
        METHOD,
        metavar="NUMBER",
        help=_own("temperature", "The temperature of the softmax that weighs directions."),
    ),
]
Nuclear = Annotated[
    str | None,
    option(
        METHOD,
        metavar="WHICH",
        help=_own(
            "nuclear", "Rescale by the sums of all singular values (full) or the leading (top_q)."
        ),
        autocompletion=_words("full", "top_q"),
    ),
]
Stages = Annotated[
    str | None,
    option(
        METHOD,
        metavar="STAGES",
        help=_own("stages", "The stages to run: select, and after it rescale, project, or both."),
    ),
]
UpdateScale = Annotated[
    float | None,
    option(
        METHOD,
        metavar="NUMBER",
        help=_own("scale", "The factor of the update. Many other methods have this parameter too."),
    ),
]
Rank = Annotated[
    str | None,
    option(
        METHOD,
        metavar="NUMBER",
        help=_own("rank", "How many directions are computed; auto lets the weight decide."),
    ),
]
Svd = Annotated[
    str | None,
    option(
        METHOD,
        metavar="HOW",
        help=_own("svd", "Compute singular vectors by sketches (randomized) or in full (exact)."),
        autocompletion=_words("randomized", "exact"),
    ),
]
Importance = Annotated[
    str | None,
    option(
        METHOD,
        metavar="HOW",
        help=_own("importance", "Weigh directions by softmax or relative."),
        autocompletion=_words("softmax", "relative"),
    ),
]
Set = Annotated[
    list[str] | None,
    option(
        METHOD,
        "--set",
        metavar="NAME=VALUE",
        help="Set any parameter of the method. Repeat it for several.",
    ),
]
Seed = Annotated[
    int | None,
    option(
        METHOD,
        metavar="NUMBER",
        help=f"The seed of all random numbers. The default is {_DEFAULTS['seed']}.",
    ),
]
OutputKind = Annotated[
    str | None,
    option(
        OUTPUT,
        metavar="KIND",
        help="Write a whole model (checkpoint), a LoRA adapter for the MLLM (lora), or only the "
        f"report (none). The default is {_DEFAULTS['output']}.",
        autocompletion=_words("checkpoint", "lora", "none"),
    ),
]
LoraRank = Annotated[
    str | None,
    option(
        OUTPUT,
        metavar="NUMBER",
        help="With --output lora: the rank of each weight; auto keeps every update whole. The "
        f"default is {_DEFAULTS['lora_rank']}.",
    ),
]
LoraUniformRank = Annotated[
    bool | None,
    option(
        OUTPUT,
        "--lora-uniform-rank/--no-lora-uniform-rank",
        help="With --output lora: fill all modules with zeros up to the largest rank, which every "
        "loader understands, or give each its own rank. By default they are filled.",
    ),
]
OutDtype = Annotated[
    str | None,
    option(
        OUTPUT,
        metavar="DTYPE",
        help=f"Write merged weights as {', '.join(OUT_DTYPES[:-1])} or {OUT_DTYPES[-1]}; auto "
        f"keeps the MLLM's dtype. The default is {_DEFAULTS['out_dtype']}.",
        autocompletion=_words(*OUT_DTYPES),
    ),
]
Rounding = Annotated[
    str | None,
    option(
        OUTPUT,
        metavar="HOW",
        help="Round to the nearest number, or stochastic, which keeps small updates in the mean. "
        f"The default is {_DEFAULTS['rounding']}.",
        autocompletion=_words(*ROUNDINGS),
    ),
]
ShardSize = Annotated[
    str | None,
    option(
        OUTPUT,
        metavar="SIZE",
        help="The largest size of a weight file, such as 5GB, 2GiB or 500MB. The default is "
        f"{_DEFAULTS['shard_size'] // 10**9}GB.",
    ),
]
Device = Annotated[
    str,
    option(
        RESOURCES,
        metavar="DEVICE",
        help="Compute on auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.",
        autocompletion=_words("auto", "cpu", "cuda"),
    ),
]
Cuda = Annotated[bool, option(RESOURCES, "--cuda", help="The same as --device cuda.")]
Memory = Annotated[
    str | None,
    option(
        RESOURCES,
        metavar="SIZE",
        help="The most memory to take, such as 4GB. By default it is half of what is free.",
    ),
]
Vram = Annotated[
    str | None,
    option(
        RESOURCES,
        metavar="SIZE",
        help="The most memory to take on the GPU. By default it is half of what is free there.",
    ),
]
Remote = Annotated[
    bool,
    option(
        RESOURCES,
        "--remote",
        help="Read weights of hub ids where they are, instead of downloading them, as names with "
        "hf:// are read.",
    ),
]
RemoteCache = Annotated[
    str | None,
    option(
        RESOURCES,
        metavar="SIZE",
        help="The most disk to take for bytes of other machines that are needed again. By default "
        "none is taken.",
    ),
]
Threads = Annotated[
    int | None,
    option(
        RESOURCES,
        metavar="NUMBER",
        help="The number of threads. By default there is one for each processor. More than 4 are "
        "taken as far as memory has room for them.",
    ),
]
FromAnalysis = Annotated[
    Path | None,
    option(
        METHOD,
        "--analysis",
        metavar="DIR",
        help="Decide from an analysis of the same models, which `lean-merge analyze` made.",
    ),
]
NoResume = Annotated[
    bool,
    option(RUN, "--no-resume", help="Start over instead of going on with unfinished output."),
]
Json = Annotated[bool, option(RUN, "--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, option(RUN, "--quiet", help="Print nothing but errors.")]
Debug = Annotated[bool, option(RUN, "--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True, slots=True)
class _Work:
    """The options that all commands share which merge or analyse; they ask for work on models."""

    recipe: RecipeFile = None
    base: Base = None
    mllm: Mllm = None
    expert: Experts = None
    parent: Parents = None
    scope: ScopeName = None
    include: Include = None
    exclude: Exclude = None
    allow_partial: AllowPartial = False
    allow_text_mllm: AllowTextMllm = False
    force: Force = False
    method: MethodName = None
    threshold: Threshold = None
    select_by: SelectBy = None
    temperature: Temperature = None
    nuclear: Nuclear = None
    stages: Stages = None
    scale: UpdateScale = None
    rank: Rank = None
    svd: Svd = None
    importance: Importance = None
    set_: Set = None
    seed: Seed = None
    output: OutputKind = None
    lora_rank: LoraRank = None
    lora_uniform_rank: LoraUniformRank = None
    out_dtype: OutDtype = None
    rounding: Rounding = None
    shard_size: ShardSize = None
    device: Device = "auto"
    cuda: Cuda = False
    memory: Memory = None
    vram: Vram = None
    threads: Threads = None
    remote: Remote = False
    remote_cache: RemoteCache = None


def parse_value(text: str) -> Any:
    """Return the value that YAML reads in a text, or else the text."""
    try:
        return parse_yaml(text, what="value")
    except RecipeError:
        return text


def _rank(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text


def work_of(**work: Any) -> tuple[MergeRecipe, Resources]:
    """Return the recipe and the resources that the options shared by several commands ask for."""
    asked = _Work(**work)
    parameters: dict[str, Any] = {
        "threshold": None if asked.threshold is None else parse_value(asked.threshold),
        "select_by": asked.select_by,
        "temperature": asked.temperature,
        "nuclear": asked.nuclear,
        "stages": asked.stages,
        "scale": asked.scale,
        "rank": _rank(asked.rank),
        "svd": asked.svd,
        "importance": asked.importance,
    }
    for pair in asked.set_ or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set takes NAME=VALUE, not {pair!r}.")
        parameters[name] = parse_value(value)
    wanted = {
        "base_model": asked.base,
        "mllm_model": asked.mllm,
        "experts": list(asked.expert) if asked.expert else None,
        "merge_method": asked.method,
        "scope": asked.scope,
        "include": list(asked.include) if asked.include else None,
        "exclude": list(asked.exclude) if asked.exclude else None,
        "output": asked.output,
        "lora_rank": _rank(asked.lora_rank),
        "lora_uniform_rank": asked.lora_uniform_rank,
        "out_dtype": asked.out_dtype,
        "rounding": asked.rounding,
        "shard_size": asked.shard_size,
        "seed": asked.seed,
        "allow_partial": asked.allow_partial or None,
        "allow_text_mllm": asked.allow_text_mllm or None,
        "force": asked.force or None,
    }
    recipe = _recipe(asked.recipe, wanted, parameters, asked.parent or [])
    refuse_ignored(work, IGNORED.get(recipe.output, ()), f"--output {recipe.output}")
    resources = resources_of(asked.device, asked.memory, asked.vram, asked.threads, cuda=asked.cuda)
    if asked.remote_cache is not None:
        cache = parse_size(asked.remote_cache)
        resources = dataclasses.replace(resources, remote_cache=cache)
    return _from_afar(recipe) if asked.remote else recipe, resources


def _from_afar(recipe: MergeRecipe) -> MergeRecipe:
    """Return the recipe with hf:// before every hub id, which is what is no path here."""

    def far(name: str) -> str:
        is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
        return f"hf://{name}" if is_id and not Path(name).exists() else name

    experts = tuple(
        dataclasses.replace(each, model=far(each.model), parent=each.parent and far(each.parent))
        for each in recipe.experts
    )
    mllm = recipe.mllm_model and far(recipe.mllm_model)
    return dataclasses.replace(
        recipe, base_model=far(recipe.base_model), mllm_model=mllm, experts=experts
    )


def refuse_ignored(given: Mapping[str, Any], ignored: Iterable[str], where: str) -> None:
    """Raise RecipeError for the first option that was given, and that has no effect there."""
    for name in ignored:
        if given.get(name) not in (None, False, []):
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{flag} has no effect with {where}; leave it out.")


def resources_of(
    device: str, memory: str | None, vram: str | None, threads: int | None, *, cuda: bool = False
) -> Resources:
    """Return the resources that the options ask for."""
    from lean_merge.engine import CREW
    from lean_merge.plan.resources import Resources

    if cuda and device not in ("auto", "cuda"):
        raise RecipeError(f"--cuda and --device {device} contradict each other; give one of them.")
    wanted = Resources(
        device="cuda" if cuda else device,
        memory=None if memory is None else parse_size(memory),
        vram=None if vram is None else parse_size(vram),
        threads=threads,
    )
    crew = CREW.get()
    return wanted if crew is None else crew.own(wanted)


def _recipe(
    file: Path | None, given: dict[str, Any], parameters: dict[str, Any], parents: list[str]
) -> MergeRecipe:
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
    reject_unknown(data, _DEFAULTS, "the recipe")
    needed = {"--base": "base_model", "--expert": "experts"}
    missing = [flag for flag, name in needed.items() if not data.get(name)]
    if missing:
        raise RecipeError(f"Missing {', '.join(missing)}; give them, or a recipe file.")
    recipe = MergeRecipe.from_dict(data)
    return _with_parents(recipe, parents) if parents else recipe


def _with_parents(recipe: MergeRecipe, parents: list[str]) -> MergeRecipe:
    """Return the recipe with the experts' parents that `--parent` names."""
    experts = list(recipe.experts)
    for given in parents:
        number, _, model = given.partition("=")
        if not (number.isdigit() and model):
            number, model = "1", given
            if len(experts) > 1:
                raise RecipeError(
                    f"--parent {given} does not say whose parent it is; with {len(experts)} "
                    f"experts, write --parent N={given} with the expert's number N."
                )
        if not 1 <= int(number) <= len(experts):
            raise RecipeError(f"--parent {given}: there are {len(experts)} expert(s).")
        place = int(number) - 1
        experts[place] = dataclasses.replace(experts[place], parent=model)
    return dataclasses.replace(recipe, experts=tuple(experts))


def _mergekits(data: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that mergekit's recipe stands for, with the flags that were given."""
    from lean_merge.checkpoints import open_checkpoint
    from lean_merge.mapping import language_layout
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


def shares_options_of_work(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command the options of `work_of`, which it receives as `work`, before its own.

    Where both have an option of one name, the command keeps its own.
    """
    own = inspect.signature(command, eval_str=True).parameters
    hints = get_type_hints(_Work, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(_Work)
        if field.name not in own
    ]
    listed = [*shared, *(p for name, p in own.items() if name != "work")]
    order = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in listed]

    def wrapped(**arguments: Any) -> int | None:
        work = {parameter.name: arguments.pop(parameter.name) for parameter in shared}
        with starting(bool(arguments.get("quiet"))):
            return command(work=work, **arguments)

    wrapped.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__annotations__ = {p.name: p.annotation for p in order}
    return wrapped
