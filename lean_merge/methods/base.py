"""A merge method has parameters, an analysis that asks for passes, and an update local to rows."""

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

FAR = 0.5
"""If ||task vector|| / ||W_0|| is larger, the model was hardly tuned from this base."""


@dataclass(frozen=True, slots=True)
class WeightContext:
    """One logical weight as a method sees it; a method reads its numbers through passes only.

    The task vectors are all [out, in]; the MLLM's comes first, and the experts' follow.
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
    """The result of the method's survey of all weights; None if it has no survey."""
    over_update: Callable[[Update, Pass], Products] | None = None
    """Makes one pass over the rows of an update of this weight, on the CPU and in float32."""


@dataclass(frozen=True, slots=True)
class Survey:
    """A method's request to read many weights together before it decides on any of them.

    Attributes
    ----------
    key : hashable
        Weights whose methods' surveys have equal keys are surveyed together.
    passes : int
        All their rows are read at most this many times.
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
    """The report's entries on one weight and one expert; docs/formats.md explains the fields."""

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
    directions: int | None = None
    energy_kept: float | None = None
    factor: float | None = None
    gap: bool | None = None
    update_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision of a method on one weight.

    Attributes
    ----------
    experts : tuple of ExpertRecord
        The report's entries on each expert.
    update : Update or None
        The matrix that is added to the MLLM's weight; with None its bytes are copied.
    squared_norms : tuple of float
        Squared Frobenius norms of the task vectors, if the decision was made without a pass.
    evidence : Evidence, optional
        The evidence that the decision was made from, if an analysis keeps it.
    recalled : int
        Bytes of stored evidence that were read for this decision.
    """

    experts: tuple[ExpertRecord, ...]
    update: Update | None = None
    squared_norms: tuple[float, ...] = ()
    evidence: Evidence | None = None
    recalled: int = 0


@dataclass(frozen=True, slots=True)
class AnalysisCost:
    """The cost of the analysis of one logical weight.

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
    operations : float
        Arithmetic operations of decompositions that run on one core between the passes.
    """

    workspace: int = 0
    widest: int = 0
    passes: int = 0
    usual_passes: int = 0
    recalled: int = 0
    scratch: int = 0
    operations: float = 0.0


P = TypeVar("P")


def per_expert(default: Any, *, words: tuple[str, ...] = ()) -> Any:
    """Declare a parameter that a recipe may give for each expert separately.

    A recipe may write one of `words` in place of a number.
    """
    return field(default=default, metadata={"per_expert": True, "words": words})


class Method(abc.ABC, Generic[P]):
    """The base class of merge methods.

    To add a method, write a module in this folder that decorates a subclass with `@register`.

    Parameters
    ----------
    parameters : sequence of P
        One for each expert; it holds the common parameters and that expert's own.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    parameters_type: ClassVar[type[Any]]
    evidence: ClassVar[str] = "published"
    """Where it was measured, in a word or two: "published", or "published and here"."""
    exact_differences: ClassVar[bool] = False
    """If True, task vectors are formed in float32, even if the checkpoints' dtype is narrower."""
    differences: ClassVar[bool] = True
    """Whether the method works with task vectors W - W_0; else it is given the weights W themselves
    in their place."""
    changes_by_itself: ClassVar[bool] = False
    """If True, a weight that no expert changes may get an update too, as the MLLM changed it."""
    multiplies: ClassVar[bool] = True
    """True if `analyze` asks for products of matrices, for which it pays to use a GPU."""
    needs_mllm: ClassVar[bool] = False
    """True if the method makes no sense where the base receives and no MLLM has a task vector."""
    has_mllm: bool = True
    """False if the base receives. The first task vector is then zero, and no model's."""
    rule: str = ""
    """A sentence that says how this method merges what another is not made for; else empty."""

    def __init__(self, parameters: Sequence[P]) -> None:
        self.parameters = tuple(parameters)

    def check(self) -> None:
        """Raise RecipeError if parameters make no sense together, for as many models."""

    @property
    def models(self) -> int:
        """Return how many models' task vectors there are: the experts', and the MLLM's if any."""
        return len(self.parameters) + self.has_mllm

    @property
    def is_settled(self) -> bool:
        """Return whether all parameters are known, so that no analysis has to find any."""
        return True

    @property
    def common(self) -> P:
        """Return the first expert's parameters, to read those that do not differ by expert."""
        return self.parameters[0]

    def forms_exactly(self, shape: tuple[int, int]) -> bool:
        """Return whether the task vectors of a weight of `shape` are formed in float32.

        By default this is so for every weight or for none, as `exact_differences` says.
        """
        del shape
        return self.exact_differences

    @abc.abstractmethod
    def analyze(self, weight: WeightContext) -> Passes:
        """Ask for the passes that the method needs, and return its decision."""

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the memory and passes that `analyze` needs for a weight of `shape`.

        An entry of a product takes `item` bytes. By default the cost is zero, which is right for a
        method that decides without a pass.
        """
        del shape, item
        return AnalysisCost()

    def survey(self) -> Survey | None:
        """Return the survey of all weights that the method needs first; None if it needs none."""
        return None

    def largest_rank(self, shape: tuple[int, int]) -> int | None:
        """Return the largest rank that an update's factors can have for a weight of `shape`.

        It is None if updates have no factors, so that they cannot be stored as an adapter.
        """
        del shape
        return None

    def update_bytes(self, shape: tuple[int, int]) -> int:
        """Return how many bytes an update of a weight of `shape` holds until it is written."""
        return sum(shape) * (self.largest_rank(shape) or 0) * 4

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell for each task vector, the MLLM's first, whether an update may need its rows."""
        return (False,) * (len(self.parameters) + 1)

    def foreseen(self) -> tuple[float, ...]:
        """Return coefficients of task vectors whose sum is about as large as an update, or larger.

        From them it is foreseen, before any weight is decided, what rounding will keep.
        """
        return (0.0, *(getattr(own, "scale", 1.0) for own in self.parameters))

    def beside_matrices(self) -> Method[Any]:
        """Return the method for norms, biases, embeddings, heads, and whatever else is no matrix.

        That is this one, unless its analysis makes sense for matrices alone: see `LinearRule`.
        """
        return self

    def warnings(self, records: Sequence[ExpertRecord]) -> list[str]:
        """Return sentences on what the decisions on all weights should make a reader doubt."""
        del records
        return []

    @classmethod
    def parameter_fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """Return the fields of the parameters' dataclass, in order."""
        return dataclasses.fields(cls.parameters_type)
