"""What happened to a weight, as plain data too, so that a later run need not compute it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from lean_merge.methods import ExpertRecord
from lean_merge.tasks.task import CopyTask, WeightTask

_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,), "None": (type(None),)}
)
_PARTS = MappingProxyType({"experts": (), "squared_norms": (), "stored": None, "fallback": None})
"""What of a weight's result is more than one value, and what stands for it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What storing an update kept of it: sums over the rows written.

    `along` is <stored change, update>, `squared` is ||update||_F^2.
    """

    along: float
    squared: float

    @classmethod
    def of(cls, parts: Sequence[Written]) -> Written:
        """The sums over parts."""
        return cls(
            along=math.fsum(part.along for part in parts),
            squared=math.fsum(part.squared for part in parts),
        )


@dataclass(frozen=True, slots=True)
class Truncated:
    """What an adapter keeps of an update: its rank, and the relative Frobenius error of the cut."""

    rank: int
    error: float


Stored = Written | Truncated | None
"""What storing an update kept of it; None where nothing was lost or nothing stored."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """Where a weight was analysed because the device ran out of memory, and what that said."""

    place: str
    reason: str

    @property
    def on_cpu(self) -> bool:
        """Whether other arithmetic made the numbers."""
        return self.place == "cpu"


@dataclass(frozen=True, slots=True)
class WeightResult:
    """What happened to one logical weight; `squared_norms` are those of its task vectors.

    `stored` is what the sink kept of the update, None where it stored none. `fallback` is None
    where the analysis went as planned.
    """

    name: str
    canonical: str
    experts: tuple[ExpertRecord, ...]
    merged: bool
    squared_norms: tuple[float, ...]
    stored: Stored
    passes: int
    fallback: Fallback | None = None


class Note(NamedTuple):
    """Of a task: its weights, how many bytes were read, and whether a copy holds NaN or Inf.

    `expected` is how many bytes the plan foresees for what was decided.
    """

    weights: list[WeightResult]
    bytes_read: int = 0
    expected: int = 0
    non_finite: bool = False


def to_note(note: Note) -> dict[str, Any]:
    """A task's results as JSON has them; numbers come back bit for bit."""
    weights, bytes_read, expected, non_finite = note
    data: dict[str, Any] = _plain({"weights": [asdict(weight) for weight in weights]})
    data |= {"bytes_read": bytes_read, "expected": expected}
    return data | ({"non_finite": True} if non_finite else {})


def from_note(note: Any) -> Note | None:
    """What `to_note` was given; None if `note` is not of its making."""
    try:
        weights = [_weight(each) for each in note["weights"]]
        read, expected = int(note["bytes_read"]), int(note["expected"])
        return Note(weights, read, expected, bool(note.get("non_finite")))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def note_of(task: CopyTask | WeightTask, note: Any) -> Note | None:
    """`from_note`, if it is of `task`: of its weights and of as many experts."""
    found = from_note(note)
    if found is None or not found.weights:
        return found
    parts = task.weight.slices if isinstance(task, WeightTask) else ()
    told = [(w.name, w.canonical, len(w.experts), len(w.squared_norms)) for w in found.weights]
    wanted = [
        (task.tensor.name, part.canonical, len(part.experts), len(part.experts) + 1)
        for part in parts
    ]
    return found if told == wanted else None


def _weight(data: dict[str, Any]) -> WeightResult:
    stored, fallback = data["stored"], data["fallback"]
    kind: type[Written] | type[Truncated] = Written
    if stored is not None and "rank" in stored:
        kind = Truncated
    squares = tuple(_number(square) for square in data["squared_norms"])
    if not all(type(square) is float and not square < 0.0 for square in squares):
        raise ValueError("a squared norm is none")
    return replace(
        WeightResult(**_checked(WeightResult, {**data, **_PARTS})),
        experts=tuple(ExpertRecord(**_checked(ExpertRecord, each)) for each in data["experts"]),
        squared_norms=squares,
        stored=None if stored is None else kind(**_checked(kind, stored)),
        fallback=None if fallback is None else Fallback(**_checked(Fallback, fallback)),
    )


def _checked(kind: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    """Values for a dataclass, which a journal may not have from us. TypeError, ValueError."""
    values = {name: _number(item) for name, item in data.items()}
    for each in fields(kind):
        if each.name in _PARTS:
            continue
        value = values.get(each.name, each.default)
        allowed = [each_kind for word in str(each.type).split(" | ") for each_kind in _KINDS[word]]
        if type(value) not in allowed:
            raise TypeError(f"{each.name} is no {each.type}")
        # Half of a surrogate pair fits no file, and some integers are no float.
        value.encode() if isinstance(value, str) else float(value or 0)
    return values


def _plain(value: Any) -> Any:
    """`value` with what JSON has no number for as {"float": "nan"}."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _number(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value
