"""The results of tasks, also as plain data, so that a later run need not compute them again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lean_merge.methods import ExpertRecord


@dataclass(frozen=True, slots=True)
class Written:
    """The sums over the written rows that tell how much of an update storing kept.

    `along` is <stored change, update>, `squared` is ||update||_F^2.
    """

    along: float
    squared: float

    @property
    def kept(self) -> float | None:
        """Return the share of the update that rounding kept; None for one of zeros."""
        return self.along / self.squared if self.squared else None

    @classmethod
    def of(cls, parts: Sequence[Written]) -> Written:
        """Return the sum of all `parts`."""
        return cls(
            along=math.fsum(part.along for part in parts),
            squared=math.fsum(part.squared for part in parts),
        )


@dataclass(frozen=True, slots=True)
class Truncated:
    """The rank that an adapter keeps of an update, and the relative Frobenius error of the cut."""

    rank: int
    error: float


Stored = Written | Truncated | None
"""A record of what was kept of a stored update; None if nothing was lost or nothing stored."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """The place where a weight was analysed after the device ran out of memory, and its message."""

    place: str
    reason: str

    @property
    def on_cpu(self) -> bool:
        """Return whether the numbers are from the CPU's arithmetic instead of the device's."""
        return self.place == "cpu"


@dataclass(frozen=True, slots=True)
class WeightResult:
    """The result for one logical weight; `squared_norms` are those of its task vectors.

    `stored` tells what the sink kept of the update; it is None if no update was stored. `fallback`
    is None if the analysis went as planned.
    """

    name: str
    canonical: str
    experts: tuple[ExpertRecord, ...]
    merged: bool
    squared_norms: tuple[float, ...]
    stored: Stored
    passes: int
    fallback: Fallback | None = None


def decision_fields(record: ExpertRecord, *, rank: str) -> dict[str, Any]:
    """Return the decision on an expert as JSON has it, with its rank under the name `rank`."""
    return {
        "selected": record.selected,
        "reason": record.reason,
        "similarity_first": record.similarity_first,
        "similarity_max": record.similarity_max,
        "lambda": record.lambda_,
        "lambda_top_q": record.lambda_top_q,
        "lambda_doubt": record.lambda_doubt,
        rank: record.rank,
        "computed_rank": record.computed_rank,
        "omitted_share": record.omitted_share,
        "angle_error": record.angle_error,
    }


class Note(NamedTuple):
    """The record of a finished task.

    It holds the results for the weights of the task, the number of bytes that were read, and
    whether a tensor that was copied holds NaN or Inf.
    """

    weights: list[WeightResult]
    bytes_read: int = 0
    non_finite: bool = False


def to_note(note: Note) -> dict[str, Any]:
    """Write a task's results as JSON has them; numbers come back bit for bit."""
    weights, bytes_read, non_finite = note
    data: dict[str, Any] = _plain({"weights": [asdict(weight) for weight in weights]})
    data["bytes_read"] = bytes_read
    return data | ({"non_finite": True} if non_finite else {})


def from_note(note: Any) -> Note | None:
    """Read what `to_note` wrote; None for None."""
    if note is None:
        return None
    plain = _restored(note)
    weights = [_weight(each) for each in plain["weights"]]
    return Note(weights, plain["bytes_read"], plain.get("non_finite", False))


def _weight(data: dict[str, Any]) -> WeightResult:
    stored, fallback = data["stored"], data["fallback"]
    kind = Truncated if stored is not None and "rank" in stored else Written
    parts = {
        "experts": tuple(ExpertRecord(**each) for each in data["experts"]),
        "squared_norms": tuple(data["squared_norms"]),
        "stored": None if stored is None else kind(**stored),
        "fallback": None if fallback is None else Fallback(**fallback),
    }
    return WeightResult(**(data | parts))


def _plain(value: Any) -> Any:
    """Write NaN and infinity, for which JSON has no number, as {"float": "nan"}."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _restored(value: Any) -> Any:
    """Read what `_plain` wrote, with lists in the place of tuples."""
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {name: _restored(item) for name, item in value.items()}
    return [_restored(item) for item in value] if isinstance(value, list) else value
