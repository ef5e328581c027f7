"""Everything that is measured: how each merged model is made, by group and name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lean_merge.demo.tasks import Task
from reproduction import oracles
from reproduction.exam import Weights
from reproduction.family import TaskVectors, added
from reproduction.grids import GRIDS, WHY_LIMIT

SUMS: tuple[Task, ...] = ("text_sums", "picture_sums")
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STAGE_SETS = {
    "select": ("select",),
    "select, rescale": ("select", "rescale"),
    "select, project": ("select", "project"),
}
"""The paper's Table 5 without its last row, all three, which the threshold sweep measures."""
TEMPERATURES = (1.0, 4.0, 8.0, 16.0, 64.0, 128.0)
RELATIVE_TEMPERATURES = (0.0, 2.0, 8.0, 32.0)
SCALES = (2.0, 4.0, 8.0, 16.0)
RANKS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = "base shown three sums"
"""The base with solved sums before the question: for families whose base knows of no worksheets."""


@dataclass(frozen=True)
class Candidate:
    """One model to measure.

    Attributes
    ----------
    group, name
        Where its figures stand in the results.
    make
        Its language model's weights in scope.
    exam : {"mllm", "base", "expert"}
        Whose embeddings, and whose vision if any, stand around them.
    tasks
        None for all.
    limit
        The first so many problems, or all.
    """

    group: str
    name: str
    make: Callable[[TaskVectors], Weights]
    exam: str = "mllm"
    tasks: tuple[Task, ...] | None = None
    limit: int | None = None


# --- how models are made ------------------------------------------------------------------


def role(name: str, family: TaskVectors) -> Weights:
    """One of the family's own models."""
    return {"base": family.base, "mllm": family.mllm, "expert": family.expert}[name]


def ip(family: TaskVectors, **parameters: object) -> Weights:
    """IP-Merging by lean-merge; the names of parameters are the recipe's."""
    return family.merged("ip_merging", **parameters)


def automatic(family: TaskVectors) -> Weights:
    """IP-Merging at the threshold that `auto` is for this family."""
    return ip(family, threshold=family.survey["auto"])


def oracle(make: Callable[[TaskVectors], oracles.Updates], family: TaskVectors) -> Weights:
    """The MLLM with an oracle's updates."""
    return family.plus(make(family))


def base_with(make: Callable[[TaskVectors], oracles.Updates], family: TaskVectors) -> Weights:
    """The base with an oracle's updates."""
    return added(family.base, make(family))


def stretched(whole: bool, family: TaskVectors, **parameters: object) -> Weights:
    """IP-Merging's update made as long as lambda dM, over `whole` the model or weight by weight."""
    update = oracles.difference(ip(family, **parameters), family.mllm)
    touched = [name for name, each in update.items() if float(each.norm()) > 0]
    wanted = oracles.rescaled(family, touched)
    if whole:
        factor = oracles.norm(wanted) / oracles.norm(update)
        return family.plus({name: factor * update[name] for name in touched})
    return family.plus(oracles.as_long_as({n: update[n] for n in touched}, wanted))


def stretched_random(count: int, family: TaskVectors) -> Weights:
    """dM on random directions, made as long as lambda dM weight by weight."""
    wanted = oracles.rescaled(family, family.base)
    return family.plus(oracles.as_long_as(oracles.inside_random(family, count), wanted))


def chosen(order: str, count: int, family: TaskVectors) -> Weights:
    """lambda dM of the `count` weights with the largest or smallest s_1, or of random ones."""
    names = list(family.base)
    if order == "largest":
        names.sort(key=lambda n: -float(family.similarity[n][0]))
    elif order == "smallest":
        names.sort(key=lambda n: float(family.similarity[n][0]))
    else:
        generator = torch.Generator().manual_seed(int(order))
        names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    return family.plus(oracles.rescaled(family, names[:count]))


def single(index: int, kind: str, family: TaskVectors) -> Weights:
    """One weight alone: lambda dM whole, or IP-Merging's update of it."""
    name = list(family.base)[index]
    if kind == "whole":
        return family.plus(oracles.rescaled(family, [name]))
    return family.plus({name: family.update[name]})


# --- the list -----------------------------------------------------------------------------


