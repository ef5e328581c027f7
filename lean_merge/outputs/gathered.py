"""The settings that evidence depends on, and the thresholds that an analysis finds in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lean_merge.checkpoints import Checkpoint
from lean_merge.checkpoints.identity import Opened
from lean_merge.errors import RecipeError, shown
from lean_merge.methods import EvidenceMethod, Factors, Facts, all_methods, canonical_name
from lean_merge.recipe import Expert, Filtered, MergeRecipe


@dataclass(frozen=True, slots=True)
class Gathered:
    """The settings that evidence depends on beside the inputs: a method's parameters and a seed.

    They are kept with the evidence, because a merge from an analysis must give the same bytes when
    its evidence is gathered again in the same way, as `verify` does.
    """

    method: str
    parameters: tuple[tuple[str, Any], ...]
    seed: int

    @classmethod
    def by(cls, recipe: MergeRecipe) -> Gathered:
        """Return the settings by which evidence is gathered for a recipe.

        Raises
        ------
        RecipeError
            The recipe's method gathers nothing.
        """
        kind = evidence_method(recipe)
        defaults = {each.name: each.default for each in kind.parameter_fields()}
        values = {**defaults, **dict(recipe.parameters)}
        return cls(kind.name, tuple((name, values[name]) for name in kind.gathered_by), recipe.seed)

    def recipe(self, recipe: MergeRecipe) -> MergeRecipe:
        """Return `recipe` with only these parameters, for the methods that gather."""
        experts = tuple(replace(expert, parameters=()) for expert in recipe.experts)
        return replace(
            recipe,
            merge_method=self.method,
            parameters=self.parameters,
            experts=experts,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; parameters have the form that they have in recipes."""
        plain = MergeRecipe("b", "m", (Expert("e"),), parameters=self.parameters).to_dict()
        return {"method": self.method, "seed": self.seed, **plain["parameters"]}

    @classmethod
    def from_dict(cls, data: Any) -> Gathered:
        """Read what `to_dict` wrote. Raises RecipeError for anything else."""
        if not isinstance(data, dict) or not isinstance(data.get("method"), str):
            raise RecipeError("What the evidence was gathered with is not told.")
        names = {name: value for name, value in data.items() if name not in ("method", "seed")}
        recipe = MergeRecipe(
            "b",
            "m",
            (Expert("e"),),
            merge_method=data["method"],
            parameters=names,  # type: ignore[arg-type]
            seed=data.get("seed", 0),
        )
        kind = evidence_method(recipe)
        for name, value in recipe.parameters:
            if name not in kind.gathered_by:
                raise RecipeError(f"{shown(name)} is nothing that evidence depends on.")
            for each in _values(value):
                _check(kind, name, each)
        return cls.by(recipe)


def _values(value: Any) -> Iterator[Any]:
    """Yield all values that a parameter has at some weight: by filters, or over the layers."""
    if isinstance(value, tuple):
        for each in value:
            yield from _values(each.value if isinstance(each, Filtered) else each)
    else:
        yield value


def _check(kind: type[EvidenceMethod[Any]], name: str, value: Any) -> None:
    try:
        kind.parameters_type(**{name: value})
    except TypeError as error:
        raise RecipeError(f"{name} makes no sense: {error}.") from error


@dataclass(frozen=True, slots=True)
class FoundThreshold:
    """A threshold that an analysis found for an expert, and the explanation in sentences."""

    threshold: float
    explanation: str = ""


def found_thresholds(told: Any, experts: int) -> tuple[FoundThreshold, ...]:
    """Read the thresholds in a journal: one for each expert, or none at all.

    Raises
    ------
    RecipeError
        The journal holds something else in their place.
    """
    if told is None:
        return ()
    if not isinstance(told, list) or len(told) != experts:
        raise RecipeError(f"The thresholds that were found are not {experts}.")
    for each in told:
        if type(each) not in (int, float) or not 0 <= each <= 1:
            raise RecipeError(f"The threshold that was found, {shown(each)}, is not in 0 .. 1.")
    return tuple(FoundThreshold(float(each)) for each in told)


def evidence_method(recipe: MergeRecipe) -> type[EvidenceMethod[Any]]:
    """Return the recipe's method, if it gathers evidence.

    Raises
    ------
    RecipeError
        The method gathers none, because it decides without looking at the weights.
    """
    name = canonical_name(recipe.merge_method)
    kind = all_methods().get(name)
    if kind is None or not issubclass(kind, EvidenceMethod):
        able = sorted(n for n, k in all_methods().items() if issubclass(k, EvidenceMethod))
        raise RecipeError(
            f"{name} decides without looking at the weights, so there is nothing to analyse; "
            f"analysis is for {', '.join(able)}."
        )
    return kind


class RecordedEvidence(Opened, Protocol):
    """The evidence of an analysis that was opened."""

    @property
    def gathered(self) -> Gathered:
        """Return the settings that it depends on beside the inputs."""

    @property
    def warnings(self) -> list[str]:
        """The sentences by which the analysis warned of the models."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the facts that tell it from any other, for the journal of a merge from it."""

    def check_inputs(self, roles: Mapping[str, Checkpoint]) -> None:
        """Raise CheckpointError if the inputs are not those analysed, and name what has changed."""

    def suggested_thresholds(
        self, methods: Mapping[str, EvidenceMethod[Any]]
    ) -> tuple[FoundThreshold, ...]:
        """Return the threshold that these weights' similarities suggest, for each expert."""

    def facts(self, canonical: str) -> Facts | None:
        """Return the facts of a weight; None if it was not analysed."""

    def factors(self, canonical: str) -> Factors:
        """Return the factors of a weight that has facts."""
