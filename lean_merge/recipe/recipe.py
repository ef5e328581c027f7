"""A recipe says what to merge and how. It is frozen and hashable, and goes to YAML and back."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lean_merge.errors import RecipeError, shown
from lean_merge.recipe.yamlfile import dump_yaml, load_yaml
from lean_merge.sizes import parse_size

OUT_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROUNDINGS = ("nearest", "stochastic")
SCOPES = ("matrices", "language")
_PLAIN_FIELDS = (
    "output",
    "lora_rank",
    "lora_uniform_rank",
    "out_dtype",
    "rounding",
    "seed",
    "shard_size",
    "allow_partial",
)
_ONLY_IF_TRUE = ("allow_text_mllm", "force")
Parameters = tuple[tuple[str, Any], ...]
NameRules = tuple[tuple[str, str], ...]


ANY = "*"
"""The filter that every weight matches."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """A parameter's value for the weights whose names match `filter`."""

    filter: str
    value: Any


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert model.

    Attributes
    ----------
    model : str
        A folder or hub id.
    parameters : tuple of (name, value)
        The parameters that hold for this expert alone.
    parent : str, optional
        The model that it was tuned from, if that is not the base. Its task vector is then the
        difference from this model.
    """

    model: str
    parameters: Parameters = ()
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """Everything that decides the numbers of a merge. Memory, device and threads do not.

    Lists, mappings and sizes such as "5GB" are taken as well, and turned into hashable values.

    Parameters
    ----------
    base_model : str
        Folder, `.safetensors` file or hub id `org/name@revision`.
    mllm_model : str, optional
        The same for the MLLM that receives. Without one the base itself receives.
    experts : tuple of Expert
        At least one.
    merge_method : str
        Name of a registered method.
    parameters : tuple of (name, value)
        The method's parameters for all experts. A value may differ between weights: it is then a
        list of numbers, which are interpolated over the layers, or of entries with `filter` and
        `value`.
    scope : str
        `matrices` merges attention and feed-forward matrices of the language model, `language` also
        its norms, biases, embeddings, head and whatever else the base has too.
    include, exclude : tuple of str
        Regular expressions on the weights' names, or `layers: 0-15`. A weight is merged if
        `include` is empty or matches it, and `exclude` does not. The others are copied.
    output : str
        `checkpoint` writes a whole model, `lora` an adapter for the MLLM, and `none` a report only.
    lora_rank : int or str
        Rank of each weight in an adapter: a number, or `auto` for the smallest rank that keeps the
        update.
    lora_uniform_rank : bool
        Whether zeros bring every module of an adapter to the largest rank among them.
    out_dtype : str
        The dtype of the in-scope weights; bf16, fp16 and fp32 are understood. With `auto`, each
        keeps the dtype that it has in the MLLM, and an adapter's factors are float32.
    rounding : str
        `nearest`, or `stochastic`, which differs from it for dtypes below float32.
    seed : int
        Seed of the random starts and of stochastic rounding, from 0 to 2^64 - 1.
    shard_size : int
        Largest shard in bytes.
    allow_partial : bool
        Whether to go on where in-scope weights do not map to every role. They stay as they are in
        the MLLM.
    names : tuple of (pattern, template), or of (role, such a tuple)
        Regular expressions and templates that turn tensors' names into those of the base, where
        structure does not tell. They are for the MLLM's names unless they are given by role.
    allow_text_mllm : bool
        Whether to go on where the MLLM has text alone, and another model vision or audio.
    force : bool
        Whether to go on where a model was hardly tuned from the base, or has its rows in another
        order.

    Raises
    ------
    RecipeError
        A value makes no sense.
    """

    base_model: str
    mllm_model: str | None = None
    experts: tuple[Expert, ...] = ()
    merge_method: str = "ip_merging"
    parameters: Parameters = ()
    scope: str = "matrices"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    output: str = "checkpoint"
    lora_rank: int | str = "auto"
    lora_uniform_rank: bool = True
    out_dtype: str = "auto"
    rounding: str = "nearest"
    seed: int = 0
    shard_size: int = 5 * 10**9
    allow_partial: bool = False
    names: Parameters = ()
    allow_text_mllm: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        experts = tuple(_expert(entry) for entry in _list(self.experts, "experts"))
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "parameters", _frozen(self.parameters, "parameters"))
        object.__setattr__(self, "names", _names(self.names, experts))
        object.__setattr__(self, "include", _filters(self.include, "include"))
        object.__setattr__(self, "exclude", _filters(self.exclude, "exclude"))
        object.__setattr__(self, "shard_size", parse_size(self.shard_size))
        if isinstance(wanted := self.out_dtype, str):
            object.__setattr__(self, "out_dtype", _SHORT_DTYPES.get(wanted, wanted))
        if not experts:
            raise RecipeError("A merge needs at least one expert; name it with --expert.")
        _check_model("base_model", self.base_model)
        if self.mllm_model is not None:
            _check_model("mllm_model", self.mllm_model)
        elif "mllm" in self.name_rules():
            raise RecipeError("names are for the MLLM, and there is none; nest them under a role.")
        for expert in experts:
            _check_model("experts[].model", expert.model)
            if expert.parent is not None:
                _check_model("experts[].parent", expert.parent)
        if not isinstance(self.merge_method, str) or not self.merge_method:
            raise RecipeError(f"merge_method must name a method, not {shown(self.merge_method)}.")
        for name in ("allow_partial", "lora_uniform_rank", *_ONLY_IF_TRUE):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RecipeError(f"{name} must be true or false, not {shown(value)}.")
        if not isinstance(self.output, str) or not _is_storable(self.output):
            raise RecipeError(f"output must name a kind of output, not {shown(self.output)}.")
        _check_choice("out_dtype", self.out_dtype, OUT_DTYPES)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("scope", self.scope, SCOPES)
        if self.lora_rank != "auto" and not (type(self.lora_rank) is int and self.lora_rank >= 1):
            raise RecipeError(
                f"lora_rank must be 'auto' or a whole number from 1, not {shown(self.lora_rank)}."
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**64:
            raise RecipeError(
                f"seed must be a whole number from 0 to 2^64 - 1, not {shown(self.seed)}."
            )

    @property
    def receiver(self) -> str:
        """The model that receives: the MLLM or, without one, the base."""
        return self.base_model if self.mllm_model is None else self.mllm_model

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe under the field's usual keys, in plain types only."""
        experts = []
        for expert in self.experts:
            entry: dict[str, Any] = {"model": expert.model}
            if expert.parent is not None:
                entry["parent"] = expert.parent
            if expert.parameters:
                entry["parameters"] = _plain(expert.parameters)
            experts.append(entry)
        recipe: dict[str, Any] = {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            **({} if self.mllm_model is None else {"mllm_model": self.mllm_model}),
            "experts": experts,
        }
        if self.parameters:
            recipe["parameters"] = _plain(self.parameters)
        if self.scope != "matrices":
            recipe["scope"] = self.scope
        for name in ("include", "exclude"):
            if getattr(self, name):
                recipe[name] = list(getattr(self, name))
        for name in _PLAIN_FIELDS:
            recipe[name] = getattr(self, name)
        recipe |= {name: True for name in _ONLY_IF_TRUE if getattr(self, name)}
        if self.names:
            recipe["names"] = {
                key: value if isinstance(value, str) else dict(value) for key, value in self.names
            }
        return recipe

    def name_rules(self) -> dict[str, NameRules]:
        """Return the rules of `names` for each role. Rules without a role are for the MLLM."""
        by_role = any(not isinstance(rules, str) for _, rules in self.names)
        if by_role or not self.names:
            return dict(self.names)
        return {"mllm": self.names}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which `from_yaml` reads back."""
        return dump_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MergeRecipe:
        """Build a recipe from plain data.

        Raises
        ------
        RecipeError
            A key is unknown, and the message names the nearest one and its line; a required key is
            missing; or a value makes no sense.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        reject_unknown(data, known, "recipe")
        for required in ("base_model", "experts"):
            if not data.get(required):
                raise RecipeError(f"The recipe lacks {required}.")
        return cls(**data)

    @classmethod
    def from_yaml(cls, text: str) -> MergeRecipe:
        """Read a recipe from YAML text. Raises RecipeError."""
        return cls.from_dict(load_yaml(text))


