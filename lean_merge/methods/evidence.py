"""Methods that gather evidence about a weight once and decide from it many times.

Such a method reads a weight once, at full accuracy. It can then decide for every threshold,
temperature, set of stages or scale that is tried, without reading the weight again.
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
"""At most this many rows of images are held in float64 at once."""


class EvidenceMethod(Method[P], abc.ABC):
    """A method that can gather evidence first and decide later.

    Attributes
    ----------
    gathered_by : tuple of str
        The parameters that gathering depends on; the others matter only for the decision.
    """

    gathered_by: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def gather(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Evidence]:
        """Ask for the passes that every later decision may need, and return the evidence."""

    @abc.abstractmethod
    def gathering_cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the memory and passes that `gather` needs, as `cost` does for `analyze`."""

    @abc.abstractmethod
    def most_stored(self, shape: tuple[int, int]) -> int:
        """Return how many directions the evidence of a weight of `shape` stores at most."""

    @abc.abstractmethod
    def lacks(self, facts: Facts) -> str | None:
        """Return why these facts do not suffice for a decision, or None if they do."""

    @abc.abstractmethod
    def decide(self, evidence: Evidence) -> Decision:
        """Decide from the evidence alone what `analyze` would decide."""

    @abc.abstractmethod
    def settled(self, thresholds: Sequence[float]) -> EvidenceMethod[P]:
        """Return this method with `thresholds`, one for each expert, in place of unknown ones."""

    @abc.abstractmethod
    def verdicts(self, facts: Facts) -> tuple[ExpertRecord, ...]:
        """Return the records of `decide` without the updates' norms, which need the factors."""

    @abc.abstractmethod
    def compared(self, facts: Facts) -> tuple[Compared | None, ...]:
        """Return what is compared with each expert's threshold; None where nothing is compared."""

    @abc.abstractmethod
    def kept(self, facts: Facts) -> int:
        """Return how many directions the update that `decide` returns has."""

    @abc.abstractmethod
    def adds(self, facts: Facts) -> tuple[bool, ...]:
        """Tell for each task vector, the MLLM's first, whether the update of `decide` reads it."""

    @abc.abstractmethod
    def portrays(self, evidence: Evidence) -> tuple[Portrait | None, ...]:
        """Describe the update that each expert would give; None where a task vector is zero."""


class Gathering(Method[Any]):
    """A method that gathers evidence with one method and decides with another.

    If the evidence does not suffice, the deciding method analyzes the weight itself.

    Parameters
    ----------
    decider, gatherer
        Two methods of the same kind. They are equal if no evidence was gathered before.
    seed
        The seed of the gathering's random starts.
    """

    def __init__(
        self, decider: EvidenceMethod[Any], gatherer: EvidenceMethod[Any], seed: int
    ) -> None:
        super().__init__(decider.parameters)
        self._decider, self._gatherer, self._seed = decider, gatherer, seed

    def analyze(self, weight: WeightContext) -> Passes:
        """Gather evidence and decide from it, or let the decider analyze if it does not suffice."""
        evidence = yield from self._gatherer.gather(replace(weight, seed=self._seed))
        if self._decider.lacks(evidence.facts) is None:
            return self._decider.decide(evidence)
        del evidence
        return (yield from self._decider.analyze(weight))

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of gathering followed by the decider's own analysis."""
        first = self._gatherer.gathering_cost(shape, item=item)
        again = self._decider.cost(shape, item=item)
        return AnalysisCost(
            workspace=max(first.workspace, again.workspace),
            widest=max(first.widest, again.widest),
            passes=first.passes + again.passes,
            usual_passes=first.usual_passes,
        )

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """Return the larger rank of the decider's updates and of the stored evidence."""
        decided = self._decider.largest_rank(shape)
        return None if decided is None else max(decided, self._gatherer.most_stored(shape))

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell which task vectors' rows the decider's update may need."""
        return self._decider.reads_task_vectors()


class Watching(Method[Any]):
    """A method for an analysis: it gathers evidence and reports the decision, but merges nothing.

    Parameters
    ----------
    method
        The method that gathers, decides and describes the updates.

    Attributes
    ----------
    method
        The method that was given.
    """

    def __init__(self, method: EvidenceMethod[Any]) -> None:
        super().__init__(method.parameters)
        self.method = method

    def analyze(self, weight: WeightContext) -> Passes:
        """Gather the evidence, and return it in a decision that has no update."""
        evidence = yield from self.method.gather(weight)
        evidence = replace(evidence, portraits=self.method.portrays(evidence))
        return Decision(self.method.verdicts(evidence.facts), evidence=evidence)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of gathering, or of storing the evidence if that needs more memory."""
        cost = self.method.gathering_cost(shape, item=item)
        rank = self.method.most_stored(shape)
        evidence = (shape[1] + len(self.parameters) * shape[0]) * rank * 4
        copies = (shape[1] + shape[0] + 4 * _CHUNK) * rank * 4 + 4 * rank**2 * 8
        return replace(cost, workspace=max(cost.workspace, evidence + copies))

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """Return how many directions the evidence stores at most."""
        return self.method.most_stored(shape)


class Recalling(Method[Any]):
    """A method that decides from stored evidence, without any pass.

    Parameters
    ----------
    decider
        The method that decides; its `lacks` must return None for `facts`.
    facts
        The stored facts of the weight.
    load
        Loads the weight's factors when the weight is analyzed.
    """

    def __init__(
        self, decider: EvidenceMethod[Any], facts: Facts, load: Callable[[], Factors]
    ) -> None:
        super().__init__(decider.parameters)
        self._decider, self._facts, self._load = decider, facts, load

    def analyze(self, weight: WeightContext) -> Passes:
        """Load the factors, and decide without asking for a pass."""
        factors = self._load()
        decision = self._decider.decide(Evidence(self._facts, factors))
        return replace(
            decision, squared_norms=self._facts.squared_norms, recalled=factors.bytes_read
        )
        yield  # makes this a generator, as the protocol wants

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of reading the kept factors and multiplying them."""
        kept, experts = self._decider.kept(self._facts), len(self.parameters)
        # The factors are read as rows, transposed and multiplied, and norms are taken of them,
        # while those of the previous weight are still being written.
        held = (4 * shape[1] + (experts + 6) * shape[0]) * kept * 4
        selected = sum(record.selected for record in self._decider.verdicts(self._facts))
        recalled = (shape[1] + selected * shape[0]) * kept * 4
        return AnalysisCost(workspace=held, recalled=recalled)

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """Return the rank of the update, which the facts already tell; None for a full rank."""
        return None if any(self.reads_task_vectors()) else self._decider.kept(self._facts)

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell which task vectors the update adds; the facts already decide that."""
        return self._decider.adds(self._facts)
