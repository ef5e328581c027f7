"""What an output is: one class for each kind, of which a plan holds an instance; and its sink."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lean_merge.checkpoints import (
    Checkpoint,
    TensorReader,
    TensorSpec,
    WeightSource,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Decision, Method
from lean_merge.outputs.gathered import RecordedEvidence
from lean_merge.recipe import MergeRecipe
from lean_merge.store import Difference, OutputFolder, OutputTensor, Shard, WriteBytes
from lean_merge.tasks import CopyTask, Stored, WeightResult, WeightTask

DECODED_DTYPE = torch.bfloat16
"""What weights that are stored with scales are written in unless the recipe says otherwise."""
RECIPE = "lean_merge_recipe.yml"
"""The file in which an output tells its recipe."""
ReadRows = Callable[[WeightSource, slice], Tensor]
"""Reads rows of a weight as one role stores it; they are valid until the next call."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a plan knows when it asks for an output.

    Attributes
    ----------
    recipe, mllm
        What the user asked for, and the checkpoint whose tensors are written.
    prefix : str
        What the names of the MLLM's language model begin with, up to and with "layers.".
    weights : tuple of MappedWeight
        The MLLM's tensors in scope.
    methods : Mapping
        The method of each logical weight by its canonical name; none of one that is filtered out.
    """

    recipe: MergeRecipe
    mllm: Checkpoint
    prefix: str
    weights: tuple[MappedWeight, ...]
    methods: Mapping[str, Method[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run tells the output that it ends.

    Attributes
    ----------
    facts
        Recipe, inputs and environment, as the journal has them.
    report
        The report, as JSON has it.
    weights
        What happened to each logical weight, in the order of the tasks.
    """

    facts: Mapping[str, Any]
    report: Mapping[str, Any]
    weights: Sequence[WeightResult]


