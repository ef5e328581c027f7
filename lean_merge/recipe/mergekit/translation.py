"""Translate mergekit's own recipes into ours; docs/mergekit.md explains what is understood.

mergekit's values may differ between layers, tensors, models and output slices, and so may ours; but
they are looked up in another order, and its filters are plain words. All of that is settled here,
so that the rest of the program sees a recipe like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lean_merge.errors import RecipeError, shown
from lean_merge.recipe.mergekit.values import WordedValue, filtered, rules_of
from lean_merge.recipe.recipe import reject_unknown

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
)
_REFUSED = {
    "modules": "merging a model of several modules",
    "tokenizer": "changing a tokenizer",
    "chat_template": "changing a chat template",
    "gate_mode": "building a mixture of experts",
    "residual_weight": "weighing residuals",
}
_DTYPES = ("float32", "bfloat16", "float16")
_IGNORED = ("int8_mask",)
"""Parameters that change how mergekit computes, and no number."""
_WITHOUT_EFFECT = ("density", "rescale")
"""Parameters that mergekit's task_arithmetic has too, where they change nothing."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One of mergekit's parameters: its name in our method, and whether every model has its own."""

    ours: str
    per_model: bool = False
    default: Any = None
    convert: Callable[[Any], Any] = lambda value: value
    """What makes our value of mergekit's."""


def _rescaled(value: Any) -> str:
    return "l1" if value else "none"


def _sparse(*, normalize: bool, **more: float) -> dict[str, _Parameter]:
    """Return the parameters of the methods that mergekit builds on task arithmetic."""
    return {
        "weight": _Parameter("weight", per_model=True),
        "density": _Parameter("density", per_model=True, default=1.0),
        **{name: _Parameter(name, per_model=True, default=value) for name, value in more.items()},
        "normalize": _Parameter("normalize", default=normalize),
        "lambda": _Parameter("scale", default=1.0),
    }


_RESCALE = {"rescale": _Parameter("rescale", default=True, convert=_rescaled)}
_METHODS: dict[str, dict[str, _Parameter]] = {
    "linear": {
        "weight": _Parameter("weight", per_model=True),
        "normalize": _Parameter("normalize", default=True),
    },
    "slerp": {"t": _Parameter("t")},
    "task_arithmetic": {
        "weight": _Parameter("weight", per_model=True),
        "normalize": _Parameter("normalize", default=False),
        "lambda": _Parameter("scale", default=1.0),
    },
    "ties": _sparse(normalize=True),
    "breadcrumbs": _sparse(normalize=False, gamma=0.01),
    "breadcrumbs_ties": _sparse(normalize=False, gamma=0.01),
    "dare_linear": _sparse(normalize=False) | _RESCALE,
    "dare_ties": _sparse(normalize=False) | _RESCALE,
    "della": _sparse(normalize=True, epsilon=0.15) | _RESCALE,
    "della_linear": _sparse(normalize=False, epsilon=0.15) | _RESCALE,
}


@dataclass(frozen=True, slots=True)
class Translated:
    """A recipe in our words, as plain data for `MergeRecipe.from_dict`.

    `layers` is how many layers the models must have, where the recipe tells it by its slices.
    """

    recipe: dict[str, Any]
    layers: int | None = None


def translated(
    data: Mapping[str, Any], *, mllm: str | None = None, scope: str = "language"
) -> Translated:
    """Translate mergekit's recipe.

    Parameters
    ----------
    data
        The plain data of the file.
    mllm
        The MLLM that takes the receiver's place, if there is one.
    scope
        What is merged; mergekit merges all of the language model.

    Raises
    ------
    RecipeError
        A key or a value is not understood, or asks for what lean-merge cannot do.
    """
    _check_keys(data, _KEYS, "mergekit's recipe")
    method = data.get("merge_method")
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise RecipeError(
            f"merge_method: of mergekit's methods lean-merge has {known}, and not {shown(method)}."
        )
    slices = _slices(data)
    base, models = _models(data, method, slices)
    _check_tokenizer(data.get("tokenizer_source"), base)
    whole = _mapping(data.get("parameters") or {}, "parameters")
    reading = _Reading(method, whole, slices, is_whole=scope == "language")
    reading.check()
    common = reading.common()
    experts = [
        {"model": _path(model, base), "parameters": reading.of_model(model)} for model in models
    ]
    if method == "task_arithmetic":
        common["exact"] = True
    if method == "linear":
        experts = _interpolated(reading, experts, common, base, has_mllm=mllm is not None)
    recipe: dict[str, Any] = {"merge_method": method, "base_model": base}
    if mllm is not None:
        recipe["mllm_model"] = mllm
    recipe |= {"experts": experts, "parameters": common, "scope": scope}
    dtype = _dtype(data, "out_dtype") or _dtype(data, "dtype")
    if dtype is not None:
        recipe["out_dtype"] = dtype
    end = slices[-1].layers
    return Translated(recipe, None if end is None else end.stop)


