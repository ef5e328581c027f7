"""Warn of decisions whose sketches did not reach the accuracy that they aim at."""

from __future__ import annotations

from collections.abc import Sequence

from lean_merge.methods.base import ExpertRecord

_ACCURACY = (
    (
        "omitted_share",
        0.025,
        "directions beyond the computed rank may carry up to {:.0%} of the update in {} weights; "
        "--rank N computes more, --svd exact all",
    ),
    (
        "lambda_doubt",
        0.05,
        "up to {:.0%} of a nuclear norm, and with it of lambda, may be rounding in {} weights "
        "whose task vectors are nearly of low rank; --svd exact computes it",
    ),
    (
        "angle_error",
        0.1,
        "directions that carry the update are known to a sine of {:.2f} only in {} weights; --svd "
        "exact computes them fully",
    ),
)
"""Fields of selected records, the values above which the report warns, and the warnings."""


def accuracy_warnings(records: Sequence[ExpertRecord]) -> list[str]:
    """Return a sentence for each field that is too large in some selected record."""
    warnings, selected = [], [record for record in records if record.selected]
    for field, bar, text in _ACCURACY:
        high = [value for each in selected if (value := getattr(each, field) or 0.0) > bar]
        warnings += [text.format(max(high), len(high))] if high else []
    return warnings
