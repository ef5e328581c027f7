"""The base classes of outputs and of their sinks; a plan holds an instance of one kind."""

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
"""The dtype for weights that are stored with scales, unless the recipe gives another."""
REPORT = "lean_merge_report.json"
"""The file in which a merge tells what happened."""
RECIPE = "lean_merge_recipe.yml"
"""The file of an output that holds its recipe."""
ReadRows = Callable[[WeightSource, slice], Tensor]
"""A function that reads rows of one role's weight; they are valid until the next call."""


@dataclass(frozen=True, slots=True)
class Request:
    """The facts that a plan gives to the output that it asks for.

    Attributes
    ----------
    recipe, mllm
        What the user asked for, and the checkpoint whose tensors are written.
    prefix : str
        The beginning of names in the MLLM's language model, up to and including "layers.".
    weights : tuple of MappedWeight
        The MLLM's tensors in scope.
    methods : Mapping
        The method of each logical weight by its canonical name; filtered weights have none.
    """

    recipe: MergeRecipe
    mllm: Checkpoint
    prefix: str
    weights: tuple[MappedWeight, ...]
    methods: Mapping[str, Method[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The facts of a run, from which an output writes its last files.

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
    """A kind of output; a new one is a module here with a subclass and `@register_kind`.

    Parameters
    ----------
    request
        The facts of the merge. A kind raises RecipeError if it cannot hold what is asked for.
    """

    name: ClassVar[str]
    """The kind's name in recipes."""
    in_recipes: ClassVar[bool] = True
    """True if a recipe may ask for it; the other kinds belong to functions of the program."""
    needs_folder: ClassVar[bool] = True
    writes_rows: ClassVar[bool] = False
    """True if the MLLM's rows are read once more and written, and other tensors are copied."""
    forms_updates: ClassVar[bool] = False
    """True if its sink forms the updates itself, from the rows that they need."""
    refuses_strangers: ClassVar[bool] = True
    """True if a model that was surely not tuned from the base is refused."""
    samples_base: ClassVar[bool] = False
    """True if the first rows of the base's weights are read too."""
    in_pairs: ClassVar[bool] = True
    """True if two weights may be analysed at a time."""
    most_waiting: ClassVar[int] = 0
    """The most updates that may wait to be stored while the next weight is analysed."""
    may_be_empty: ClassVar[bool] = True
    """True if it can be made although no weight gets an update."""
    done: ClassVar[str] = "merged"
    """The word for what is done with the weights that get an update."""
    exact: ClassVar[bool] = True
    """True if `bytes_written` is the exact count; otherwise it is an upper bound."""
    is_model: ClassVar[bool] = True
    """True if loading the output may run code that comes with the MLLM."""
    called: ClassVar[str] = ""
    """The journal's name for it, so that it is not mistaken for a merge of the same recipe."""
    compares: ClassVar[bool] = False
    """True if `comparison` can compare it with a merge that is made again."""

    @classmethod
    def command(cls, file: Path, recipe: MergeRecipe, moved: list[str], facts: Any) -> list[str]:
        """Return the words that make it anew; `moved` are options for models that have moved."""
        return ["analyze" if cls.called else "merge", str(file), *moved]

    @classmethod
    def again(cls, facts: Mapping[str, Any]) -> type[Output]:
        """Return this kind as it was set when the journal's `facts` were written."""
        return cls

    def __init__(self, request: Request) -> None:
        self.request = request
        self.recipe = request.recipe
        self.mllm = request.mllm
        self.prefix = request.prefix
        self.weights = request.weights
        self.methods = request.methods

    @classmethod
    def check(cls, recipe: MergeRecipe) -> None:
        """Raise RecipeError if a recipe cannot have this kind, before any file is opened."""
        del recipe

    @classmethod
    def open(cls, folder: Path, *, own: bool = False) -> RecordedEvidence:
        """Open a complete output that holds evidence, for a merge to decide from.

        `own` tells that the merge made it for itself. Raises CheckpointError if it is damaged.
        """
        raise NotImplementedError

    # --- what is laid out ---------------------------------------------------------------------

    @cached_property
    def tensors(self) -> Mapping[str, OutputTensor]:
        """Return the MLLM's tensors by name, in its order, with the dtypes of the output."""
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
        """Return the weight files whose layout is known before the run."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return warnings for people, in sentences."""
        return ()

    def warnings(self, weights: Sequence[WeightResult]) -> list[str]:
        """Return sentences on what storing lost of the updates."""
        del weights
        return []

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what decides the bytes beside recipe and inputs, for the journal."""
        return {}

    # --- what it takes ------------------------------------------------------------------------

    @property
    def bytes_written(self) -> int:
        """Return the most bytes that all weight files can have."""
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_on_disk(self) -> int:
        """Return the most bytes that its files take while it is made."""
        return self.bytes_written

    @property
    def held_bytes(self) -> int:
        """Return the bytes of memory that it holds all the time."""
        return 0

    @staticmethod
    def storing_bytes(rank: int) -> int:
        """Return the bytes of memory that it takes to store an update of at most `rank`.

        They are allocated after the analysis has released its own.
        """
        del rank
        return 0

    @staticmethod
    def waiting_bytes(update: int, rank: int, kept: int) -> int:
        """Return the bytes that waiting updates hold while the next weight is analysed.

        Parameters
        ----------
        update, rank
            The most bytes that the update of a weight holds, and the most that its rank can be.
        kept
            Bytes that are kept beside the rows of such a weight.
        """
        return 0

    def described(self, *, written: int, disk: int) -> str:
        """Return a description for people, in a few words."""
        return self.name

    # --- how it is made -----------------------------------------------------------------------

    @abc.abstractmethod
    def sink(self, folder: OutputFolder | None) -> Sink:
        """Return the sink for the results of a run; `folder` is None if the output needs none."""

    def lay_out(self, folder: OutputFolder, tasks: Sequence[WeightTask]) -> None:
        """Write files that can be laid out only after the run. Raises OutputError, BudgetError."""
        del folder, tasks

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write all files beside the weights. Raises OutputError, BudgetError, CheckpointError."""
        del folder, outcome

    # --- what is there once it is complete ----------------------------------------------------

    def names(self, task: CopyTask | WeightTask) -> tuple[str, ...]:
        """Return the names of the tensors that a task may make."""
        return (task.tensor.name,)

    def can_hold(self, names: Set[str]) -> bool:
        """Return whether a complete output may consist of the tensors of these names."""
        return names == {name for shard in self.shards for name in shard.offsets}

    def comparison(
        self,
        tasks: Sequence[CopyTask | WeightTask],
        *,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> Comparison:
        """Return a sink that compares a complete output with a merge that is made again.

        Parameters
        ----------
        tasks
            The tasks of the plan.
        stored, reader
            The output's undamaged tensors, and the reader for them.
        sampled
            The names of the tensors in scope that are to be merged again.
        """
        raise NotImplementedError


class Sink:
    """The receiver of a merge's results, task by task in the order of the plan.

    The engine computes; a sink only stores. If it gives a writer for a task, the engine reads the
    MLLM's rows, adds the update and writes the tensor's bytes through it, from several threads. If
    it gives none, no row is read again, and the sink itself keeps what it wants of the update. This
    class stores nothing at all.
    """

    folder: OutputFolder | None = None
    """The folder in which it stores, if there is one."""

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes | None:
        """Return the function that writes the bytes of a tensor; None if they are not wanted.

        The engine asks once for a tensor out of scope, and once for each logical weight in scope.
        """
        del task
        return None

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Stored:
        """Store the update of `weight`, which belongs to `task`, if there is no writer for it."""
        return None

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return the note that an interrupted run gave to `finish`; None if there is none.

        With a note, the engine does nothing else for the task, whose bytes are there already.
        """
        del task
        return None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Record that a task is stored completely; tasks are finished in their order.

        A later run gets `note`, which is plain data for JSON, from `finished`.
        """
        return

    def take(self) -> Tensor:
        """Return the tensor of the last task, if tensors are made in memory."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send the bytes written so far to the disk; a thread of its own calls this.

        Raises OutputError or BudgetError where the disk refuses.
        """
        return


class Comparison(Sink):
    """A sink that compares a merge's results with a complete output, and stores nothing."""

    @abc.abstractmethod
    def differences(self, elsewhere: Set[str]) -> list[Difference]:
        """Return the differences.

        The MLLM's tensors named in `elsewhere` were merged by other arithmetic, and need not agree
        to the last bit.
        """


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype that a recipe names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


K = TypeVar("K", bound=type[Output])
_KINDS: dict[str, type[Output]] = {}


def register_kind(kind: K) -> K:
    """Register a kind of output under its `name`; use this as a class decorator."""
    _KINDS[kind.name] = kind
    return kind


def registered_kinds() -> Mapping[str, type[Output]]:
    """Return the kinds that were registered so far."""
    return MappingProxyType(_KINDS)