# --- models and slices ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slice:
    """Output layers, all if `layers` is None, with the parameters of each model for them."""

    models: dict[str, Mapping[str, Any]]
    parameters: Mapping[str, Any]
    layers: range | None = None


def _slices(data: Mapping[str, Any]) -> list[_Slice]:
    """Return the output slices; a list of models is one slice of all layers."""
    if bool(data.get("models")) == bool(data.get("slices")):
        raise RecipeError("mergekit's recipe must have either models or slices.")
    if data.get("models"):
        return [_Slice(_sources(data["models"], "models", ()), {})]
    found, end = [], 0
    for number, entry in enumerate(_list(data["slices"], "slices")):
        where = f"slices[{number}]"
        entry = _mapping(entry, where)
        _check_keys(entry, ("sources", "parameters", "base_model"), where)
        if entry.get("base_model") not in (None, data.get("base_model")):
            raise RecipeError(f"{where}: base_model must be that of the whole merge.")
        sources = _list(entry.get("sources"), f"{where}: sources")
        ranges = [_layers(source, f"{where}: sources") for source in sources]
        if any(own != ranges[0] for own in ranges) or ranges[0].start != end:
            raise RecipeError(
                f"{where}: layer_range must go on where the slice before ends, at layer {end}, and "
                "be the same for all models: lean-merge does not stack layers anew."
            )
        end = ranges[0].stop
        models = _sources(sources, f"{where}: sources", ("layer_range",))
        found.append(_Slice(models, _mapping(entry.get("parameters") or {}, where), ranges[0]))
        if set(models) != set(found[0].models):
            raise RecipeError(f"{where}: sources must be the same models as in the other slices.")
    return found


