"""Read recipes as YAML that holds only data, has limited size, and has every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lean_merge.errors import RecipeError, shown

MAX_TEXT = 1 << 18
"""The most bytes of a recipe; real ones have a few hundred."""
_TEXT, _KEY = "tag:yaml.org,2002:str", "!lean-merge-key"


def load_recipe_file(path: Path) -> dict[str, Any]:
    """Return the plain data of a recipe file, for flags to override before it is checked.

    Raises
    ------
    RecipeError
        The file cannot be read, or does not hold a recipe.
    """
    try:
        # A pipe does not tell its size beforehand, and a device may have no end.
        with open(path.expanduser(), "rb") as stream:
            data = stream.read(MAX_TEXT + 1)
        text = data.decode("utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error}).") from error
    return load_yaml(text, what=f"recipe {path}")


def load_yaml(text: str, *, what: str = "recipe") -> dict[str, Any]:
    """Return a recipe's YAML mapping as plain data. Raises RecipeError."""
    data = parse_yaml(text, what=what)
    if not isinstance(data, dict):
        raise RecipeError(f"The {what} must be a YAML mapping, starting with merge_method: ...")
    return data


def parse_yaml(text: str, *, what: str) -> Any:
    """Return the plain data that `text` holds; messages call the text `what`.

    Raises
    ------
    RecipeError
        The text is no YAML, is too long, or has a key twice.
    """
    if len(text) > MAX_TEXT:
        raise RecipeError(
            f"The {what} is longer than {MAX_TEXT} characters, and real ones have hundreds; pass "
            "the right file."
        )
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except Exception as error:  # the constructors raise Key-, Index- and AttributeErrors too
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        told = str(getattr(error, "problem", None) or error)
        fault = shown(" ".join(told.split()))[1:-1]
        raise RecipeError(f"The {what} is not valid YAML{line}: {fault}.") from error


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML, in the given order."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


class _LinedKey(str):
    """A mapping's key that knows the line in which it stands, for messages."""

    line: int


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself takes the last of several equal keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(
                        f"the key {shown(key.value)} stands there twice, again in line "
                        f"{key.start_mark.line + 1}"
                    )
                seen.add((key.tag, key.value))
                if key.tag == _TEXT:
                    key.tag = _KEY
        return node

    def construct_key(self, node: yaml.ScalarNode) -> _LinedKey:
        key = _LinedKey(self.construct_scalar(node))
        key.line = node.start_mark.line + 1
        return key


_UniqueKeyLoader.add_constructor(_KEY, _UniqueKeyLoader.construct_key)
