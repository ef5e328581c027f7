"""Compares merges with the oracle in float64, and says how far they may be from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support import bars
from support.families import Case, relative_error

EXACT = 2e-4
"""Relative error of an update in float32 arithmetic where whole spectra are computed."""
MEDIAN, WORST = 0.01, 0.03
"""What the method promises for every dtype and path."""


def compare(
    found: list[Case], rows: dict[str, dict[str, Any]], *, median: float, worst: float, **options
) -> None:
    """Assert that the merge decided and computed what the oracle says of the stored numbers."""
    threshold = options.get("threshold", 0.4)
    errors = []
    for case in found:
        row, oracle = rows[case.slot.canonical], case.oracle(**options)
        first = float(oracle.similarity[0])
        compared = first if options.get("select_by") != "max" else float(oracle.similarity.max())
        assert row["similarity_first"] == pytest.approx(first, abs=0.02)
        if abs(compared - threshold) >= 0.02:
            assert row["selected"] is oracle.selected
        if not row["selected"]:
            assert row["update_norm"] == 0.0
            assert not case.update.any()
            continue
        bars.hold("lambda, merged", bars.relative(row["lambda"], oracle.ratio), worst / 2)
        top = bars.relative(row["lambda_top_q"], oracle.ratio_top_q)
        bars.hold("lambda of q values, merged", top, worst / 2)
        # A singular value may lie at the bound that the rank counts from; a sketch does not see it.
        assert row["rank"] >= oracle.subspace - 1
        if row["computed_rank"] >= oracle.subspace:
            assert row["rank"] <= oracle.subspace + 1
        assert row["update_norm"] == pytest.approx(np.linalg.norm(oracle.update), rel=worst)
        errors.append(relative_error(case.update, oracle.update))
    assert errors
    bars.hold("update, merged, median", float(np.median(errors)), median)
    bars.hold("update, merged, worst", max(errors), worst)
