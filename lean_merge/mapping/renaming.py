"""Rename tensors by the recipe's rules if structure alone does not explain a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.errors import RecipeError, shown

NameRules = tuple[tuple[str, str], ...]
"""(pattern, template) pairs; the first pattern that is found in a name decides."""


def renamed(checkpoint: Checkpoint, role: str, rules: NameRules) -> Mapping[str, TensorSpec]:
    """Return all tensors of a checkpoint by the names that the rules give them.

    Where a rule's pattern is first found in a name, the template takes its place, as in `re.sub`.
    A tensor that no rule fits keeps its name.

    Raises
    ------
    RecipeError
        A rule fits no tensor, a template cannot be filled, or two tensors get one name.
    """
    compiled = [(re.compile(pattern), template) for pattern, template in rules]
    unused = [pattern for pattern, _ in rules]
    tensors: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.tensors.items():
        new = name
        for pattern, template in compiled:
            new, found = pattern.subn(template, name, count=1)
            if found:
                unused = [each for each in unused if each != pattern.pattern]
                break
        if new in tensors:
            raise RecipeError(
                f"names.{role}: {shown(tensors[new].name)} and {shown(name)} of "
                f"{checkpoint.source} both become {shown(new)}; make the patterns tell them "
                "apart."
            )
        tensors[new] = spec
    if unused:
        examples = ", ".join(shown(name) for name in list(checkpoint.tensors)[:3])
        raise RecipeError(
            f"names.{role}: the pattern {shown(unused[0])} is the first to fit for no tensor of "
            f"{checkpoint.source}, whose names are like {examples}; correct it or leave it out."
        )
    return tensors
