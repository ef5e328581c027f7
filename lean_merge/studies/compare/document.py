"""Build the content of comparison.json, and put a comparison into sentences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lean_merge import memory
from lean_merge.checkpoints import (
    FLOATING,
    Checkpoint,
    TensorReader,
    WeightSource,
    open_checkpoint,
    open_expert,
)
from lean_merge.engine import worker_pool
from lean_merge.linalg.settings import Computing
from lean_merge.mapping.gate import title
from lean_merge.mapping.names import renamed
from lean_merge.mapping.structure import Key
from lean_merge.plan import formulas
from lean_merge.plan.resources import Resources, memory_of, threads_of
from lean_merge.recipe import MergeRecipe
from lean_merge.studies.compare.distances import (
    InnerProducts,
    products,
    strip_bytes,
    unrelated_cosine,
)
from lean_merge.studies.compare.roles import (
    RoleDescription,
    described_roles,
    differences,
    tokenizer_facts,
)
from lean_merge.version import __version__

COMPARISON = "comparison.json"
RELATED_COSINE = 0.5
"""The median cosine from which two models are said to be of one origin."""
_MOST_WORKERS = 4


@dataclass(frozen=True, slots=True)
class SharedWeight:
    """A logical weight, its shape in every role that has it, and the sources that can be read."""

    key: Key
    shapes: Mapping[str, tuple[int, int]]
    sources: Mapping[str, WeightSource]

    def comparable(self) -> list[dict[str, WeightSource]]:
        """Return each group of at least two roles in which the weight has the same shape."""
        groups: dict[tuple[int, int], dict[str, WeightSource]] = {}
        for role, source in self.sources.items():
            groups.setdefault(source.shape, {})[role] = source
        return [group for group in groups.values() if len(group) > 1]


def compare(
    recipe: MergeRecipe,
    resources: Resources | None = None,
    *,
    reason: str | None = None,
    checkpoints: Mapping[str, Checkpoint] | None = None,
) -> dict[str, Any]:
    """Say what differs between the models of a recipe, and how far apart their weights are.

    Layers correspond by number. Every weight that has an equal shape in two roles is read once, by
    strips of rows.

    Parameters
    ----------
    recipe
        The recipe that names the models; what it says of the merge does not matter.
    resources
        Memory and threads; a device is not used.
    reason
        Why the models cannot be merged, which is kept with the rest.
    checkpoints
        The result of `open_roles`, if the checkpoints are open already.

    Returns
    -------
    dict
        The content of comparison.json, which docs/analysis.md documents.

    Raises
    ------
    CheckpointError, DataError, RecipeError
        A checkpoint, or the recipe's names, cannot be read.
    BudgetError
        The given memory is too small for two strips.
    """
    started = time.perf_counter()
    checkpoints = open_roles(recipe) if checkpoints is None else checkpoints
    rules = recipe.name_rules()
    named = {role: renamed(checkpoints[role], role, rules[role]) for role in rules}
    found = described_roles(checkpoints, named)
    shared = _weights(checkpoints, found)
    with TensorReader() as reader:
        measured = _measure(shared, reader, resources or Resources())
        read = reader.bytes_read
    tokenizers = tokenizer_facts(found)
    pairs = _pairs(list(checkpoints))
    rows = [_row(weight, each, pairs) for weight, each in zip(shared, measured, strict=True)]
    return {
        "version": 1,
        "lean_merge": __version__,
        "recipe": recipe.to_dict(),
        "reason": reason,
        "models": [_model(each) for each in found],
        "differences": differences(found, tokenizers),
        "tokenizers": tokenizers,
        "pairs": [_summary(pair, place, rows) for place, pair in enumerate(pairs)],
        "weights": rows,
        "seconds": time.perf_counter() - started,
        "bytes": {"read": read},
    }


def open_roles(recipe: MergeRecipe) -> dict[str, Checkpoint]:
    """Open the models of a recipe, by role. Raises CheckpointError if one cannot be read."""
    roles = {
        "base": open_checkpoint(recipe.base_model),
        "mllm": open_checkpoint(recipe.receiver),
    }
    for number, expert in enumerate(recipe.experts, start=1):
        roles[f"expert {number}"] = open_expert(expert.model)
    return roles


def _model(role: RoleDescription) -> dict[str, Any]:
    facts: dict[str, dict[str, Any]] = {}
    for (kind, words), value in role.facts.items():
        facts.setdefault(kind, {})[words] = value
    return {
        "role": role.role,
        "source": role.source,
        "prefix": role.prefix,
        "fault": role.fault,
        "facts": facts,
    }


def _weights(
    checkpoints: Mapping[str, Checkpoint], found: Sequence[RoleDescription]
) -> list[SharedWeight]:
    """Return every logical weight that any role has, in the order of layers."""
    places = {each.role: each.decoder.weights for each in found if each.decoder is not None}
    keys = dict.fromkeys(key for weights in places.values() for key in weights)
    result = []
    for key in sorted(keys, key=lambda key: key[0]):
        shapes, sources = {}, {}
        for role, weights in places.items():
            place = weights.get(key)
            if place is None:
                continue
            shapes[role] = place.shape
            checkpoint = checkpoints[role]
            if checkpoint.fault(place.tensor) is None and 0 not in place.shape:
                source = checkpoint.rows(place)
                if source.dtype in FLOATING:
                    sources[role] = source
        result.append(SharedWeight(key, shapes, sources))
    return result


def _measure(
    shared: Sequence[SharedWeight], reader: TensorReader, resources: Resources
) -> list[list[InnerProducts]]:
    """Return the inner products of every weight's groups, in the order of the weights."""
    groups = [(weight, group) for weight in shared for group in weight.comparable()]
    largest: dict[str, int] = {}
    for _, group in groups:
        for role, source in group.items():
            largest[role] = max(largest.get(role, 0), strip_bytes(source))
    with Computing(), worker_pool(_workers(sum(largest.values()), resources)) as workers:
        found = workers.map(
            lambda sources: products(sources, reader, workers), [group for _, group in groups]
        )
    by_weight: dict[int, list[InnerProducts]] = {}
    for (weight, _), each in zip(groups, found, strict=True):
        by_weight.setdefault(id(weight), []).append(each)
    return [by_weight.get(id(weight), []) for weight in shared]


