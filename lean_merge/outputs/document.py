"""Build the content of analysis.json; docs/formats.md explains every field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lean_merge.linalg.null import null_quantile
from lean_merge.mapping import layer_of
from lean_merge.methods import Compared, EvidenceMethod, ExpertRecord
from lean_merge.methods.plainfacts import from_plain
from lean_merge.methods.threshold import Sample, Suggestion, suggest_threshold
from lean_merge.outputs.base import Outcome
from lean_merge.outputs.gathered import Gathered
from lean_merge.recipe import MergeRecipe
from lean_merge.tasks import WeightResult, decision_fields
from lean_merge.version import __version__

ANALYSIS = "analysis.json"
ANALYSIS_VERSION = 1
_MEASURES = ("seconds", "bytes", "memory", "device", "threads", "workers")
"""The fields of the report that an analysis states too."""
KeptEvidence = Mapping[str, Mapping[str, Any] | None]
"""The evidence kept of every weight, by canonical name; None if it was not analysed."""


def build_document(
    recipe: MergeRecipe,
    gathered: Gathered,
    methods: Mapping[str, EvidenceMethod[Any]],
    evidence: KeptEvidence,
    outcome: Outcome,
) -> dict[str, Any]:
    """Return the content of analysis.json.

    Parameters
    ----------
    recipe
        The recipe of the analysis.
    gathered
        The parameters and the seed that the evidence depends on.
    methods
        The method of each weight that was analysed, by its canonical name.
    evidence
        The evidence kept of every weight.
    outcome
        The facts of the run.
    """
    found = {name: from_plain(plain) for name, plain in evidence.items() if plain is not None}
    compared = {name: methods[name].compared(facts) for name, facts in found.items()}
    suggestions = suggestions_of(evidence, compared, len(recipe.experts))
    settled = {name: methods[name].settled([each.auto for each in suggestions]) for name in found}
    compared = {name: settled[name].compared(facts) for name, facts in found.items()}
    records = {name: settled[name].verdicts(facts) for name, facts in found.items()}
    facts, report = outcome.facts, outcome.report
    told = gathered.to_dict()
    return {
        "version": ANALYSIS_VERSION,
        "lean_merge": __version__,
        "recipe": facts["recipe"],
        "experts": [expert.model for expert in recipe.experts],
        "inputs": facts["inputs"],
        "environment": facts["environment"],
        "gathered": told,
        **{name: report[name] for name in _MEASURES},
        "warnings": [
            *report["warnings"],
            *(warning for each in suggestions for warning in each.warnings),
        ],
        "thresholds": [
            {
                "expert": expert.model,
                "select_by": told.get("select_by"),
                "in_force": _in_force([own[k] for own in compared.values()]),
                **each.to_dict(),
            }
            for k, (expert, each) in enumerate(zip(recipe.experts, suggestions, strict=True))
        ],
        "weights": [
            _row(
                weight,
                evidence[weight.canonical],
                compared.get(weight.canonical),
                records.get(weight.canonical, ()),
            )
            for weight in outcome.weights
        ],
    }


def suggestions_of(
    evidence: KeptEvidence,
    compared: Mapping[str, tuple[Compared | None, ...]],
    experts: int,
) -> list[Suggestion]:
    """Suggest each expert's threshold from the similarities that are compared."""
    return [suggest_threshold(_samples(evidence, compared, expert)) for expert in range(experts)]


def _samples(
    evidence: KeptEvidence,
    compared: Mapping[str, tuple[Compared | None, ...]],
    expert: int,
) -> list[Sample]:
    samples = []
    for name, of_experts in compared.items():
        plain, own = evidence[name], of_experts[expert]
        if plain is None or own is None:
            continue
        base = max(plain["base_norm"], 1e-300)
        norms = plain["mllm"]["norm"], plain["experts"][expert]["norm"]
        samples.append(
            Sample(
                similarity=own.similarity,
                in_features=plain["shape"][1],
                directions=own.directions,
                bearable=own.bearable,
                ratios=(norms[0] / base, norms[1] / base),
            )
        )
    return samples


def _in_force(compared: Sequence[Compared | None]) -> float | None:
    """Return the one threshold that decides; None if weights have different ones."""
    thresholds = {each.threshold for each in compared if each is not None}
    return thresholds.pop() if len(thresholds) == 1 else None


def _row(
    weight: WeightResult,
    plain: Mapping[str, Any] | None,
    compared: tuple[Compared | None, ...] | None,
    records: Sequence[ExpertRecord],
) -> dict[str, Any]:
    """Return the entry of one weight."""
    about = {
        "weight": weight.canonical,
        "name": weight.name,
        "layer": layer_of(weight.canonical),
        "module": weight.canonical.rsplit(".", 1)[-1],
    }
    if plain is None or compared is None:
        skipped = "; ".join(dict.fromkeys(record.reason for record in weight.experts))
        return {**about, "shape": None, "skipped": skipped, "passes": weight.passes}
    experts = zip(plain["experts"], _explained(weight, records), compared, strict=True)
    return {
        **about,
        **plain,
        "skipped": None,
        "passes": weight.passes,
        "experts": [
            {**expert, **decision_fields(record, rank="subspace"), "null_99": _null(own, plain)}
            for expert, record, own in experts
        ],
    }


def _explained(weight: WeightResult, records: Sequence[ExpertRecord]) -> list[ExpertRecord]:
    """Return for each expert our record, or the engine's if it cannot change the weight."""
    pairs = zip(weight.experts, records, strict=True)
    return [ours if ours.rank else theirs for theirs, ours in pairs]


def _null(own: Compared | None, plain: Mapping[str, Any]) -> float | None:
    if own is None:
        return None
    return null_quantile(0.99, plain["shape"][1], directions=own.directions)
