"""Look at a few rows of every role before anything is written, and judge whether they fit.

Names and shapes fit between models that have nothing to do with each other. Numbers tell: tuning
changes a row by a few hundredths of its norm, and a row of another model, or another row of the
same model, differs from it by more than its norm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, WeightSource, torch_dtype
from lean_merge.checkpoints.rows import DifferenceRows, fresh_buffer
from lean_merge.engine.workers import worker_pool
from lean_merge.errors import CoverageError
from lean_merge.linalg.settings import Computing
from lean_merge.mapping import LogicalWeight, stated_heads
from lean_merge.mapping.orders import order_finder
from lean_merge.methods import FAR
from lean_merge.plan import Plan
from lean_merge.tasks import kind_of

SURELY_FAR = 0.6
"""A role is refused beyond this median of ||task vector|| / ||W_0||, since a sample errs."""
ELSEWHERE = 0.25
"""If this share of rows differs by more than its norm, the base's layer is searched for them."""
SHARED = 0.4
"""From this cosine on, two task vectors have more in common than tunings of one base have."""
EXACTLY = 0.03
"""Within this, one task vector's component along another is taken for all of that other."""


@dataclass(frozen=True, slots=True)
class EarlyLook:
    """The result of the early look.

    Attributes
    ----------
    warnings
        Sentences for people.
    bytes_read
        Bytes of tensors that were read.
    squares
        The mean square of the MLLM's numbers, by kind of weight.
    kept
        The share of updates, as large as foreseen, that rounding to the output's dtype would keep;
        None if nothing is rounded to nearest.
    """

    warnings: tuple[str, ...]
    bytes_read: int
    squares: Mapping[str, float]
    kept: float | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """Rows of one weight in float64: of the base, and by role of task vectors and of their origins.

    An origin is what a role was tuned from: the base, or an expert's own parent. An adapter has
    none, since its task vector is all that is stored.
    """

    weight: LogicalWeight
    rows: Sequence[int]
    base: Tensor
    task_vectors: Sequence[Tensor]
    origins: Sequence[Tensor | None]


_Listener = Callable[[EarlyLook], None]
ON_LOOK: ContextVar[_Listener] = ContextVar("ON_LOOK", default=lambda look: None)
"""A function that is given the early look of a merge, before anything is written."""


def early_look(plan: Plan, *, refuse: bool = True) -> EarlyLook:
    """Read the plan's sample of every role, and judge it.

    Raises
    ------
    CoverageError
        With `refuse`, a role was surely not tuned from the base, or its rows are in another order.
        A recipe with `force` gets a warning instead.
    CheckpointError
        A file cannot be read.
    """
    with Computing(), TensorReader() as reader:
        # Most of the time that rows take from other machines is spent waiting.
        with worker_pool(16 if plan.arrivals.memory else plan.workers) as workers:
            found = workers.map(lambda part: _read(*part, reader), plan.sample)
        seen = [each for each in found if each is not None]
        read = reader.bytes_read
        warnings = []
        for role, source in enumerate((plan.mllm, *plan.experts)):
            fault, is_sure = _fault(plan, seen, role, reader)
            if is_sure and refuse and not plan.recipe.force:
                raise CoverageError(f"{source.source}: {fault}, or go on with --force.")
            if fault:
                warnings.append(f"{source.source}: {fault}.")
        warnings += itertools.chain.from_iterable(
            _relations(seen, number) for number in range(1, len(plan.experts) + 1)
        )
        look = EarlyLook(tuple(warnings), read, _mean_squares(seen), _kept(plan, seen))
    ON_LOOK.get()(look)
    return look


def _read(weight: LogicalWeight, blocks: Sequence[slice], reader: TensorReader) -> _Seen | None:
    """Read blocks of rows of every role; None if they hold what is no number."""
    loaded = weight.load(reader)
    base = _rows(loaded.base, blocks, reader)
    vectors, origins = [], []
    for source in loaded.others:
        origin: Tensor | None = None if source.is_difference else base
        whole = source
        if isinstance(source, DifferenceRows):
            origin, whole = _rows(source.parent, blocks, reader), source.own
        rows = _rows(whole, blocks, reader)
        vectors.append(rows if origin is None else rows - origin)
        origins.append(origin)
    if not all(bool(torch.isfinite(each).all()) for each in (base, *vectors)):
        return None
    numbers = [row for block in blocks for row in range(block.start, block.stop)]
    return _Seen(weight, numbers, base, vectors, origins)


def _origin(weight: LogicalWeight, role: int) -> WeightSource:
    """Return the rows of the model that a role was tuned from."""
    source = weight.others[role]
    return source.parent if isinstance(source, DifferenceRows) else weight.base


def _rows(source: WeightSource, blocks: Sequence[slice], reader: TensorReader) -> Tensor:
    read = [source.read(rows, reader, fresh_buffer, "look").to(torch.float64) for rows in blocks]
    return torch.cat(read)


def _name(role: int) -> str:
    return f"expert {role}" if role else "MLLM"


def _distances(seen: _Seen, role: int) -> Iterator[float]:
    """Yield the distance of every row from its origin's, in norms of the origin's row."""
    origin = seen.origins[role]
    assert origin is not None
    norms = origin.norm(dim=1).tolist()
    changes = seen.task_vectors[role].norm(dim=1).tolist()
    for norm, change in zip(norms, changes, strict=True):
        yield change / norm if norm else 0.0


