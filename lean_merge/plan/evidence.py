"""Let methods decide from the evidence of an analysis, instead of looking at each weight.

A merge from an analysis must come out the same whether the evidence is read back or gathered again
in the same way, as `verify` does. So what the gathering depended on is kept with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lean_merge.methods import EvidenceMethod, Gathering, Method, Recalling
from lean_merge.outputs.gathered import (
    FoundThreshold,
    Gathered,
    RecordedEvidence,
    evidence_method,
)
from lean_merge.plan.parameters import MethodTable
from lean_merge.plan.scope import Position
from lean_merge.recipe import MergeRecipe

Methods = Mapping[str, Method[Any]]
"""The method of each weight that is merged, by the weight's canonical name."""
EvidenceMethods = Mapping[str, EvidenceMethod[Any]]


@dataclass(frozen=True, slots=True)
class EvidencePlan:
    """The evidence that a merge decides from, and its source.

    Attributes
    ----------
    gathered
        What the evidence depends on.
    source
        The analysis that recorded it; None if it is gathered during the merge.
    thresholds
        The threshold of each expert, if thresholds were to be found; else empty.
    anew
        Why some weights are analysed again in spite of the evidence, by canonical name.
    """

    gathered: Gathered
    source: RecordedEvidence | None = None
    thresholds: tuple[FoundThreshold, ...] = ()
    anew: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the entry that the journal of a merge from an analysis has for the evidence."""
        assert self.source is not None
        found = (
            {"thresholds": [each.threshold for each in self.thresholds]} if self.thresholds else {}
        )
        return {**self.source.identity, **found}

    @property
    def notes(self) -> list[str]:
        """Return sentences for people that say how many weights are analysed again, and why."""
        reasons: dict[str, int] = {}
        for reason in self.anew.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        return [f"{count} weights are analysed anew: {reason}" for reason, count in reasons.items()]


def decide_from_evidence(
    methods: Methods,
    positions: Mapping[str, Position],
    recipe: MergeRecipe,
    evidence: EvidencePlan,
) -> tuple[Methods, EvidencePlan]:
    """Put methods that decide from evidence in the place of those that look at each weight.

    Thresholds that are to be found are found in the evidence, and returned with it.

    Raises
    ------
    RecipeError
        The recipe's method cannot decide from evidence.
    """
    evidence_method(recipe)
    deciders: EvidenceMethods = {
        name: method for name, method in methods.items() if isinstance(method, EvidenceMethod)
    }
    if not all(method.is_settled for method in deciders.values()):
        if evidence.source is not None:
            evidence = replace(evidence, thresholds=evidence.source.suggested_thresholds(deciders))
        found = [each.threshold for each in evidence.thresholds]
        settled = {id(method): method.settled(found) for method in deciders.values()}
        deciders = {name: settled[id(method)] for name, method in deciders.items()}
    methods = {**methods, **_gathering(deciders, positions, recipe, evidence.gathered)}
    if evidence.source is None:
        return methods, evidence
    recalling, anew = _recalling(deciders, evidence.source)
    return {**methods, **recalling}, replace(evidence, anew=anew)


def _gathering(
    deciders: EvidenceMethods,
    positions: Mapping[str, Position],
    recipe: MergeRecipe,
    gathered: Gathered,
) -> dict[str, Method[Any]]:
    """Return methods that gather in the way of `gathered` before they decide."""
    table = MethodTable(gathered.recipe(recipe))
    made: dict[tuple[int, int], Method[Any]] = {}
    found = {}
    for name, decider in deciders.items():
        gatherer = table.at(positions[name])
        key = id(decider), id(gatherer)
        if key not in made:
            assert isinstance(gatherer, EvidenceMethod)
            made[key] = Gathering(decider, gatherer, gathered.seed)
        found[name] = made[key]
    return found


def _recalling(
    deciders: EvidenceMethods, analysis: RecordedEvidence
) -> tuple[dict[str, Method[Any]], dict[str, str]]:
    """Return methods that decide from recorded evidence, and why other weights are analysed again.

    A weight without recorded evidence has no such method: its evidence is gathered in the same way.
    A weight whose evidence does not suffice is analysed as if there were no evidence.
    """
    found: dict[str, Method[Any]] = {}
    anew = {}
    for name, decider in deciders.items():
        facts = analysis.facts(name)
        if facts is None:
            anew[name] = "the analysis has no evidence of it"
            continue
        lacking = decider.lacks(facts)
        if lacking is None:
            found[name] = Recalling(decider, facts, partial(analysis.factors, name))
        else:
            found[name], anew[name] = decider, lacking
    return found, anew
