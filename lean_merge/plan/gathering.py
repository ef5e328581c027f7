"""Each weight is decided by looking at it, or from the evidence of an analysis.

A merge from an analysis must come out the same wherever the evidence comes from: read back, or
gathered again in the same way, as `verify` does. So what gathering depended on is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lean_merge.methods import (
    EvidenceMethod,
    Gathering,
    Method,
    Recalling,
)
from lean_merge.outputs.gathered import FoundThreshold, Gathered, evidence_method
from lean_merge.outputs.recorded import Analysis
from lean_merge.plan.parameters import MethodTable
from lean_merge.plan.scope import Position
from lean_merge.recipe import MergeRecipe

Methods = Mapping[str, Method[Any]]
"""The method of each weight that is not filtered out, by the weight's canonical name."""
Able = Mapping[str, EvidenceMethod[Any]]


@dataclass(frozen=True, slots=True)
class EvidencePlan:
    """The evidence from which a plan decides.

    Attributes
    ----------
    gathered
        What the evidence depends on.
    source
        The analysis that recorded it; None if it is gathered again.
    choices
        The threshold that was found for each expert; empty if none was to be found.
    anew
        Why weights are looked at though evidence is recorded, by their canonical names.
    """

    gathered: Gathered
    source: Analysis | None = None
    choices: tuple[FoundThreshold, ...] = ()
    anew: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What the journal of a merge from an analysis tells of it."""
        assert self.source is not None
        found = {"thresholds": [each.threshold for each in self.choices]} if self.choices else {}
        return {**self.source.identity, **found}


def decided(
    methods: Methods, places: Mapping[str, Position], recipe: MergeRecipe, evidence: EvidencePlan
) -> tuple[dict[str, Method[Any]], EvidencePlan]:
    """Give the methods of a merge from evidence, which is recorded or gathered again.

    Raises
    ------
    RecipeError
        The recipe's method gathers no evidence.
    """
    evidence_method(recipe)
    able = {name: each for name, each in methods.items() if isinstance(each, EvidenceMethod)}
    if not all(each.is_settled for each in able.values()):
        if evidence.source is not None:
            evidence = replace(evidence, choices=evidence.source.choices(able))
        thresholds = [each.threshold for each in evidence.choices]
        made = {id(each): each.settled(thresholds) for each in able.values()}
        able = {name: made[id(each)] for name, each in able.items()}
    if evidence.source is None:
        return regathering(able, places, recipe, evidence.gathered), evidence
    found, anew = recalling(able, places, recipe, evidence.source)
    return found, replace(evidence, anew=anew)


def regathering(
    methods: Mapping[str, EvidenceMethod[Any]],
    places: Mapping[str, Position],
    recipe: MergeRecipe,
    gathered: Gathered,
) -> dict[str, Method[Any]]:
    """Give methods that gather evidence as was `gathered`, and then decide as these do."""
    table = MethodTable(gathered.recipe(recipe))
    made: dict[tuple[int, int], Method[Any]] = {}
    found = {}
    for name, method in methods.items():
        gatherer = table.at(places[name])
        key = id(method), id(gatherer)
        if key not in made:
            assert isinstance(gatherer, EvidenceMethod)
            made[key] = Gathering(method, gatherer, gathered.seed)
        found[name] = made[key]
    return found


def recalling(
    methods: Mapping[str, EvidenceMethod[Any]],
    places: Mapping[str, Position],
    recipe: MergeRecipe,
    recorded: Analysis,
) -> tuple[dict[str, Method[Any]], dict[str, str]]:
    """Give methods that decide from an analysis, and the reasons of those that look anew.

    A weight without evidence gets it in the same way. One whose evidence does not suffice is
    looked at as without an analysis.
    """
    found = regathering(methods, places, recipe, recorded.gathered)
    anew = {}
    for name, method in methods.items():
        facts = recorded.facts(name)
        if facts is None:
            anew[name] = "the analysis has no evidence of it"
            continue
        lacking = method.lacks(facts)
        if lacking is None:
            found[name] = Recalling(method, facts, partial(recorded.factors, name))
        else:
            found[name], anew[name] = method, lacking
    return found, anew


def described(anew: Mapping[str, str]) -> Sequence[str]:
    """Tell people how many weights are looked at again, for each reason."""
    reasons: dict[str, int] = {}
    for reason in anew.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{count} weights are analysed anew: {reason}" for reason, count in reasons.items()]


__all__ = [
    "EvidencePlan",
    "decided",
    "described",
    "recalling",
    "regathering",
]