def _fault(plan: Plan, seen: Sequence[_Seen], role: int, reader: TensorReader) -> tuple[str, bool]:
    """Say why a role's rows are not its origin's rows after tuning, or "", and if that is sure."""
    whole = [(each, origin) for each in seen if (origin := each.origins[role]) is not None]
    words, hint = "base", "pass the model that it was tuned from as the base"
    if role and role in plan.parents:
        words, hint = "parent", "pass the model that it was tuned from as its parent"
    by_kind: dict[str, list[_Seen]] = {}
    for each, _ in whole:
        by_kind.setdefault(kind_of(each.weight.canonical), []).append(each)
    elsewhere = {}
    for kind, group in by_kind.items():
        distances = [d for each in group for d in _distances(each, role)]
        if sum(d > 1 for d in distances) > ELSEWHERE * len(distances):
            elsewhere[kind] = group[0]
    kinds = ", ".join(sorted({kind.rpartition(".")[2] for kind in elsewhere}))
    for each in elsewhere.values():
        order = _order(plan, each, role, reader)
        if order is not None:
            text = (
                f"the {_name(role)} has rows of {kinds} in another order than the {words}, for "
                f"{order}"
            )
            return text, True
    ratios = [
        float(each.task_vectors[role].norm() / origin.norm())
        for each, origin in whole
        if bool(origin.any())
    ]
    ratio = median(ratios) if ratios else 0.0
    if ratio > FAR:
        return (
            f"the {_name(role)} was hardly tuned from this {words}: it differs from it by "
            f"{ratio:.2f} of the {words}'s norm in the median, where tuning leaves a few "
            f"hundredths; {hint}"
        ), ratio > SURELY_FAR
    if elsewhere:
        text = f"the {_name(role)} has rows of {kinds} that are far from those of the {words}"
        return text, False
    return "", False


def _relations(seen: Sequence[_Seen], expert: int) -> Iterator[str]:
    """Yield what equality and angles of the task vectors say of the MLLM and an expert."""
    pairs = [(each.task_vectors[0], each.task_vectors[expert]) for each in seen]
    mllm, other = (sum(float((pair[k] ** 2).sum()) for pair in pairs) for k in (0, 1))
    inner = sum(float((first * second).sum()) for first, second in pairs)
    name = _name(expert)
    if not seen:
        return
    # Without an MLLM the base receives, and there is nothing to exchange.
    alone = seen[0].weight.mllm is seen[0].weight.base
    if not mllm and expert == 1 and not alone:
        yield "The MLLM's language model equals the base in every row that was looked at."
    if not other:
        yield (
            f"The {name} equals the base in every row that was looked at, so there is nothing of "
            "it to merge."
        )
    if not mllm or not other:
        return
    if all(torch.equal(first, second) for first, second in pairs):
        yield f"The {name} equals the MLLM's language model in every row that was looked at."
    elif abs(inner / other - 1) < EXACTLY:
        yield (
            f"The MLLM differs from the base by all that the {name} differs by, and more: base and "
            f"{name} look exchanged, or the MLLM was tuned from the {name}."
        )
    elif abs(inner / mllm - 1) < EXACTLY:
        yield (
            f"The {name} differs from the base by all that the MLLM differs by, and more: base and "
            f"MLLM look exchanged, or the {name} was tuned from the MLLM."
        )
    elif inner > SHARED * math.sqrt(mllm * other):
        yield (
            f"The task vectors of MLLM and {name} have a cosine of "
            f"{inner / math.sqrt(mllm * other):.2f}: both seem to be tuned from another model than "
            "this base."
        )


def _kept(plan: Plan, seen: Sequence[_Seen]) -> float | None:
    if not plan.output.writes_rows or plan.recipe.rounding != "nearest":
        return None
    along = squared = 0.0
    for each in seen:
        dtype = torch_dtype(plan.output.tensors[each.weight.mllm.name].dtype)
        factors = plan.output.methods[each.weight.canonical].foreseen()
        pairs = zip(factors, each.task_vectors, strict=True)
        update = torch.stack([factor * rows for factor, rows in pairs]).sum(dim=0)
        before = each.base + each.task_vectors[0]
        change = (before + update).to(dtype).to(torch.float64) - before
        along += float((change * update).sum())
        squared += float((update**2).sum())
    return along / squared if squared else None


def _mean_squares(seen: Sequence[_Seen]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for each in seen:
        square = float(((each.base + each.task_vectors[0]) ** 2).mean())
        found.setdefault(kind_of(each.weight.canonical), []).append(square)
    return {kind: sum(squares) / len(squares) for kind, squares in found.items()}


def _order(plan: Plan, seen: _Seen, role: int, reader: TensorReader) -> str | None:
    """Say in which order a role's rows are; None if they are not rows of its origin's layer."""
    parent, _, own = seen.weight.canonical.rpartition(".")
    near = {
        part.canonical.rpartition(".")[2]: _origin(part, role)
        for weight in plan.coverage.weights
        for part in weight.slices
        if part.canonical.rpartition(".")[0] == parent and part.shape[1] == seen.weight.shape[1]
    }
    far = [n for n, distance in enumerate(_distances(seen, role)) if distance > 1]
    origin = seen.origins[role]
    assert origin is not None
    rows = (origin + seen.task_vectors[role])[far]
    checkpoint = (plan.mllm, *plan.experts)[role]
    return order_finder()(
        own,
        getattr(seen.weight.others[role], "own", seen.weight.others[role]),
        {seen.rows[n]: row for n, row in zip(far, rows, strict=True)},
        near,
        stated_heads(checkpoint) or stated_heads(plan.base),
        reader,
    )
