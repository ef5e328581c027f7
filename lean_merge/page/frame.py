"""Make the frame of every page: head, policy, style, data and scripts in one file."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from lean_merge.errors import OutputError, plain
from lean_merge.version import __version__

INSTALL_PLOTLY = "pip install 'lean-merge[report]'"
"""The command that installs plotly, which draws the pages."""
_FORBIDDEN = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass(frozen=True, slots=True)
class PageContent:
    """The content that a kind of page puts into the frame.

    Attributes
    ----------
    heading
        The title, as plain text.
    lead, body
        The text below the heading, and the sections, as HTML that is escaped already.
    data
        The data that the scripts read: plain data with finite numbers only.
    """

    heading: str
    lead: str
    body: str
    data: Any


def plotly_installed() -> bool:
    """Return whether plotly, which draws the pages, is installed."""
    return importlib.util.find_spec("plotly") is not None


def framed(kind: str, content: PageContent) -> bytes:
    """Return one self-contained page; equal arguments give equal bytes.

    Parameters
    ----------
    kind
        "analysis", "sweep" or "comparison", which names the script in `assets/` too.
    content
        The content of the page.

    Raises
    ------
    OutputError
        Plotly is not installed.
    """
    scripts = ("plots.js", "table.js", f"{kind}.js")
    own = "".join(["(() => {\n'use strict';\n", *map(_asset, scripts), "})();\n"])
    plotly = _plotly()
    policy = [
        "default-src 'none'",
        f"script-src {_digest(plotly)} {_digest(own)}",
        # Plotly sets styles on its drawings.
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    data = json.dumps(_plain_texts(content.data), allow_nan=False, separators=(",", ":"))
    page = filled(
        "page.html",
        policy="; ".join(policy),
        style=_asset("style.css"),
        version=__version__,
        kind=kind,
        heading=escaped(content.heading),
        lead=content.lead,
        body=content.body,
        data=data.translate(_FORBIDDEN),
        plotly=plotly,
        own=own,
    )
    return page.encode("utf-8", "backslashreplace")


def escaped(value: Any) -> str:
    """Return a value as text between tags or inside quotes; None becomes a dash.

    Names come from strangers' checkpoints, so characters that steer a browser or turn the reading
    direction are escaped.
    """
    return html.escape(plain("—" if value is None else str(value)), quote=True)


def filled(asset: str, **parts: str) -> str:
    """Return a file of `assets/` with HTML in the place of its $names."""
    return Template(_asset(asset)).substitute(parts)


def listed(style: str, pairs: Iterable[tuple[str, Any] | tuple[str, Any, str]]) -> str:
    """Return an HTML list of terms with their texts, in the style "roles" or "tiles".

    A third item names the text, so that scripts find it.
    """
    rows = "".join(
        f"<div><dt>{term}</dt><dd{''.join(f' id={name}' for name in named)}>{escaped(said)}</dd>"
        "</div>"
        for term, said, *named in pairs
    )
    return f'<dl class="{style}">{rows}</dl>'


def verdict(sentences: Iterable[str], command: str | None = None, where: str = "") -> str:
    """Return the section with which a page opens: what was found, and a command to copy.

    Parameters
    ----------
    sentences
        Plain text, a paragraph for each.
    command
        What to run, if anything; and `where`, a sentence on the place to run it.
    """
    said = "".join(f"<p>{escaped(each)}</p>" for each in sentences)
    if command is not None:
        said += (
            f'<div class="command"><code id="command">{escaped(command)}</code>'
            '<button type="button" id="copy">Copy</button></div>'
            f'<p class="hint">{escaped(where)}</p>'
        )
    title = '<h2 id="verdict">In short</h2>'
    return f'<section aria-labelledby="verdict" class="verdict">{title}{said}</section>'


def last_part(source: str) -> str:
    """Return the last part of a path or hub id, which serves as a name."""
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2] or source


def figure(value: float | None, otherwise: str = "—") -> str:
    """Return a number with three significant digits, as text."""
    return otherwise if value is None else f"{value:.3g}"


def rounded(value: float | None, digits: int = 5) -> float | None:
    """Return a number with only the digits that a page shows, which keeps the page small."""
    return None if value is None else float(f"{value:.{digits}g}")


def size_text(shape: Iterable[int] | None) -> str | None:
    """Return a matrix's shape as text such as 4096x11008; None stays None."""
    return None if shape is None else "x".join(map(str, shape))


def _plain_texts(value: Any) -> Any:
    """Return the same data without any characters in its texts that steer a browser."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain_texts(each) for each in value]
    if isinstance(value, dict):
        return {plain(str(name)): _plain_texts(each) for name, each in value.items()}
    return value


def _asset(name: str) -> str:
    file = resources.files("lean_merge.page") / "assets" / name
    return file.read_text(encoding="utf-8")


def _plotly() -> str:
    """Return plotly's own script, for use inside a page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise OutputError(
            f"A page needs plotly, which is not installed; {INSTALL_PLOTLY}."
        ) from error
    # A browser turns every line end into one character before it takes the digest.
    code = str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(code: str) -> str:
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return f"'sha256-{digest}'"
