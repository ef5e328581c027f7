"""The content of analysis.json; docs/formats.md explains every field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lean_merge.engine import RunResult
from lean_merge.linalg import null_quantile
from lean_merge.mapping import layer_of
from lean_merge.memory import Usage
from lean_merge.methods import Compared, EvidenceMethod, ExpertRecord, Watching
from lean_merge.methods.plainfacts import from_plain
from lean_merge.methods.threshold import Sample, Survey, survey
from lean_merge.plan import Plan
from lean_merge.report import accuracy_warnings, decision_fields, fallback_warnings, measures
from lean_merge.tasks import WeightResult
from lean_merge.version import __version__

ANALYSIS = "analysis.json"
ANALYSIS_VERSION = 1


def build_analysis(
    plan: Plan,
    result: RunResult,
    evidence: Mapping[str, dict[str, Any] | None],
    *,
    facts: Mapping[str, Any],
    bytes_written: int,
    peak: Usage,
    baseline: Usage,
) -> dict[str, Any]:
    """The content of analysis.json.

    Parameters
    ----------
    plan, result
        Of the analysis.
    evidence
        What was kept of every weight, by canonical name; None where it was not looked at.
    facts
        `run_facts` of the plan.
    bytes_written, peak, baseline
        As for a merge's report.
    """
    assert plan.evidence is not None
    methods = _methods(plan)
    found = {name: from_plain(plain) for name, plain in evidence.items() if plain is not None}
    compared = {name: methods[name].compared(facts) for name, facts in found.items()}
    surveys = surveys_of(evidence, compared, len(plan.experts))
    settled = {name: methods[name].settled([each.auto for each in surveys]) for name in found}
    compared = {name: settled[name].compared(facts) for name, facts in found.items()}
    records = {name: settled[name].verdicts(facts) for name, facts in found.items()}
    warnings = [*plan.coverage.warnings, *plan.notes]
    warnings += [*accuracy_warnings(result), *fallback_warnings(result)]
    warnings += [warning for each in surveys for warning in each.warnings]
    return {
        "version": ANALYSIS_VERSION,
        "lean_merge": __version__,
        "recipe": facts["recipe"],
        "experts": [expert.model for expert in plan.recipe.experts],
        "inputs": facts["inputs"],
        "environment": facts["environment"],
        "gathered": plan.evidence.gathered.to_dict(),
        **measures(plan, result, bytes_written=bytes_written, peak=peak, baseline=baseline),
        "warnings": warnings,
        "thresholds": [
            {
                "expert": expert.model,
                "select_by": plan.evidence.gathered.to_dict().get("select_by"),
                "in_force": _in_force([own[k] for own in compared.values()]),
                **each.to_dict(),
            }
            for k, (expert, each) in enumerate(zip(plan.recipe.experts, surveys, strict=True))
        ],
        "weights": [
            _row(
                weight,
                evidence[weight.canonical],
                compared.get(weight.canonical),
                records.get(weight.canonical, ()),
            )
            for weight in result.weights
        ],
    }


def _methods(plan: Plan) -> dict[str, EvidenceMethod[Any]]:
    """How each weight would be merged."""
    return {
        part.canonical: method.method
        for task in plan.weights
        for part, method in zip(task.weight.slices, task.methods, strict=True)
        if isinstance(method, Watching)
    }


def surveys_of(
    evidence: Mapping[str, Mapping[str, Any] | None],
    compared: Mapping[str, tuple[Compared | None, ...]],
    experts: int,
) -> list[Survey]:
    """What the compared similarities say of each expert's threshold."""
    return [survey(_samples(evidence, compared, expert)) for expert in range(experts)]


def _samples(
    evidence: Mapping[str, Mapping[str, Any] | None],
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
    """The one threshold that decides; None where weights have their own."""
    thresholds = {each.threshold for each in compared if each is not None}
    return thresholds.pop() if len(thresholds) == 1 else None


def _row(
    weight: WeightResult,
    plain: dict[str, Any] | None,
    compared: tuple[Compared | None, ...] | None,
    records: Sequence[ExpertRecord],
) -> dict[str, Any]:
    """One of `weights`."""
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
    """The records; the engine knows experts that cannot change a weight."""
    pairs = zip(weight.experts, records, strict=True)
    return [ours if ours.rank else theirs for theirs, ours in pairs]


def _null(own: Compared | None, plain: Mapping[str, Any]) -> float | None:
    if own is None:
        return None
    return null_quantile(0.99, plain["shape"][1], directions=own.directions)