def _sources(entries: Any, where: str, more: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for entry in _list(entries, where):
        entry = _mapping(entry, where)
        _check_keys(entry, ("model", "parameters", *more), where)
        model = entry.get("model")
        if not isinstance(model, str) or not model:
            raise RecipeError(f"{where}: model must name a folder or hub id, not {shown(model)}.")
        if model in found:
            raise RecipeError(f"{where}: model {shown(model)} stands there twice.")
        found[model] = _mapping(entry.get("parameters") or {}, f"{where}: parameters")
    return found


def _layers(source: Any, where: str) -> range:
    wanted = _mapping(source, where).get("layer_range")
    if (
        not isinstance(wanted, list)
        or len(wanted) != 2
        or not all(type(each) is int for each in wanted)
        or not 0 <= wanted[0] < wanted[1]
    ):
        raise RecipeError(f"{where}: layer_range must be two layers, not {shown(wanted)}.")
    return range(*wanted)


def _models(
    data: Mapping[str, Any], method: str, slices: Sequence[_Slice]
) -> tuple[str, list[str]]:
    """Return the base, and the models that are merged into it or into the MLLM."""
    named = list(slices[0].models)
    base = data.get("base_model")
    if base is None and method == "linear":
        base = named[0]
    if not isinstance(base, str) or not base:
        raise RecipeError(f"base_model: {method} needs the model that the others were tuned from.")
    models = [model for model in named if model != base]
    if not models:
        raise RecipeError("models: there is none beside the base_model.")
    return base, models


def _path(model: str, base: str) -> str:
    """Return a model's path; `base+adapter` is an adapter of the base."""
    whole, plus, adapter = model.partition("+")
    if plus and whole != base:
        raise RecipeError(
            f"model: {shown(model)} is an adapter of a model other than the base_model; lean-merge "
            "reads adapters of the base alone."
        )
    return adapter if plus else model


# --- parameters -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reading:
    """The parameters of a merge, looked up as mergekit does: from the source outwards."""

    method: str
    whole: Mapping[str, Any]
    slices: Sequence[_Slice]
    is_whole: bool
    """Whether tensors outside of the layers are merged too."""

    def check(self) -> None:
        """Raise RecipeError for parameters that are unknown, or stand where none is read."""
        known = _METHODS[self.method]
        own = [name for name, each in known.items() if each.per_model]
        for where, given, names in (
            ("parameters", self.whole, known),
            *(("parameters of a slice", each.parameters, known) for each in self.slices),
            *(
                (f"parameters of {shown(model)}", of_model, own)
                for each in self.slices
                for model, of_model in each.models.items()
            ),
        ):
            ignored: tuple[str, ...] = _IGNORED
            if self.method == "task_arithmetic":
                ignored += _WITHOUT_EFFECT
            elif "weight" in known and "density" in known and "rescale" not in known:
                ignored += ("rescale",)
                if given.get("rescale", False) is not False:
                    raise RecipeError(
                        f"rescale: lean-merge has it for DARE and DELLA, and not for {self.method}."
                    )
            reject_unknown(given, [*names, *ignored], f"{where} of mergekit's {self.method}")

    def common(self) -> dict[str, Any]:
        """Return our parameters that hold for all models."""
        known = _METHODS[self.method].items()
        return {
            each.ours: self._setting(name, each, None) for name, each in known if not each.per_model
        }

    def of_model(self, model: str) -> dict[str, Any]:
        """Return our parameters of one model."""
        known = _METHODS[self.method].items()
        return {
            each.ours: self._setting(name, each, model) for name, each in known if each.per_model
        }

    def _setting(self, name: str, parameter: _Parameter, model: str | None) -> Any:
        """Return a parameter's value, or values by filters, in our words."""
        rules = []
        for each in self.slices:
            scopes = [each.parameters, self.whole]
            if model is not None:
                scopes.insert(0, each.models.get(model, {}))
            given = [scope[name] for scope in scopes if name in scope]
            found = [rule for setting in given for rule in rules_of(setting, name)]
            if parameter.default is not None:
                found.append(WordedValue(None, parameter.default))
            last = next((n for n, each in enumerate(found) if each.words is None), None)
            if last is None:
                which = "" if model is None else f" of {shown(model)}"
                raise RecipeError(
                    f"{name}{which}: mergekit's {self.method} needs a value for every tensor; add "
                    "one without a filter."
                )
            rules.append(
                [WordedValue(e.words, parameter.convert(e.value)) for e in found[: last + 1]]
            )
        return filtered(rules, [each.layers for each in self.slices], is_whole=self.is_whole)


# --- what differs between methods -----------------------------------------------------------


def _interpolated(
    reading: _Reading,
    experts: list[dict[str, Any]],
    common: dict[str, Any],
    base: str,
    *,
    has_mllm: bool,
) -> list[dict[str, Any]]:
    """Return the experts of `linear`, in which mergekit's base is a model like the others.

    Without an MLLM it is what receives, and its weight is ours of the MLLM.
    """
    named = any(base in each.models for each in reading.slices) or "weight" in reading.whole
    if named and has_mllm:
        return [{"model": base, "parameters": reading.of_model(base)}, *experts]
    if not named:
        raise RecipeError(f"weight: mergekit's linear needs one for {shown(base)} too.")
    if has_mllm:
        return experts
    own = reading.of_model(base)["weight"]
    if common["normalize"] is True:
        common["mllm_weight"] = own
        return experts
    weights = [own, *(each["parameters"]["weight"] for each in experts)]
    if common["normalize"] is not False or any(isinstance(each, list) for each in weights):
        raise RecipeError("normalize: false is understood only for weights that are plain numbers.")
    if abs(sum(weights) - 1) > 1e-6:
        raise RecipeError(
            f"normalize: false is understood only where weights sum to 1, and these sum to "
            f"{sum(weights):g}."
        )
    return experts


def _check_tokenizer(source: Any, base: str) -> None:
    if source not in (None, "base", base):
        raise RecipeError(
            f"tokenizer_source: {shown(source)} would change the vocabulary, which lean-merge does "
            "not; the output has the receiver's tokenizer, as with base."
        )


def _dtype(data: Mapping[str, Any], key: str) -> str | None:
    wanted = data.get(key)
    if wanted is not None and wanted not in _DTYPES:
        raise RecipeError(f"{key} must be one of {', '.join(_DTYPES)}, not {shown(wanted)}.")
    return wanted


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key in _REFUSED and given[key] is not None:
            raise RecipeError(f"{key}: {_REFUSED[key]} is not what lean-merge does.")
    reject_unknown(given, [*known, *_REFUSED], where)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping, not {shown(value)}.")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where} must be a list, not {shown(value)}.")
    return value


__all__ = ["Translated", "translated"]
