"""YAML from people and strangers: loaded safely, bounded before it is built.

An alias stands for a whole subtree, and a merge key copies one, so that a few lines can name
billions of nodes ("billion laughs"). The node graph is composed first, which shares what aliases
name, and is measured as if it were written out; only what is small is then constructed.
"""

from __future__ import annotations

from typing import Any

import yaml

from lean_merge.errors import RecipeError, shown

MAX_TEXT = 1 << 18
"""Bytes of a recipe; real ones have a few hundred."""
MAX_SCALAR = 4096
"""Characters of one word, the longest path of Linux."""
MAX_NODES = 10_000
"""Values in it, with aliases written out."""
MAX_NESTING = 32
"""Lists and mappings inside each other."""


def parse_yaml(text: str, *, what: str) -> Any:
    """The plain data that `text` holds; `what` it is, for messages.

    Raises
    ------
    RecipeError
        It is no YAML, has a key twice, or is longer, deeper or, with aliases written out, larger
        than the limits above.
    """
    if len(text) > MAX_TEXT:
        raise RecipeError(
            f"The {what} is longer than {MAX_TEXT} characters, and real ones have hundreds; pass "
            "the right file."
        )
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Measure(what).count(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecipeError:
        raise
    except Exception as error:  # its constructors raise Key-, Index- and AttributeErrors too
        fault = shown(" ".join(str(error).split()))[1:-1]
        raise RecipeError(f"The {what} is not valid YAML: {fault}") from error


def dump_yaml(data: Any) -> str:
    """Plain data as YAML in the order given."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


class _Measure:
    """Counts the nodes of a graph as if its aliases were written out."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._known: dict[int, tuple[int, int]] = {}

    def count(self, node: yaml.Node, above: tuple[int, ...] = ()) -> tuple[int, int]:
        """(nodes in and below `node`, height of that tree); `above` are those that it lies in."""
        if id(node) in above:
            raise self._fail("has an alias that lies in what it stands for", node)
        if id(node) not in self._known and len(above) < MAX_NESTING:
            self._known[id(node)] = self._measure(node, (*above, id(node)))
        total, height = self._known.get(id(node), (1, 1))
        if len(above) + height > MAX_NESTING:
            raise self._fail(f"is nested more than {MAX_NESTING} deep", node)
        return total, height

    def _measure(self, node: yaml.Node, inside: tuple[int, ...]) -> tuple[int, int]:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > MAX_SCALAR:
                raise self._fail(f"has a word of more than {MAX_SCALAR} characters", node)
        elif isinstance(node, yaml.MappingNode):
            self._check_unique(node)
            children = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        total, height = 1, 0
        for child in children:
            below, deep = self.count(child, inside)
            total, height = total + below, max(height, deep)
            if total > MAX_NODES:
                fault = f"holds more than {MAX_NODES} values, with aliases written out"
                raise self._fail(fault, node)
        return total, height + 1

    def _check_unique(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise self._fail(f"has the key {shown(key.value)} twice", key)
                seen.add((key.tag, key.value))

    def _fail(self, fault: str, node: yaml.Node) -> RecipeError:
        line = node.start_mark.line + 1
        return RecipeError(f"The {self._what} {fault} (line {line}); write it out plainly.")