def _workers(largest: int, resources: Resources) -> int:
    """Return how many threads' strips fit the memory. Raises BudgetError if none do."""
    limit = memory_of(resources)
    fixed = memory.usage().anonymous + formulas.SLACK
    formulas.check_ceiling(
        fixed + largest, limit, what="memory", flag="--memory", name="two strips of rows"
    )
    wanted = min(threads_of(resources), _MOST_WORKERS)
    return max(1, min(wanted, (limit - fixed) // max(1, largest)))


def _pairs(roles: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs to compare: every role with the base, and every expert with the MLLM."""
    base, mllm, *experts = roles
    return [(mllm, base), *((e, base) for e in experts), *((e, mllm) for e in experts)]


def _row(
    weight: SharedWeight, measured: Sequence[InnerProducts], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    layer, rest = weight.key
    return {
        "weight": f"layers.{layer}.{rest}",
        "layer": layer,
        "module": rest.rpartition(".")[2],
        "shapes": {role: list(shape) for role, shape in weight.shapes.items()},
        "pairs": [_pair(weight, measured, pair) for pair in pairs],
    }


def _pair(
    weight: SharedWeight, measured: Sequence[InnerProducts], pair: tuple[str, str]
) -> dict[str, Any] | None:
    """Return the measures of one pair of roles; None if their weights cannot be compared."""
    for each in measured:
        if all(role in each.squares for role in pair):
            return {
                "distance": each.distance(*pair),
                "distance_unrelated": each.unrelated(*pair),
                "cosine": each.cosine(*pair),
                "cosine_unrelated": unrelated_cosine(weight.shapes[pair[0]]),
            }
    return None


def _summary(
    pair: tuple[str, str], place: int, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the counts and medians of one pair of roles, and what they mean."""
    found = [
        row["pairs"][place]
        for row in rows
        if row["pairs"][place] is not None and row["pairs"][place]["cosine"] is not None
    ]
    shapes = [row["shapes"] for row in rows]
    both = [each for each in shapes if all(role in each for role in pair)]
    beyond = sum(abs(each["cosine"]) > each["cosine_unrelated"] for each in found)
    cosine = _median([each["cosine"] for each in found])
    return {
        "one": pair[0],
        "other": pair[1],
        "equal_shape": sum(each[pair[0]] == each[pair[1]] for each in both),
        "unequal_shape": sum(each[pair[0]] != each[pair[1]] for each in both),
        "only_in_one": sum((pair[0] in each) != (pair[1] in each) for each in shapes),
        "compared": len(found),
        "distance": _median([each["distance"] for each in found]),
        "distance_unrelated": _median([each["distance_unrelated"] for each in found]),
        "cosine": cosine,
        "cosine_unrelated": _median([each["cosine_unrelated"] for each in found]),
        "beyond_unrelated": beyond,
        "verdict": _verdict(len(found), beyond, cosine),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _verdict(compared: int, beyond: int, cosine: float | None) -> str:
    if not compared or cosine is None:
        return "not comparable"
    if cosine >= RELATED_COSINE:
        return "one origin"
    return "something in common" if beyond > 0.1 * compared else "unrelated"


def differing(comparison: Mapping[str, Any]) -> list[str]:
    """Return lines for people that say what differs."""
    lines = []
    for each in comparison["differences"]:
        stated = ", ".join(
            f"{'none' if value is None else value} in the {title(role)}"
            for role, value in each["values"].items()
        )
        lines.append(f"{each['what']}: {stated}")
    for model in comparison["models"]:
        if model["fault"]:
            lines.append(f"the {title(model['role'])} {model['fault']}")
    for pair in comparison["pairs"]:
        lines.append(_sentence(pair))
    return lines


def _sentence(pair: Mapping[str, Any]) -> str:
    names = f"{title(pair['one'])} and {title(pair['other'])}"
    if not pair["compared"]:
        return f"{names}: no weight of equal shape, so no distance can be told"
    meaning = {
        "one origin": "they are of one origin",
        "something in common": "they have something in common, and lie far apart",
        "unrelated": "as unrelated weights would be",
    }[pair["verdict"]]
    return (
        f"{names}: {pair['compared']} weights of equal shape, relative distance "
        f"{_brief(pair['distance'])} (unrelated {_brief(pair['distance_unrelated'])}), cosine "
        f"{_brief(pair['cosine'])}; {meaning}"
    )


def _brief(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
