"""Write the pages of documents beside them, or make them again from stored documents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.safepaths import resolved
from lean_merge.errors import CheckpointError, OutputError
from lean_merge.page import make_page, plotly_installed

PAGES = {"analysis": "report.html", "sweep": "sweep.html", "comparison": "comparison.html"}
"""The file of each kind's page; the document of a kind is KIND.json."""
_MAX_DOCUMENT = 1 << 30
_MAX_PARSED = 4 << 30
"""Bytes that parsing may take; an analysis of 20,000 weights needs a few hundred MB."""


def add_page(kind: str, folder: Path, document: dict[str, Any]) -> Path | None:
    """Write the page of a document into its folder; return None if plotly is not installed.

    The page is not sealed with the output, because it can be made again from the document.

    Raises
    ------
    OutputError
        The page cannot be made or written.
    """
    if not plotly_installed():
        return None
    return _write(folder / PAGES[kind], make_page(kind, document))


def render(folder: str | Path, out: str | Path | None = None) -> Path:
    """Make the page of the analysis, sweep or comparison in a folder anew.

    Parameters
    ----------
    folder
        The folder of the document.
    out
        The page, replaced if it exists; by default it lies beside the document.

    Raises
    ------
    CheckpointError
        There is no such document, or it cannot be read.
    OutputError
        Plotly is not installed, or the page cannot be made or written.
    """
    place = resolved(folder)
    for kind, page in PAGES.items():
        if (place / f"{kind}.json").is_file():
            document = read_object(
                place / f"{kind}.json",
                limit=_MAX_DOCUMENT,
                what=f"the {kind}",
                mend="name the folder of a complete analysis, sweep or comparison",
                memory=_MAX_PARSED,
            )
            target = place / page if out is None else resolved(out)
            return _write(target, make_page(kind, document))
    raise CheckpointError(
        f"{place}: holds no analysis.json, sweep.json or comparison.json; name the folder of an "
        "analysis, a sweep or a comparison."
    )


def _write(path: Path, page: bytes) -> Path:
    """Make or replace a file, which has another name until it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(page)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); check the rights and the disk."
        ) from error
    return path