def reject_unknown(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise RecipeError for the first unknown key of `given`; name a near one, or those known."""
    names = list(known)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key)[:80], names, n=1)
            others = f"known are {', '.join(names)}"
            hint = f"the nearest known one is {near[0]!r}" if near else others
            line = f" (line {key.line})" if hasattr(key, "line") else ""
            raise RecipeError(f"Unknown key {shown(key)} in {where}{line}; {hint}.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}.")


def _check_model(role: str, model: object) -> None:
    if not isinstance(model, str) or not model:
        raise RecipeError(f"{role} must name a folder or hub id, not {shown(model)}.")
    if not _is_storable(model):
        raise RecipeError(
            f"{role} {shown(model)} is not valid Unicode, so that no report could name it; rename "
            "the folder."
        )


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{name} must be a list, not {shown(value)}.")
    return list(value)


def _expert(entry: Any) -> Expert:
    if isinstance(entry, Expert):
        parameters = _frozen(entry.parameters, "experts[].parameters")
        return dataclasses.replace(entry, parameters=parameters)
    if isinstance(entry, str):
        return Expert(entry)
    if not isinstance(entry, Mapping):
        raise RecipeError(f"An expert must be a mapping with a model, not {shown(entry)}.")
    reject_unknown(entry, ("model", "parent", "parameters"), "experts[]")
    if "model" not in entry:
        raise RecipeError("An expert lacks its model.")
    parameters = _frozen(entry.get("parameters"), "experts[].parameters")
    return Expert(entry["model"], parameters, entry.get("parent"))


def _frozen(parameters: Any, where: str) -> Parameters:
    if parameters is None:
        return ()
    if isinstance(parameters, tuple):
        parameters = dict(parameters)
    if not isinstance(parameters, Mapping):
        raise RecipeError(f"{where} must be a mapping, not {shown(parameters)}.")
    return tuple(
        (name if isinstance(name, str) else str(name), _frozen_value(v, f"{where}: {shown(name)}"))
        for name, v in parameters.items()
    )


def _frozen_value(value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        return _scalar(value, where)
    if any(isinstance(each, (Mapping, Filtered)) for each in value):
        return tuple(_filtered(each, where) for each in value)
    return tuple(_scalar(each, where) for each in value)


def _scalar(value: Any, where: str) -> Any:
    """Return `value` if it is a word, a number, a truth value or None; raise RecipeError if not."""
    if isinstance(value, str) and _is_storable(value):
        return value
    if isinstance(value, int) and abs(value) >= 2**64:
        raise RecipeError(f"{where} must lie between -2^64 and 2^64, not {shown(value)}.")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise RecipeError(f"{where} must be a word, a number or a list of such, not {shown(value)}.")


def _filtered(entry: Any, where: str) -> Filtered:
    if isinstance(entry, Filtered):
        return entry
    if not isinstance(entry, Mapping):
        return Filtered(ANY, _tuple(entry, where))
    reject_unknown(entry, ("filter", "value"), where)
    if "value" not in entry:
        raise RecipeError(f"{where}: an entry lacks its value; write filter: mlp, value: 0.5.")
    wanted = entry.get("filter", ANY)
    return Filtered(
        _filter(ANY if wanted is None else wanted, where), _tuple(entry["value"], where)
    )


def _filters(entries: Any, name: str) -> tuple[str, ...]:
    if entries is None:
        return ()
    if isinstance(entries, (str, Mapping)):
        entries = [entries]
    return tuple(_filter(entry, name) for entry in _list(entries, name))


def _filter(entry: Any, where: str) -> str:
    """Return a filter as text. In a list, YAML reads `layers: 0-15` as a mapping."""
    if isinstance(entry, Mapping) and set(entry) == {"layers"}:
        wanted = entry["layers"]
        parts = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        if all(isinstance(part, (int, str)) for part in parts):
            return f"layers: {','.join(map(str, parts))}"
    if not isinstance(entry, str) or not entry:
        raise RecipeError(
            f"{where}: a filter must be a regular expression or a range such as layers: 0-15, not "
            f"{shown(entry)}."
        )
    return entry


def _tuple(value: Any, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_scalar(each, where) for each in value)
    return _scalar(value, where)


def _is_storable(text: str) -> bool:
    """Return whether UTF-8 can hold `text`; other bytes of file names become surrogates."""
    return "\0" not in text and text.encode("utf-8", "ignore").decode("utf-8") == text


def _plain(parameters: Parameters) -> dict[str, Any]:
    return {str(name): _plain_value(value) for name, value in parameters}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Filtered):
        own = {} if value.filter == ANY else {"filter": value.filter}
        return {**own, "value": _plain_value(value.value)}
    return [_plain_value(each) for each in value] if isinstance(value, tuple) else value


def _names(names: Any, experts: Sequence[Expert]) -> Parameters:
    """Check the rules of `names`, and return them by role if that is how they were given."""
    rules = _pairs(names, "names")
    if all(isinstance(value, str) for _, value in rules):
        return _rules(rules, "names")
    roles = ["base", "mllm"]
    for number, expert in enumerate(experts, 1):
        roles += [f"expert {number}", *[f"parent of expert {number}"][: expert.parent is not None]]
    reject_unknown((role for role, _ in rules), roles, "names, by role")
    return tuple(
        (role, _rules(_pairs(value, f"names.{role}"), f"names.{role}")) for role, value in rules
    )


def _pairs(value: Any, where: str) -> Parameters:
    if isinstance(value, tuple) and all(isinstance(e, tuple) and len(e) == 2 for e in value):
        value = dict(value)
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping, not {shown(value)}.")
    return tuple((str(key), each) for key, each in (value or {}).items())


def _rules(rules: Parameters, where: str) -> NameRules:
    """Return `rules` if each template fits its regular expression; raise RecipeError if not."""
    for pattern, template in rules:
        if not isinstance(template, str):
            raise RecipeError(
                f"{where}: {shown(pattern)} must lead to a name, not {shown(template)}."
            )
        try:
            # A substitution in an empty text checks that the pattern has the template's groups.
            re.compile(pattern).sub(template, "")
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise RecipeError(
                f"{where}: {shown(pattern)} with {shown(template)} is not a regular expression and "
                f"its template ({error})."
            ) from error
    return rules
