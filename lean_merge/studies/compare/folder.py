"""Write the folder of a comparison, which helps when no merge is possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints import Checkpoint, identify
from lean_merge.checkpoints.jsonfile import to_json
from lean_merge.plan.resources import Resources
from lean_merge.recipe import MergeRecipe
from lean_merge.store import JOURNAL, OutputFolder
from lean_merge.store.beforehand import check_output
from lean_merge.studies.compare.document import COMPARISON, compare, open_roles
from lean_merge.studies.pages import PAGES, add_page


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """A finished comparison: its folder, its page where plotly is installed, and its content."""

    path: Path
    page: Path | None
    comparison: dict[str, Any]


def write_comparison(
    recipe: MergeRecipe,
    out: str | Path,
    *,
    resources: Resources | None = None,
    reason: str | None = None,
    overwrite: bool = False,
) -> ComparisonResult:
    """Compare the models of a recipe, and keep what differs between them.

    Parameters
    ----------
    recipe
        The recipe that names the models.
    out
        The folder, which is visibly unfinished until the last rename. An earlier comparison in it
        is replaced.
    resources
        Memory and threads; a device is not used.
    reason
        Why the models cannot be merged.
    overwrite
        Replace what `out` holds, once the comparison is complete.

    Raises
    ------
    LeanMergeError
        What `compare` raises, or an OutputError; nothing that existed is lost.
    """
    checkpoints = open_roles(recipe)
    final = Path(out)
    place: dict[str, Any] = {
        "inputs": [each.path for each in checkpoints.values()],
        "overwrite": overwrite or is_comparison(final),
        "run": _facts(recipe, checkpoints),
        "resume": False,
    }
    # A fault is reported before the weights are read, which takes a while.
    check_output(final, (), **place)
    found = compare(recipe, resources, reason=reason, checkpoints=checkpoints)
    with OutputFolder.create(final, (), **place) as folder:
        folder.write_file(COMPARISON, to_json(found))
        folder.seal()
    return ComparisonResult(folder.final, add_page("comparison", folder.final, found), found)


def is_comparison(folder: Path) -> bool:
    """Return whether a folder holds a comparison, and no other files."""
    ours = {COMPARISON, PAGES["comparison"], JOURNAL}
    try:
        names = {each.name for each in folder.expanduser().iterdir()}
    except (OSError, RuntimeError, ValueError):
        return False
    return {COMPARISON, JOURNAL} <= names <= ours


def _facts(recipe: MergeRecipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Return the facts for a comparison's journal, so that it is not mistaken for a merge."""
    return {
        "kind": "comparison",
        "recipe": recipe.to_dict(),
        "inputs": [
            {"role": role, "path": str(each.path), "files": identify(each)}
            for role, each in checkpoints.items()
        ],
    }
