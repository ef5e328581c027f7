"""A recipe says what the user asks for; it is read from YAML and written to it."""

from lean_merge.recipe.recipe import (
    ANY,
    OUT_DTYPES,
    ROUNDINGS,
    Expert,
    Filtered,
    MergeRecipe,
    NameRules,
    Parameters,
    reject_unknown,
)
from lean_merge.recipe.yamlfile import dump_yaml, load_recipe_file, load_yaml, parse_yaml

__all__ = [
    "ANY",
    "OUT_DTYPES",
    "ROUNDINGS",
    "Expert",
    "Filtered",
    "MergeRecipe",
    "NameRules",
    "Parameters",
    "dump_yaml",
    "load_recipe_file",
    "load_yaml",
    "parse_yaml",
    "reject_unknown",
]
