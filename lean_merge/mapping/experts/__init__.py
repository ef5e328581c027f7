"""Experts that are not whole models, one module for each kind.

A module of this folder decorates a function with `maps_experts`. The modules are imported when a
merge has an expert that is not a whole model, as the forms of `checkpoints` are.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from torch import Tensor

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader
from lean_merge.checkpoints.rows import Buffer, WeightSource
from lean_merge.mapping.gate import Faults
from lean_merge.mapping.structure import Decoder, Key


class ExpertMap(abc.ABC):
    """The changes that an expert makes to the base's weights.

    Attributes
    ----------
    prefix
        The beginning of the names of its modules, up to the language model's layers.
    file
        The file with its tensors.
    warnings
        Sentences about what of it is not merged.
    """

    prefix: str
    file: Path
    warnings: tuple[str, ...]

    @abc.abstractmethod
    def task_vector(self, key: Key, base: WeightSource) -> WeightSource:
        """Return the rows that it adds to the base's weight at `key`; they may be zero."""

    @abc.abstractmethod
    def added(self, key: Key, whole: WeightSource) -> WeightSource:
        """Return the rows of a whole weight at `key` with the expert's change added."""


@dataclass(frozen=True, slots=True)
class ZeroRows(WeightSource):
    """The rows of a task vector that an adapter leaves at zero; nothing is read.

    Attributes
    ----------
    like
        The base's rows, whose shape and dtype the zeros have.
    owner
        The adapter's file.
    """

    like: WeightSource
    owner: Path

    is_difference: ClassVar[bool] = True
    zero_because: ClassVar[str] = "the adapter does not target this weight"

    @property
    def name(self) -> str:
        return self.like.name

    @property
    def file(self) -> Path:
        return self.owner

    @property
    def shape(self) -> tuple[int, int]:
        return self.like.shape

    @property
    def dtype(self) -> str:
        return self.like.dtype

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        return ()

    def nbytes(self, rows: slice) -> int:
        del rows
        return 0

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        del reader
        shape = (rows.stop - rows.start, self.shape[1])
        return buffer(name, shape, torch_dtype(self.dtype)).zero_()


_KINDS: list[Callable[..., ExpertMap | None]] = []
K = TypeVar("K", bound=Callable[..., ExpertMap | None])


def maps_experts(function: K) -> K:
    """Make a function known that does as `map_expert`, and returns None for what it cannot map."""
    _KINDS.append(function)
    return function


def map_expert(
    role: str,
    checkpoint: Checkpoint,
    roles: Mapping[str, Checkpoint],
    found: Mapping[str, Decoder],
    faults: Faults,
    named: Mapping[str, TensorSpec],
) -> ExpertMap:
    """Map the changes of an expert to the in-scope weights of the base.

    `roles` and `found` are all models and their language models, `named` the expert's tensors by
    the names to go by. `faults` takes a line for each in-scope change that fits no weight.

    Raises
    ------
    CheckpointError, CoverageError
        A change is damaged or replaces whole weights; nothing is in scope, or it cannot be told
        which part or which layers are changed.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    mapped = (kind(role, checkpoint, roles, found, faults, named) for kind in _KINDS)
    return next(each for each in mapped if each is not None)
