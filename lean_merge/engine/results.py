"""What happened to a weight, as plain data too, so that a later run need not compute it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lean_merge.engine.update import Truncated, Written
from lean_merge.methods import ExpertRecord


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
    stored: Written | Truncated | None
    passes: int
    fallback: Fallback | None = None


class Note(NamedTuple):
    """Of a task: its weights, how many bytes were read, and whether a copy holds NaN or Inf."""

    weights: list[WeightResult]
    bytes_read: int
    non_finite: bool


def to_note(
    weights: Sequence[WeightResult], bytes_read: int, non_finite: bool = False
) -> dict[str, Any]:
    """A task's results as JSON has them; numbers come back bit for bit."""
    note: dict[str, Any] = _plain({"weights": [asdict(weight) for weight in weights]})
    return note | {"bytes_read": bytes_read} | ({"non_finite": True} if non_finite else {})


def from_note(note: Any) -> Note | None:
    """What `to_note` was given; None if `note` is not of its making."""
    try:
        weights = [_weight(each) for each in note["weights"]]
        return Note(weights, int(note["bytes_read"]), bool(note.get("non_finite")))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _weight(data: dict[str, Any]) -> WeightResult:
    stored, fallback = data["stored"], data["fallback"]
    kind = None if stored is None else Truncated if "rank" in stored else Written
    return WeightResult(
        name=str(data["name"]),
        canonical=str(data["canonical"]),
        experts=tuple(ExpertRecord(**_numbers(each)) for each in data["experts"]),
        merged=bool(data["merged"]),
        squared_norms=tuple(_number(square) for square in data["squared_norms"]),
        stored=None if kind is None else kind(**_numbers(stored)),
        passes=int(data["passes"]),
        fallback=None if fallback is None else Fallback(**fallback),
    )


def _plain(value: Any) -> Any:
    """`value` with what JSON has no number for as {"float": "nan"}."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    return {name: _number(item) for name, item in data.items()}


def _number(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value
