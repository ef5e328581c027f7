"""Forms of input beside folders of plain safetensors, one module each.

A form is a module of this folder with a `FORM`: an object whose class overrides the parts of `Form`
that it has to do with. Nothing else knows it by name. The modules are imported when something about
a checkpoint is not plain, and every form is then asked whether it is its own.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place, WeightSource
from lean_merge.checkpoints.weightfiles import SAFETENSORS, WeightNames


class Encoding(abc.ABC):
    """How the numbers of one tensor are computed, where they are not what is stored."""

    @abc.abstractmethod
    def rows(self, place: Place) -> WeightSource:
        """The rows of the logical weight at a place in the tensor."""


class Change(abc.ABC):
    """What an adapter adds to the weight of one module.

    Attributes
    ----------
    tensor
        A stored tensor of it, to be named in messages.
    shape
        out and in of the weight that it changes; None where no matrix can be told.
    """

    tensor: TensorSpec
    shape: tuple[int, int] | None

    @abc.abstractmethod
    def check(self) -> None:
        """Raises CheckpointError if what is stored is no change of a matrix of that shape."""

    @abc.abstractmethod
    def rows(self, place: Place) -> WeightSource:
        """The task vector of the logical weight at a place in the module's weight, once checked.

        The weight may be fused; its rows are never stored as columns.
        """


class Adapter(abc.ABC):
    """What a folder without weights of its own adds to a base model.

    Attributes
    ----------
    base
        The model that it was trained on, named by its author; None if nobody did.
    """

    base: str | None

    @abc.abstractmethod
    def changes(
        self, tensors: Mapping[str, TensorSpec]
    ) -> tuple[Mapping[str, Change], Sequence[str]]:
        """The changes by module name in the base, and the names of tensors that are no part of one.

        `tensors` are the adapter's own by the names to go by, which the recipe may have changed.
        Raises CheckpointError for tensors that no change can be made of.
        """


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint was fetched from.

    Attributes
    ----------
    folder
        The local folder that holds its files now.
    name
        What its publisher calls it.
    revision
        Which state of it was asked for, None if none was.
    """

    folder: Path
    name: str
    revision: str | None


class Form:
    """One form of input. Each method answers "not mine" until a form overrides it.

    Attributes
    ----------
    suffixes
        How the names of weight files end that `read` understands.
    names
        What the weight files of a folder are called, for a form that has files of its own.
    """

    suffixes: tuple[str, ...] = ()
    names: WeightNames | None = None

    def fetch(self, source: str) -> Origin | None:
        """What `source` names, on this machine now, if it is an address that the form knows."""
        del source
        return None

    def read(self, file: Path) -> dict[str, TensorSpec]:
        """The tensors in a weight file by name, in the order of their offsets."""
        raise NotImplementedError(file)

    def adapter(self, file: Path, config: Mapping[str, Any]) -> Adapter | None:
        """The adapter that `config` describes, which was read from `file`."""
        del file, config
        return None

    def understands(self, settings: Mapping[str, Any]) -> bool:
        """Whether a quantization_config of config.json is one that `decode` can follow."""
        del settings
        return False

    def decode(
        self, tensors: Mapping[str, TensorSpec], settings: Sequence[Mapping[str, Any]]
    ) -> tuple[Mapping[str, TensorSpec], Mapping[str, Encoding]]:
        """(the model's own tensors, the encodings of those that have one).

        `settings` are the quantization_configs of the model and its parts. What only serves to
        decode, such as scales, is in neither.
        """
        del settings
        return tensors, {}


@cache
def all_forms() -> tuple[Form, ...]:
    """Every form of this folder, by the names of their modules."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").FORM for name in modules)


def weight_names() -> Iterator[WeightNames]:
    """What weight files are called, in the preferred form first; forms are loaded after that."""
    yield SAFETENSORS
    yield from (form.names for form in all_forms() if form.names is not None)
