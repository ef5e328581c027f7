"""Pages show results in one HTML file each, which opens offline and fetches nothing.

A page is made from a stored JSON document alone. Plotly draws it, which comes with the extra
`report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lean_merge.errors import OutputError, shown
from lean_merge.page.analysis import analysis_content
from lean_merge.page.comparison import comparison_content
from lean_merge.page.frame import INSTALL_PLOTLY, PageContent, framed, plotly_installed
from lean_merge.page.sweep import sweep_content

CONTENTS: Mapping[str, Callable[[dict[str, Any]], PageContent]] = {
    "analysis": analysis_content,
    "sweep": sweep_content,
    "comparison": comparison_content,
}
"""The functions that make the content of a page, by the kind of the document."""
_VERSION = 1


def make_page(kind: str, document: dict[str, Any]) -> bytes:
    """Return one HTML file that shows a document and opens offline.

    Parameters
    ----------
    kind
        "analysis", "sweep" or "comparison".
    document
        The content of analysis.json, sweep.json or comparison.json. Equal ones give equal bytes.

    Raises
    ------
    OutputError
        Plotly is not installed, or the document is of another version or lacks something.
    """
    version = document.get("version")
    if type(version) is not int or version != _VERSION:
        raise OutputError(
            f"The {kind} is of version {shown(version)}, and this program shows version "
            f"{_VERSION}; use the lean-merge that wrote it, or make it again."
        )
    try:
        return framed(kind, CONTENTS[kind](document))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise OutputError(
            f"The {kind} cannot be shown, for it is damaged ({type(error).__name__}: "
            f"{shown(str(error))}); make it again."
        ) from error


__all__ = ["INSTALL_PLOTLY", "make_page", "plotly_installed"]
