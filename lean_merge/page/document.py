"""The frame of every page: head, policy, style, data and scripts in one file."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from lean_merge.errors import OutputError, plain
from lean_merge.version import __version__

MEND = "pip install 'lean-merge[report]'"
_FORBIDDEN = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def report_available() -> bool:
    """Whether what draws the pages is installed."""
    return importlib.util.find_spec("plotly") is not None


def escaped(value: Any) -> str:
    """`value` as text between tags or inside quotes; None is a dash.

    Names come from strangers' checkpoints, so that what steers a browser or turns the reading
    direction is shown, and not obeyed.
    """
    return html.escape(plain("—" if value is None else str(value)), quote=True)


def page(*, title: str, body: str, data: Any, scripts: Sequence[str]) -> bytes:
    """One self-contained page; the same arguments give the same bytes.

    Parameters
    ----------
    title, body
        Plain text, and HTML that is escaped already.
    data
        What the scripts find as JSON in the element `data`; finite numbers only.
    scripts
        Files of `assets/`, run in this order in one scope.

    Raises
    ------
    OutputError
        Plotly is missing.
    """
    return _page(title, body, data, scripts).encode("utf-8", "backslashreplace")


def write(path: Path, content: bytes) -> None:
    """Makes or replaces a file, which bears another name until it is whole. Raises OutputError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); check the rights and the disk."
        ) from error


def filled(name: str, **parts: str) -> str:
    """A file of `assets/` with HTML put in place of its $names."""
    return Template(_asset(name)).substitute(parts)


def _page(title: str, body: str, data: Any, scripts: Sequence[str]) -> str:
    own = "".join(["(() => {\n'use strict';\n", *map(_asset, scripts), "})();\n"])
    code = [_plotly(), own]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_digest, code))}",
            # Plotly sets styles on what it draws.
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    stored = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="referrer" content="no-referrer">',
            f'<meta name="generator" content="lean-merge {escaped(__version__)}">',
            '<link rel="icon" href="data:,">',
            f"<title>{escaped(title)}</title>",
            f"<style>\n{_asset('style.css')}</style>",
            "</head>",
            "<body>",
            body,
            f'<script type="application/json" id="data">{stored.translate(_FORBIDDEN)}</script>',
            *(f"<script>{each}</script>" for each in code),
            "</body>",
            "</html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    file = resources.files("lean_merge.page") / "assets" / name
    return file.read_text(encoding="utf-8")


def _plotly() -> str:
    """The library's own script, for use inside a page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise OutputError(f"A report needs plotly, which is not installed; {MEND}.") from error
    # A browser reads the ends of lines as one character before it takes the digest.
    code = str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(code: str) -> str:
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return f"'sha256-{digest}'"
