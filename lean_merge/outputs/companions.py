"""The files that lie beside the weights of a merge: its recipe and its report."""

from __future__ import annotations

from typing import Any

from lean_merge.checkpoints.jsonfile import to_json
from lean_merge.outputs.base import RECIPE, Outcome, Output
from lean_merge.store import OutputFolder, license_of

REPORT = "lean_merge_report.json"
"""The file in which a merge tells what happened."""


def write_report(output: Output, folder: OutputFolder, outcome: Outcome) -> None:
    """Write recipe and report. Raises OutputError, BudgetError."""
    folder.write_file(RECIPE, output.recipe.to_yaml().encode())
    folder.write_file(REPORT, to_json({**outcome.report}))


def card_facts(output: Output) -> dict[str, Any]:
    """Give what every card says of a merge. Raises CheckpointError."""
    recipe = output.recipe
    return {
        "recipe_yaml": recipe.to_yaml(),
        "base": recipe.base_model,
        "mllm": recipe.mllm_model,
        "experts": [expert.model for expert in recipe.experts],
        "license_fields": license_of(output.mllm.path),
    }
