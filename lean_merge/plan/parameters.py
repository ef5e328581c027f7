"""Each weight gets the recipe's method, with the parameters that hold at this weight.

A value may differ between weights. A list of numbers is interpolated over the layers, from the
first to the last. In a list of entries with `filter` and `value`, the first entry counts whose
filter matches the weight's name, and an entry without a filter matches all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lean_merge.errors import RecipeError, shown
from lean_merge.methods import Method, all_methods, canonical_name
from lean_merge.plan.scope import Position, Scope, nearest
from lean_merge.recipe import ANY, Filtered, MergeRecipe, Parameters, reject_unknown


def build_method(recipe: MergeRecipe, place: Position | None = None) -> Method[Any]:
    """Return the recipe's method with its parameters at one weight, checked.

    If no place is given, a value that differs between weights is that of the entry without a
    filter, or that at the first layer.

    Raises
    ------
    RecipeError
        The method or a parameter is unknown, or a value makes no sense.
    """
    kind, fields = _checked_names(recipe)
    values = [_typed(own, fields) for own in _resolved(recipe, place)]
    return _build(kind, values, has_mllm=recipe.mllm_model is not None)


def methods_of(
    recipe: MergeRecipe, positions: Mapping[str, Position], scope: Scope
) -> dict[str, Method[Any]]:
    """Return the method of each weight that is merged, by the weight's canonical name.

    Raises
    ------
    RecipeError
        A value makes no sense, or its filter matches no weight.
    """
    table = MethodTable(recipe)
    table.check_filters(list(positions.values()))
    return {
        name: table.at(position)
        for name, position in positions.items()
        if name not in scope.filtered
    }


_DEFAULT = object()


def _checked_names(
    recipe: MergeRecipe,
) -> tuple[type[Method[Any]], dict[str, dataclasses.Field[Any]]]:
    methods = all_methods()
    name = canonical_name(recipe.merge_method)
    reject_unknown([name], methods, "merge_method")
    fields = {f.name: f for f in methods[name].parameter_fields()}
    if methods[name].needs_mllm and recipe.mllm_model is None:
        raise RecipeError(
            f"{name} merges what agrees with the MLLM's own tuning, so it needs an MLLM; name it "
            "with --mllm, or choose another --method."
        )
    own = [n for n, f in fields.items() if f.metadata.get("per_expert")]
    reject_unknown(dict(recipe.parameters), fields, f"parameters of {name}")
    for expert in recipe.experts:
        reject_unknown(dict(expert.parameters), own, f"parameters of an expert of {name}")
    for values in _all_parameters(recipe):
        for parameter, value in values:
            entries = [each.value for each in value] if _is_filtered(value) else [value]
            if any(map(_is_gradient, entries)) and not isinstance(fields[parameter].default, float):
                raise RecipeError(
                    f"{parameter} cannot be interpolated over the layers; give one value, or one "
                    "for each filter."
                )
    return methods[name], fields


def _all_parameters(recipe: MergeRecipe) -> list[Parameters]:
    return [recipe.parameters, *(expert.parameters for expert in recipe.experts)]


def _resolved(recipe: MergeRecipe, place: Position | None) -> list[dict[str, Any]]:
    """Return each expert's values at one weight, without parameters whose filters do not match."""
    resolved = []
    for expert in recipe.experts:
        values = {**dict(recipe.parameters), **dict(expert.parameters)}
        at = {name: _at(value, place) for name, value in values.items()}
        resolved.append({name: value for name, value in at.items() if value is not _DEFAULT})
    return resolved


def _at(value: Any, place: Position | None) -> Any:
    """Return the value at one weight, or `_DEFAULT` where none of its filters matches."""
    if _is_filtered(value):
        for entry in value:
            if entry.filter == ANY or (place is not None and place.matches(entry.filter)):
                return _at(entry.value, place)
        return _DEFAULT
    if _is_gradient(value):
        return _interpolated(value, 0.0 if place is None else place.depth)
    return value


def _is_filtered(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(each, Filtered) for each in value)


def _is_gradient(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 1
        and all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in value)
    )


def _interpolated(points: tuple[float, ...], depth: float) -> float:
    """Return the value at `depth` between equidistant points, from depth 0 to depth 1."""
    position = depth * (len(points) - 1)
    before = min(math.floor(position), len(points) - 1)
    after = min(before + 1, len(points) - 1)
    share = position - before
    return (1 - share) * float(points[before]) + share * float(points[after])


def _build(kind: type[Method[Any]], values: list[dict[str, Any]], *, has_mllm: bool) -> Method[Any]:
    try:
        made = kind([kind.parameters_type(**own) for own in values])
    except TypeError as error:
        raise RecipeError(f"The parameters of {kind.name} make no sense: {error}.") from error
    made.has_mllm = has_mllm
    made.check()
    return made


def _typed(
    values: Mapping[str, Any], fields: Mapping[str, dataclasses.Field[Any]]
) -> dict[str, Any]:
    """Convert what YAML and the command line give to the types of the parameters' defaults."""
    typed = {}
    for name, value in values.items():
        default = fields[name].default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**64 else math.inf
        elif isinstance(default, tuple) and isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        words = fields[name].metadata.get("words", ())
        # These are a number or a word, which the method itself checks.
        is_free = name == "rank" or fields[name].metadata.get("is_free", False)
        if type(value) is not type(default) and not is_free and value not in words:
            kind = " or ".join([type(default).__name__, *words])
            raise RecipeError(f"{name} must be a {kind}, not {shown(value)}.")
        typed[name] = value
    return typed


@dataclass
class MethodTable:
    """The methods of all weights. Weights with equal parameters share one object.

    Parameters
    ----------
    recipe
        Its parameters' names are checked here, and their values where they are used.

    Raises
    ------
    RecipeError
        The method or a parameter is unknown.
    """

    recipe: MergeRecipe
    _made: dict[str, Method[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kind, self._fields = _checked_names(self.recipe)

    def at(self, place: Position) -> Method[Any]:
        """Return the method for one weight. Raises RecipeError where a value makes no sense."""
        values = _resolved(self.recipe, place)
        key = repr((values, place.is_matrix))
        if key not in self._made:
            typed = [_typed(own, self._fields) for own in values]
            made = _build(self._kind, typed, has_mllm=self.recipe.mllm_model is not None)
            self._made[key] = made if place.is_matrix else made.beside_matrices()
        return self._made[key]

    def check_filters(self, places: list[Position]) -> None:
        """Raise RecipeError for a value's filter that matches none of the weights."""
        for values in _all_parameters(self.recipe):
            for name, value in values:
                for entry in value if _is_filtered(value) else ():
                    if entry.filter != ANY and not any(p.matches(entry.filter) for p in places):
                        raise RecipeError(
                            f"The filter {shown(entry.filter)} of {name} matches no weight in "
                            f"scope; {nearest(entry.filter, places)}"
                        )
