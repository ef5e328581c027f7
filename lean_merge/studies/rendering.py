"""Pages beside the documents that they show, and pages of documents that are there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.errors import CheckpointError
from lean_merge.outputs.document import ANALYSIS
from lean_merge.page import report_available, write_comparison_page, write_report, write_sweep_page
from lean_merge.studies.comparison import COMPARISON

_MAX_DOCUMENT = 1 << 30
_MAX_PARSED = 4 << 30
"""Bytes that parsing may take; an analysis of 20,000 weights needs a few hundred MB."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A kind of document, and the page that shows it."""

    document: str
    page: str
    write: Callable[[dict[str, Any], Path], None]


REPORT = Shown(ANALYSIS, "report.html", write_report)
SWEEP = Shown("sweep.json", "sweep.html", write_sweep_page)
DIFFERENCE = Shown(COMPARISON, "comparison.html", write_comparison_page)


def add_page(kind: Shown, folder: Path, content: dict[str, Any]) -> Path | None:
    """The page of a document, written into its folder; None where plotly is not installed.

    It is no part of what is sealed: it can be made again from the document at any time.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    if not report_available():
        return None
    kind.write(content, folder / kind.page)
    return folder / kind.page


def render(folder: str | Path, out: str | Path | None = None) -> Path:
    """The page of the analysis, sweep or comparison in a folder, made anew.

    Parameters
    ----------
    folder
        Of the document.
    out
        The page, replaced if it exists; by default it lies beside the document.

    Raises
    ------
    CheckpointError
        There is no such document, or it cannot be read.
    OutputError
        Plotly is not installed, or the page cannot be written.
    """
    place = Path(folder).expanduser()
    for kind in (REPORT, SWEEP, DIFFERENCE):
        if (place / kind.document).is_file():
            content = read_object(
                place / kind.document,
                limit=_MAX_DOCUMENT,
                what="what is to be shown",
                mend="name the folder of a complete analysis, sweep or comparison",
                memory=_MAX_PARSED,
            )
            target = place / kind.page if out is None else Path(out).expanduser()
            kind.write(content, target)
            return target
    raise CheckpointError(
        f"{place}: holds no {ANALYSIS}, {SWEEP.document} or {COMPARISON}; name the folder of an "
        "analysis, a sweep or a comparison."
    )