class Output(abc.ABC):
    """What a merge makes. A new kind is a module in this folder with a subclass and `@register`.

    Parameters
    ----------
    request
        What is asked for. A kind raises RecipeError where it cannot hold that.
    """

    name: ClassVar[str]
    """What recipes call it."""
    in_recipes: ClassVar[bool] = True
    """Whether a recipe may ask for it. Other kinds are asked for by the function that is called."""
    needs_folder: ClassVar[bool] = True
    writes_rows: ClassVar[bool] = False
    """Whether the MLLM's rows are read once more and written, and other tensors are copied."""
    samples_base: ClassVar[bool] = False
    """Whether the first rows of the base's weights are read too."""
    in_pairs: ClassVar[bool] = True
    """Whether two weights may be analysed at a time."""
    most_waiting: ClassVar[int] = 0
    """How many updates may wait to be stored, given memory, while the next is found."""
    may_be_empty: ClassVar[bool] = True
    """Whether it can be made where no weight gets an update."""
    done: ClassVar[str] = "merged"
    """What was done with the weights that get one, in a word."""
    exact: ClassVar[bool] = True
    """Whether `bytes_written` is what is written, and not the most that it can be."""
    is_model: ClassVar[bool] = True
    """Whether it is a model, or tells of one, that may run code which comes with the MLLM."""
    called: ClassVar[str] = ""
    """What its journal calls it, so that it is not mistaken for a merge of the same recipe."""
    compares: ClassVar[bool] = False
    """Whether `comparison` can compare it with a merge that is made again."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.recipe = request.recipe
        self.mllm = request.mllm
        self.prefix = request.prefix
        self.weights = request.weights
        self.methods = request.methods

    @classmethod
    def check(cls, recipe: MergeRecipe) -> None:
        """Raise RecipeError where a recipe cannot have this kind, before any file is opened."""
        del recipe

    @classmethod
    def open(cls, folder: Path, *, own: bool = False) -> RecordedEvidence:
        """Open a complete output that holds evidence, for a merge to decide from.

        `own` tells that the merge made it for itself. Raises CheckpointError for a damaged one.
        """
        raise NotImplementedError

    # --- what is laid out ---------------------------------------------------------------------

    @cached_property
    def tensors(self) -> Mapping[str, OutputTensor]:
        """The MLLM's tensors by name, in its order, with the dtypes in which they are written."""
        in_scope = {weight.mllm.name for weight in self.weights}
        wanted = self.recipe.out_dtype
        found = {}
        for name, spec in self.mllm.tensors.items():
            dtype, size = spec.dtype, spec.nbytes
            chosen: torch.dtype | None = None
            if wanted != "auto" and (name in in_scope or name in self.mllm.encodings):
                chosen = dtype_named(wanted)
            elif name in self.mllm.encodings:
                chosen = DECODED_DTYPE
            if chosen is not None:
                dtype = safetensors_dtype(chosen)
                size = spec.nbytes // torch_dtype(spec.dtype).itemsize * chosen.itemsize
            found[name] = OutputTensor(name, dtype, spec.shape, size)
        return found

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The weight files whose layout is known before the run."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for people, in sentences."""
        return ()

    # --- what it takes ------------------------------------------------------------------------

    @property
    def bytes_written(self) -> int:
        """Bytes of all weight files, at most."""
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_on_disk(self) -> int:
        """The most bytes that its files take while it is made."""
        return self.bytes_written

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that it holds all the time."""
        return 0

    @staticmethod
    def storing_bytes(rank: int) -> int:
        """Bytes of memory that it takes to store an update of at most `rank`.

        They are taken once the analysis has let go of its own.
        """
        del rank
        return 0

    @staticmethod
    def waiting_bytes(update: int, rank: int, kept: int) -> int:
        """Bytes that updates hold while the next weight is analysed.

        Parameters
        ----------
        update, rank
            The most bytes that the update of a weight holds, and the most that its rank can be.
        kept
            Bytes that are kept beside the rows of such a weight.
        """
        return 0

    def described(self, *, written: int, disk: int) -> str:
        """Describe it for people, in a few words."""
        return self.name

    # --- how it is made -----------------------------------------------------------------------

    @abc.abstractmethod
    def sink(self, folder: OutputFolder | None) -> Sink:
        """Give what takes the results of a run; `folder` is None if the output needs none."""

    def lay_out(self, folder: OutputFolder, tasks: Sequence[WeightTask]) -> None:
        """Write the files that only a whole run can lay out. Raises OutputError, BudgetError."""
        del folder, tasks

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write all files beside the weights. Raises OutputError, BudgetError, CheckpointError."""
        del folder, outcome

    # --- what is there once it is complete ----------------------------------------------------

    def names(self, task: CopyTask | WeightTask) -> tuple[str, ...]:
        """Name the tensors that come of a task."""
        return (task.tensor.name,)

    def can_hold(self, names: Set[str]) -> bool:
        """Tell whether a complete output may consist of the tensors of these names."""
        return names == {name for shard in self.shards for name in shard.offsets}

    def comparison(
        self,
        tasks: Sequence[CopyTask | WeightTask],
        *,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> Comparison:
        """Give what compares a complete output with a merge that is made again.

        Parameters
        ----------
        tasks
            Those of the plan.
        stored, reader
            The output's tensors whose bytes are as they were written, and what reads them.
        sampled
            Names of the tensors in scope that are to be merged again.
        """
        raise NotImplementedError


class Sink:
    """Takes the results of a merge, task by task in the order of the plan.

    The engine computes; a sink only stores. Where it gives a writer for a task, the engine reads
    the MLLM's rows, adds the update and writes the tensor's bytes through it, from several threads.
    Where it gives none, no row is read again, and the sink keeps of the update itself what it
    wants. This class stores nothing at all.
    """

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes | None:
        """Give what writes the bytes of a tensor; None where they are not wanted.

        It is asked for once for a tensor out of scope, and once for each logical weight of another.
        """
        del task
        return None

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Stored:
        """Store the update of `weight`, one of those of `task`, where there is no writer."""
        return None

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Tell what `finish` was given by an interrupted run whose bytes are used; None if nothing.

        The engine then does nothing else for the task.
        """
        del task
        return None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Take note that a task is stored as a whole; tasks are finished in their order.

        `note` is what `finished` will tell of it, as JSON has it.
        """
        return

    def take(self) -> Tensor:
        """Give the tensor of the last task, if tensors are made in memory."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send to the disk what was written so far; called from a thread of its own.

        Raises OutputError or BudgetError where the disk refuses.
        """
        return


class Comparison(Sink):
    """Compares what a merge gives with what a complete output holds, and stores nothing."""

    @abc.abstractmethod
    def differences(self, elsewhere: Set[str]) -> list[Difference]:
        """Tell what differs.

        The tensors of the MLLM that are named in `elsewhere` were merged by other arithmetic, and
        need not agree to the last bit.
        """


def dtype_named(name: str) -> torch.dtype:
    """Give the dtype that a recipe names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


K = TypeVar("K", bound=type[Output])
_KINDS: dict[str, type[Output]] = {}


def register(kind: K) -> K:
    """Make a kind known by its `name`; used as a decorator of its class."""
    _KINDS[kind.name] = kind
    return kind


def registered() -> Mapping[str, type[Output]]:
    """Give the kinds that were registered so far."""
    return MappingProxyType(_KINDS)
