"""What looking at a weight tells, apart from what is decided of it: evidence for many merges.

A method that can tell the two apart gathers once, at full accuracy, and decides as often as there
are thresholds, temperatures, stages or scales to try, without looking again.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from lean_merge.linalg import Pass, Products
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Method,
    Passes,
    WeightContext,
)
from lean_merge.methods.facts import Compared, Evidence, Factors, Facts, Portrait

P = TypeVar("P")
_CHUNK = 2048
"""Rows of images that are held in float64 at once."""


class EvidenceMethod(Method[P], abc.ABC):
    """A method that can gather evidence apart from deciding.

    Attributes
    ----------
    gathered_by : tuple of str
        The parameters that gathering depends on; the others only matter when it is decided.
    """

    gathered_by: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def gather(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Evidence]:
        """Ask for the passes that every later decision may need, and return the evidence."""

    @abc.abstractmethod
    def gathering_cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Memory and passes of `gather`, as `cost` gives those of `analyze`."""

    @abc.abstractmethod
    def most_stored(self, shape: tuple[int, int]) -> int:
        """The most directions that the evidence of a weight of `shape` has factors of."""

    @abc.abstractmethod
    def lacks(self, facts: Facts) -> str | None:
        """Why these facts do not suffice for a decision; None where they do."""

    @abc.abstractmethod
    def decide(self, evidence: Evidence) -> Decision:
        """What `analyze` would decide, from the evidence alone."""

    @abc.abstractmethod
    def settled(self, thresholds: Sequence[float]) -> EvidenceMethod[P]:
        """With a threshold for each expert in the place of those that are to be found."""

    @abc.abstractmethod
    def verdicts(self, facts: Facts) -> tuple[ExpertRecord, ...]:
        """The records of `decide`, but for the norms of updates, which take factors."""

    @abc.abstractmethod
    def compared(self, facts: Facts) -> tuple[Compared | None, ...]:
        """What of every expert decides whether it is selected; None where there is nothing."""

    @abc.abstractmethod
    def kept(self, facts: Facts) -> int:
        """How many directions the update of `decide` has."""

    @abc.abstractmethod
    def adds(self, facts: Facts) -> tuple[bool, ...]:
        """Which task vectors the update of `decide` adds whole, as `reads_task_vectors`."""

    @abc.abstractmethod
    def portrays(self, evidence: Evidence) -> tuple[Portrait | None, ...]:
        """What would become of each expert; None where a task vector is zero."""


class Gathering(Method[Any]):
    """Gathers as one method would, then decides as another does; looks again where that lacks any.

    Parameters
    ----------
    decider, gatherer
        Of the same kind. They are the same where nothing was gathered before.
    seed
        Of the gathering's random starts.
    """

    def __init__(
        self, decider: EvidenceMethod[Any], gatherer: EvidenceMethod[Any], seed: int
    ) -> None:
        super().__init__(decider.parameters)
        self._decider, self._gatherer, self._seed = decider, gatherer, seed

    def analyze(self, weight: WeightContext) -> Passes:
        """As the decider does, once it has the evidence."""
        evidence = yield from self._gatherer.gather(replace(weight, seed=self._seed))
        if self._decider.lacks(evidence.facts) is None:
            return self._decider.decide(evidence)
        del evidence
        return (yield from self._decider.analyze(weight))

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Of both, one after the other."""
        first = self._gatherer.gathering_cost(shape, item=item)
        again = self._decider.cost(shape, item=item)
        return AnalysisCost(
            workspace=max(first.workspace, again.workspace),
            widest=max(first.widest, again.widest),
            passes=first.passes + again.passes,
            usual_passes=first.usual_passes,
        )

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """The most of either way."""
        decided = self._decider.largest_rank(shape)
        return None if decided is None else max(decided, self._gatherer.most_stored(shape))

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """As the method that decides."""
        return self._decider.reads_task_vectors()


class Watching(Method[Any]):
    """Gathers, and says what would be decided: for an analysis, which merges nothing.

    Parameters
    ----------
    method
        Which gathers, judges and portrays.

    Attributes
    ----------
    method
        The same.
    """

    def __init__(self, method: EvidenceMethod[Any]) -> None:
        super().__init__(method.parameters)
        self.method = method

    def analyze(self, weight: WeightContext) -> Passes:
        """A decision without an update, with the evidence."""
        evidence = yield from self.method.gather(weight)
        evidence = replace(evidence, portraits=self.method.portrays(evidence))
        return Decision(self.method.verdicts(evidence.facts), evidence=evidence)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Of gathering; or of the evidence, with what portraits and storing it take."""
        cost = self.method.gathering_cost(shape, item=item)
        rank = self.method.most_stored(shape)
        evidence = (shape[1] + len(self.parameters) * shape[0]) * rank * 4
        copies = (shape[1] + shape[0] + 4 * _CHUNK) * rank * 4 + 4 * rank**2 * 8
        return replace(cost, workspace=max(cost.workspace, evidence + copies))

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """As many directions as are stored."""
        return self.method.most_stored(shape)


class Recalling(Method[Any]):
    """Decides from evidence that is at hand; no pass is made.

    Parameters
    ----------
    decider
        Whose `lacks` is None for `facts`.
    facts
        Of the weight.
    load
        Gives its factors, once it is the weight's turn.
    """

    def __init__(
        self, decider: EvidenceMethod[Any], facts: Facts, load: Callable[[], Factors]
    ) -> None:
        super().__init__(decider.parameters)
        self._decider, self._facts, self._load = decider, facts, load

    def analyze(self, weight: WeightContext) -> Passes:
        """No passes: all is known."""
        factors = self._load()
        decision = self._decider.decide(Evidence(self._facts, factors))
        return replace(
            decision, squared_norms=self._facts.squared_norms, recalled=factors.bytes_read
        )
        yield  # makes this a generator, as the protocol wants

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """The kept factors, read and put together."""
        kept, experts = self._decider.kept(self._facts), len(self.parameters)
        # Read as rows, turned, multiplied, their norms taken; those of the last are still written.
        held = (4 * shape[1] + (experts + 6) * shape[0]) * kept * 4
        selected = sum(record.selected for record in self._decider.verdicts(self._facts))
        recalled = (shape[1] + selected * shape[0]) * kept * 4
        return AnalysisCost(workspace=held, recalled=recalled)

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """That of the update, known already."""
        return None if any(self.reads_task_vectors()) else self._decider.kept(self._facts)

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Those that the update adds, known already."""
        return self._decider.adds(self._facts)
