"""docs/recipe.schema.json, from the dataclasses: editors complete and check recipes by it."""

from __future__ import annotations

import dataclasses
import re
import types
from typing import Any, get_args, get_origin, get_type_hints

from lean_merge.cli.methodtable import methods_list
from lean_merge.recipe import OUT_DTYPES, ROUNDINGS, Expert, MergeRecipe
from lean_merge.recipe.recipe import SCOPES

_WORDS: dict[str, tuple[str, ...]] = {
    "out_dtype": OUT_DTYPES,
    "rounding": ROUNDINGS,
    "scope": SCOPES,
    "output": ("checkpoint", "lora", "none"),
}
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}
_FILTERS = {"type": "array", "items": {"type": ["string", "object"]}}


def recipe_schema() -> dict[str, Any]:
    """A JSON Schema of recipes: keys, types, defaults and words, and each method's parameters."""
    methods = sorted(methods_list(), key=lambda method: method["name"])
    properties = _properties(MergeRecipe)
    properties["merge_method"]["enum"] = [method["name"] for method in methods]
    properties["experts"] |= {"minItems": 1, "items": {"anyOf": [{"type": "string"}, _expert()]}}
    properties["include"] |= _FILTERS
    properties["exclude"] |= _FILTERS
    properties["names"] |= {"type": "object"}
    properties["shard_size"]["type"] = ["integer", "string"]
    default = properties["merge_method"]["default"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of lean-merge",
        "type": "object",
        "required": ["base_model", "experts"],
        "additionalProperties": False,
        "properties": properties,
        "allOf": [_of_method(method, method["name"] == default) for method in methods],
    }


def _properties(kind: type) -> dict[str, dict[str, Any]]:
    said = _described(kind.__doc__ or "")
    hints = get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        schema: dict[str, Any] = {"description": said[field.name]}
        accepted = _accepted(hints[field.name])
        if accepted:
            schema["type"] = accepted[0] if len(accepted) == 1 else accepted
        if field.name in _WORDS:
            schema["enum"] = list(_WORDS[field.name])
        if isinstance(field.default, str | bool | int):
            schema["default"] = field.default
        found[field.name] = schema
    return found


def _accepted(hint: Any) -> list[str]:
    """The JSON types of an annotation; lists and mappings are described by hand."""
    parts = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    return [_TYPES[part] for part in parts if part in _TYPES]


def _described(doc: str) -> dict[str, str]:
    """The texts of a docstring's parameters or attributes, by name."""
    body = re.split(r"(?:Parameters|Attributes)\n\s*-+\n", doc)[1].split("\n\n    Raises")[0]
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in body.splitlines():
        head = re.fullmatch(r"    (\w+(?:, \w+)*) : .*", line)
        if head:
            names = head[1].split(", ")
            found |= {name: [] for name in names}
        else:
            for name in names:
                found[name].append(line.strip())
    return {name: " ".join(lines).strip() for name, lines in found.items()}


def _expert() -> dict[str, Any]:
    properties = _properties(Expert)
    properties["parameters"]["type"] = "object"
    return {
        "type": "object",
        "required": ["model"],
        "additionalProperties": False,
        "properties": properties,
    }


def _of_method(method: dict[str, Any], is_default: bool) -> dict[str, Any]:
    """The parameters of a method, which hold where a recipe names it."""
    chosen: dict[str, Any] = {"properties": {"merge_method": {"const": method["name"]}}}
    if not is_default:
        chosen["required"] = ["merge_method"]
    parameters = {each["name"]: _value(each["default"]) for each in method["parameters"]}
    own = [each["name"] for each in method["parameters"] if each["per_expert"]]
    expert = {"properties": {"parameters": {"propertyNames": {"enum": own}}}}
    return {
        "if": chosen,
        "then": {
            "properties": {
                "parameters": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": parameters,
                },
                "experts": {"items": expert},
            }
        },
    }


def _value(default: Any) -> dict[str, Any]:
    """A parameter's value: one, or a list of values that differ between weights."""
    if isinstance(default, bool):
        accepted = ["boolean", "array"]
    elif isinstance(default, int | float):
        accepted = ["number", "string", "array"]
    else:
        accepted = ["string", "number", "array"]
    return {"type": accepted, "default": default}