def candidates(weights: int) -> list[Candidate]:
    """All of them, for families with so many weights in scope; the MLLM itself comes first."""
    found = [
        Candidate("models", "mllm", partial(role, "mllm")),
        Candidate("models", "base", partial(role, "base"), exam="base"),
        Candidate("models", "expert", partial(role, "expert"), exam="expert"),
    ]
    for grid in GRIDS:
        for value in grid.values:
            make = partial(grid.merged, value)
            found.append(Candidate(grid.group, f"{value:g}", make, limit=grid.limit))
    for threshold in THRESHOLDS:
        make = partial(ip, threshold=threshold)
        found.append(Candidate("threshold", f"{threshold:g}", make))
    found.append(Candidate("threshold auto", "auto", automatic))
    for title, stages in STAGE_SETS.items():
        for threshold in THRESHOLDS[:7]:
            make = partial(ip, threshold=threshold, stages=stages)
            found.append(Candidate(f"stages: {title}", f"{threshold:g}", make))
    found += _options()
    return found + _oracles() + _singles(weights)


def _options() -> list[Candidate]:
    """The parameters beside the threshold, at the default threshold and with all selected."""
    found = []
    for threshold in (0.4, 0.0):
        for tau in TEMPERATURES:
            make = partial(ip, threshold=threshold, temperature=tau)
            found.append(
                Candidate(
                    f"temperature at {threshold:g}", f"{tau:g}", make, tasks=SUMS, limit=WHY_LIMIT
                )
            )
        for tau in RELATIVE_TEMPERATURES:
            make = partial(ip, threshold=threshold, temperature=tau, importance="relative")
            found.append(
                Candidate(
                    f"relative at {threshold:g}", f"{tau:g}", make, tasks=SUMS, limit=WHY_LIMIT
                )
            )
        for scale in SCALES:
            make = partial(ip, threshold=threshold, scale=scale)
            found.append(Candidate(f"scale at {threshold:g}", f"{scale:g}", make, limit=WHY_LIMIT))
    for threshold in (0.3, 0.4, 0.5, 0.6):
        make = partial(ip, threshold=threshold, select_by="max")
        found.append(
            Candidate("select_by: max", f"{threshold:g}", make, tasks=SUMS, limit=WHY_LIMIT)
        )
    for threshold in (0.0, 0.4):
        other = partial(ip, threshold=threshold, nuclear="top_q")
        found.append(
            Candidate("nuclear: top_q", f"{threshold:g}", other, tasks=SUMS, limit=WHY_LIMIT)
        )
        weighed = partial(ip, threshold=threshold, similarity_weight="sigma")
        found.append(
            Candidate(
                "similarity_weight: sigma", f"{threshold:g}", weighed, tasks=SUMS, limit=WHY_LIMIT
            )
        )
        stored = partial(ip, threshold=threshold, out_dtype="auto")
        found.append(
            Candidate("stored in bf16", f"{threshold:g}", stored, tasks=SUMS, limit=WHY_LIMIT)
        )
    return found


def _oracles() -> list[Candidate]:
    """Updates that tell which step costs what."""
    text: tuple[Task, ...] = ("text_sums",)
    found = []
    for rank in RANKS:
        cut = partial(oracles.leading, rank=rank)
        on_base = partial(base_with, cut)
        found.append(
            Candidate("base + dM cut to rank", str(rank), on_base, "base", text, WHY_LIMIT)
        )
        for group, make in {
            "dM cut to rank": cut,
            "dM without its leading directions": partial(oracles.trailing, rank=rank),
            "dM on the MLLM's leading directions": partial(oracles.inside, count=rank),
            "dM on random directions": partial(oracles.inside_random, count=rank),
        }.items():
            found.append(
                Candidate(group, str(rank), partial(oracle, make), tasks=SUMS, limit=WHY_LIMIT)
            )
    for threshold in (0.0, 0.4):
        each = partial(stretched, False, threshold=threshold)
        found.append(
            Candidate(
                "update as long as lambda dM", f"each weight, {threshold:g}", each, limit=WHY_LIMIT
            )
        )
        whole = partial(stretched, True, threshold=threshold)
        found.append(
            Candidate(
                "update as long as lambda dM", f"the whole, {threshold:g}", whole, limit=WHY_LIMIT
            )
        )
    for count in (1, 4, 16):
        make = partial(stretched_random, count)
        found.append(
            Candidate("random directions as long as lambda dM", str(count), make, limit=WHY_LIMIT)
        )
    for count in (4, 8, 14):
        for order in ("largest", "smallest", "1", "2", "3"):
            title = order if order.isalpha() else f"random {order}"
            chosen_by = partial(chosen, order, count)
            found.append(
                Candidate(
                    "lambda dM of", f"{count} {title}", chosen_by, tasks=SUMS, limit=WHY_LIMIT
                )
            )
    return found


def _singles(weights: int) -> list[Candidate]:
    """One weight at a time, by the loss on fewer problems."""
    return [
        Candidate(
            f"one weight: {kind}",
            str(i),
            partial(single, i, kind),
            "mllm",
            ("text_sums",),
            WHY_LIMIT,
        )
        for kind in ("whole", "update")
        for i in range(weights)
    ]
