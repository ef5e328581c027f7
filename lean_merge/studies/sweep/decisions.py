"""Find the decisions on all weights at one point of a sweep, before a byte is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lean_merge.engine import run
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Decision
from lean_merge.outputs.base import ReadRows, Sink
from lean_merge.plan import Plan
from lean_merge.tasks import WeightTask


class DigestSink(Sink):
    """A sink that keeps a digest of the decision on each logical weight."""

    def __init__(self) -> None:
        self.digests: dict[str, tuple[bytes, ...]] = {}

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> None:
        """Keep the digest of the decision."""
        name, update = task.tensor.name, decision.update
        digest = b"" if update is None else update.digest()
        self.digests[name] = (*self.digests.get(name, ()), digest)


@dataclass(frozen=True, slots=True)
class Decisions:
    """The decisions at one point of a sweep.

    Attributes
    ----------
    digests
        The digests of each part of each tensor in scope, by the tensor's name. Where they are
        equal, so are the bytes of the output.
    selected
        The number of logical weights for which at least one expert is selected.
    update_norm
        The root of the sum of the squared norms of all updates.
    """

    digests: Mapping[str, tuple[bytes, ...]]
    selected: int
    update_norm: float

    @property
    def digest(self) -> str:
        """Return the digest of all decisions; points with equal outputs have the same."""
        whole = hashlib.sha256()
        for name, parts in sorted(self.digests.items()):
            whole.update(repr((name, parts)).encode())
        return whole.hexdigest()

    @property
    def changes_nothing(self) -> bool:
        """Return whether no weight has an update."""
        return not any(map(any, self.digests.values()))


def decide(plan: Plan) -> Decisions:
    """Carry out `plan` without an output."""
    sink = DigestSink()
    result = run(plan, sink, lambda event: None)
    selected = [[r for r in weight.experts if r.selected] for weight in result.weights]
    norms = [record.update_norm or 0.0 for records in selected for record in records]
    return Decisions(
        digests=sink.digests,
        selected=sum(map(bool, selected)),
        update_norm=math.sqrt(sum(norm**2 for norm in norms)),
    )
