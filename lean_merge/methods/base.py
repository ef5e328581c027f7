"""What a merge method is: parameters, an analysis that asks for passes, and a row-local update."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch

from lean_merge.linalg import Pass, Products
from lean_merge.methods.facts import Evidence
from lean_merge.methods.updates import Update

Passes = Generator[Sequence[Pass | None], Sequence[Products | None], "Decision"]
"""An analysis in progress: it asks each task vector for a pass, and ends in a decision."""


@dataclass(frozen=True, slots=True)
class WeightContext:
    """One logical weight as a method sees it; its numbers come through passes alone.

    The task vectors are, in this order, that of the MLLM and those of the experts, all [out, in].
    """

    name: str
    shape: tuple[int, int]
    seed: int
    dtype: torch.dtype
    """Arithmetic dtype of products with the task vectors."""
    device: torch.device
    squared_norms: Callable[[], Sequence[float]]
    """||task vector||_F^2, exact; known once the first pass is done."""
    parallel: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
    """map() in worker threads, for the small dense problems of several task vectors."""
    surveyed: Any = None
    """What the method's survey of all weights returned; None if it has none."""


@dataclass(frozen=True, slots=True)
class Survey:
    """A look at many weights together, before the first of them is decided.

    Attributes
    ----------
    key : hashable
        Weights whose methods' surveys have equal keys are looked at together.
    passes : int
        How often all their rows are read at most.
    look
        Begins a generator as `Method.analyze` is one, whose passes ask for `reduce` and `inner`
        alone. It is sent the sums over all those weights, and what it returns is given to each
        weight's `analyze`, as `WeightContext.surveyed`.
    """

    key: Hashable
    passes: int
    look: Callable[[], Generator[Sequence[Pass | None], Sequence[Products | None], Any]]


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """What the report says of one weight and one expert; the fields are explained in docs."""

    selected: bool
    reason: str
    similarity_first: float | None = None
    similarity_max: float | None = None
    lambda_: float | None = None
    lambda_top_q: float | None = None
    lambda_doubt: float | None = None
    rank: int | None = None
    computed_rank: int | None = None
    omitted_share: float | None = None
    angle_error: float | None = None
    gap: bool | None = None
    update_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one weight.

    Attributes
    ----------
    experts : tuple of ExpertRecord
        What the report says of each expert.
    update : Update or None
        What is added to the MLLM's weight; with None its bytes are copied.
    squared_norms : tuple of float
        Squared Frobenius norms of the task vectors, where no pass over them tells.
    evidence : Evidence, optional
        What the decision was made from, for an analysis that keeps it.
    recalled : int
        Bytes of stored evidence that were read for it.
    """

    experts: tuple[ExpertRecord, ...]
    update: Update | None = None
    squared_norms: tuple[float, ...] = ()
    evidence: Evidence | None = None
    recalled: int = 0


@dataclass(frozen=True, slots=True)
class AnalysisCost:
    """What the analysis of one logical weight costs.

    Attributes
    ----------
    workspace : int
        Bytes of sketches, spectra and their temporaries, at most.
    widest : int
        Columns of the widest block whose products are summed over the rows, Pass.gram's.
    passes : int
        Passes over the rows at most; 0 for a method that decides without looking.
    usual_passes : int
        Passes over a weight that is merged, where the data are as they usually are. What a merge
        will read is estimated with this number, and bounded with `passes`.
    recalled : int
        Bytes of stored evidence that are read.
    scratch : int
        `Update.scratch` at most: blocks of float32 that each worker lends for rows of the update.
    """

    workspace: int = 0
    widest: int = 0
    passes: int = 0
    usual_passes: int = 0
    recalled: int = 0
    scratch: int = 0


P = TypeVar("P")


def per_expert(default: Any, *, words: tuple[str, ...] = ()) -> Any:
    """A parameter that a recipe may give for each expert by itself; `words` may stand for it."""
    return field(default=default, metadata={"per_expert": True, "words": words})


class Method(abc.ABC, Generic[P]):
    """A merge method. A new one is a module in this folder with a subclass and `@register`.

    Parameters
    ----------
    parameters : sequence of P
        One for each expert: the common parameters with that expert's own put in.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    parameters_type: ClassVar[type[Any]]
    exact_differences: ClassVar[bool] = False
    """Whether task vectors are formed in float32, where the checkpoints' own dtype is narrower."""
    changes_by_itself: ClassVar[bool] = False
    """Whether a weight that no expert changes may get an update, for the MLLM's own sake."""
    multiplies: ClassVar[bool] = True
    """Whether `analyze` asks for products of matrices, for which it pays to use a GPU."""

    def __init__(self, parameters: Sequence[P]) -> None:
        self.parameters = tuple(parameters)

    @property
    def is_settled(self) -> bool:
        """Whether nothing of the parameters is to be found by an analysis of all weights."""
        return True

    @property
    def common(self) -> P:
        """The parameters that do not differ between experts."""
        return self.parameters[0]

    @abc.abstractmethod
    def analyze(self, weight: WeightContext) -> Passes:
        """Ask for the passes that the method needs, and return its decision."""

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Memory and passes of `analyze` for a weight of `shape`, at `item` bytes a product.

        By default none, which is right for a method that decides without a pass.
        """
        del shape, item
        return AnalysisCost()

    def survey(self) -> Survey | None:
        """The look at all weights that the method needs before it decides on any; None for none."""
        return None

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """The most that the rank of an update's factors can be for a weight of `shape`.

        None where updates have no factors, so that no adapter holds them.
        """
        del shape
        return None

    def update_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that an update of a weight of `shape` holds until it is written."""
        return sum(shape) * (self.largest_rank(shape) or 0) * 4

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Which task vectors' rows an update may need: the MLLM's, then each expert's."""
        return (False,) * (len(self.parameters) + 1)

    @classmethod
    def parameter_fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """The fields of the parameters' dataclass, in order."""
        return dataclasses.fields(cls.parameters_type)
