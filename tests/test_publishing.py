"""What is published beside the program: the site, the package's page, the schema of recipes."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

from support.recipe_schema import recipe_schema

from lean_merge import MergeRecipe

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "docs" / "recipe.schema.json"
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yml"))


def test_the_schema_of_recipes_is_that_of_the_dataclasses() -> None:
    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("LEAN_MERGE_WRITE_DOCS") == "1":
        SCHEMA.write_text(text, encoding="utf-8")
    assert SCHEMA.read_text(encoding="utf-8") == text, "write it with LEAN_MERGE_WRITE_DOCS=1"
    properties = recipe_schema()["properties"]
    assert set(properties) == set(MergeRecipe.__dataclass_fields__)
    assert all(each["description"] for each in properties.values())


def test_links_of_the_long_description_lead_into_the_repository() -> None:
    absolute = runpy.run_path(str(ROOT / "setup.py"))["absolute"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)", absolute(text, "https://example.org/us/it"))
    assert not [link for link in found if not link.startswith(("https://", "#"))]
    into = {link for link in found if link.startswith("https://example.org/us/it/")}
    assert "https://example.org/us/it/raw/main/docs/assets/demo.svg" in into
    for link in into:
        file = link.split("/main/")[1].partition("#")[0]
        assert (ROOT / file).exists(), link


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the navigation, and every link and anchor leads somewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="pairs/"' in front and 'src="assets/demo.svg"' in front
    fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', front)
    assert [url for url in fetched if "github.com" not in url] == []
