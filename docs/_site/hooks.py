"""Hooks of MkDocs: pages from the root of the repository, and links that leave the folder docs.

In the repository, links lead from file to file. README.md becomes the first page of the site, a
link to another page stays one, and a link to anything else leads into the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
AT_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
AT_THE_ROOT["CHANGELOG.md"] = "CHANGELOG.md"
"""Files beside the folder docs, and the pages that they become."""
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside the folder docs."""
    for name, page in AT_THE_ROOT.items():
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files into links between pages, or into the repository."""
    uri = page.file.src_uri
    named = {place: name for name, place in AT_THE_ROOT.items()}
    source = ROOT / named[uri] if uri in named else ROOT / "docs" / uri

    def linked(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / found[2])).relative_to(ROOT).as_posix()
        place = AT_THE_ROOT.get(target) or target.removeprefix("docs/")
        if target in AT_THE_ROOT or (target != place and files.get_file_from_path(place)):
            return found[1] + os.path.relpath(place, os.path.dirname(uri) or ".")
        return f"{found[1]}{config['repo_url']}/blob/main/{target}"

    return _LINK.sub(linked, markdown)
