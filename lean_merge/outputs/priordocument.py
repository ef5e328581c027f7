"""Describe a prior: prior.json, and its part of the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lean_merge.drift.prior import PRIOR_FORMAT, PRIOR_VERSION
from lean_merge.mapping import MappedWeight
from lean_merge.outputs.priornumbers import Span
from lean_merge.outputs.priorsettings import PriorSettings
from lean_merge.recipe import MergeRecipe

LOW_SHARE = 0.5
"""A prior that keeps less of a weight than this share of its squared norm says so."""
FactsOf = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""The norm, kept share and rank of each logical weight, by tensor and canonical name."""


def described_prior(
    recipe: MergeRecipe, settings: PriorSettings, facts: FactsOf, weights: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of prior.json; docs/formats.md explains every field."""
    models: dict[str, Any] = {"mllm": recipe.receiver}
    if recipe.mllm_model is not None:
        models["base"] = recipe.base_model
    models["experts"] = [
        {"model": expert.model, "weight": dict(expert.parameters).get("weight", 1.0)}
        for expert in recipe.experts
    ]
    return {
        "format": PRIOR_FORMAT,
        "version": PRIOR_VERSION,
        **settings.to_dict(),
        "models": models,
        "kept": kept_share(_parts(facts).values()),
        "weights": dict(weights),
    }


def complete_report(report: Any, settings: PriorSettings, facts: FactsOf) -> None:
    """Add to a report what is kept of each weight, what all have in common, and warnings."""
    parts = _parts(facts)
    for row in report["weights"]:
        row |= {f"prior_{name}": value for name, value in parts[row["weight"]].items()}
    report["warnings"].extend(_warnings(parts))
    ranks = [each["rank"] or 0 for each in parts.values()]
    report["prior"] = {
        **settings.to_dict(),
        "weights": len(parts),
        "least_rank": min(ranks),
        "largest_rank": max(ranks),
        "kept": kept_share(parts.values()),
        "least_kept": min(each["kept"] for each in parts.values()),
        "relative": report["changed"]["relative_update"],
    }


def _parts(facts: FactsOf) -> dict[str, Mapping[str, Any]]:
    return {name: fact for of_tensor in facts.values() for name, fact in of_tensor.items()}


def described_tensor(
    weight: MappedWeight,
    rank: int | None,
    facts: Mapping[str, Any],
    spans: Mapping[str, Span],
) -> dict[str, Any]:
    """Return what prior.json tells of one tensor, from the facts of its parts."""
    entry: dict[str, Any] = {
        "shape": list(weight.mllm.shape),
        "rank": rank,
        "norm": math.sqrt(math.fsum(each["norm"] ** 2 for each in facts.values())),
        "kept": kept_share(facts.values()),
    }
    if len(weight.slices) > 1 or len(weight.mllm.shape) > 2:
        entry["parts"] = [
            {
                "name": part.canonical,
                "norm": facts[part.canonical]["norm"],
                "kept": facts[part.canonical]["kept"],
                "matrix": spans[part.canonical].matrix,
                "dim": spans[part.canonical].dim,
                "runs": [list(run) for run in spans[part.canonical].runs],
            }
            for part in weight.slices
        ]
    return entry


def _warnings(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    zero = [name for name, each in parts.items() if not each["norm"]]
    if zero:
        yield f"D is zero in {len(zero)} of {len(parts)} weights ({', '.join(zero[:4])})"
    low = [each["kept"] for each in parts.values() if each["kept"] < LOW_SHARE]
    if low:
        yield (
            f"the prior keeps less than {LOW_SHARE:.0%} of the squared norm of D in {len(low)} "
            f"of {len(parts)} weights (least {min(low):.0%}); a larger --rank keeps more"
        )


def kept_share(facts: Any) -> float:
    """Return the share of the squared norm that is kept of all these parts together."""
    every = [(each["norm"] ** 2, each["kept"]) for each in facts]
    whole = math.fsum(square for square, _ in every)
    kept = math.fsum(square * share for square, share in every)
    return min(1.0, kept / whole) if whole else 1.0
