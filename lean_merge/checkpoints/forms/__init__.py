"""The forms of input other than folders of plain safetensors, one module each.

A form is a module of this folder with a `FORM`, an object whose class overrides the parts of `Form`
that concern it. Nothing else knows a form by its name. The modules are imported when something
about a checkpoint is not plain; each form is then asked whether it understands the checkpoint.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place, WeightSource
from lean_merge.checkpoints.weightfiles import SAFETENSORS, WeightNames


class Encoding(abc.ABC):
    """The way to compute the numbers of one tensor that are not stored as they are."""

    @abc.abstractmethod
    def rows(self, place: Place) -> WeightSource:
        """Return the source of the logical weight's rows at a place in the tensor."""


class Change(abc.ABC):
    """The matrix that an adapter adds to the weight of one module.

    Attributes
    ----------
    tensor
        One of its stored tensors, to be named in messages.
    shape
        The out and in of the weight that it changes; None if they cannot be told.
    """

    tensor: TensorSpec
    shape: tuple[int, int] | None

    @abc.abstractmethod
    def check(self) -> None:
        """Raise CheckpointError if the stored tensors are no change of a matrix of that shape."""

    @abc.abstractmethod
    def rows(self, place: Place, onto: WeightSource | None = None) -> WeightSource:
        """Return the rows of the task vector of the logical weight at `place`, after `check`.

        With `onto`, they are these rows with the change added. The module's weight may be fused,
        but the adapter's rows are never stored as columns.
        """


class Adapter(abc.ABC):
    """The changes that a folder without weights of its own makes to a base model.

    Attributes
    ----------
    base
        The model that it was trained on, as its author named it; None if the author did not.
    """

    base: str | None

    @abc.abstractmethod
    def changes(
        self, tensors: Mapping[str, TensorSpec]
    ) -> tuple[Mapping[str, Change], Sequence[str]]:
        """Return the changes by the base's module names, and the names of unused tensors.

        `tensors` are the adapter's own, by names that the recipe may have changed. Raises
        CheckpointError for tensors from which no change can be made.
        """


@dataclass(frozen=True, slots=True)
class Origin:
    """The place that a checkpoint was fetched from.

    Attributes
    ----------
    folder
        The local folder that holds its files now.
    name
        The name that its publisher gave it.
    revision
        The revision that was asked for; None if none was.
    address
        Where its weights are still, if they were not fetched, with the commit.
    """

    folder: Path
    name: str
    revision: str | None
    address: str = ""


class Form:
    """One form of input. Each method answers "not mine" until a form overrides it.

    Attributes
    ----------
    suffixes
        The ends of the names of weight files that `read` understands.
    names
        The names of a folder's weight files, if the form has files of its own.
    """

    suffixes: tuple[str, ...] = ()
    names: WeightNames | None = None

    def fetch(self, source: str) -> Origin | None:
        """Fetch `source` if it is an address that the form knows; else return None."""
        del source
        return None

    def read(self, file: Path) -> dict[str, TensorSpec]:
        """Return the tensors in a weight file by name, in the order of their offsets."""
        raise NotImplementedError(file)

    def adapter(self, file: Path, config: Mapping[str, Any]) -> Adapter | None:
        """Return the adapter that `config` describes, which was read from `file`."""
        del file, config
        return None

    def understands(self, settings: Mapping[str, Any]) -> bool:
        """Return whether `decode` understands a quantization_config of config.json."""
        del settings
        return False

    def check(
        self, tensors: Mapping[str, TensorSpec], settings: Sequence[Mapping[str, Any]]
    ) -> None:
        """Raise CheckpointError if nothing can be decoded, before any form decodes anything."""
        del tensors, settings

    def decode(
        self, tensors: Mapping[str, TensorSpec], settings: Sequence[Mapping[str, Any]]
    ) -> tuple[Mapping[str, TensorSpec], Mapping[str, Encoding]]:
        """Return the model's own tensors, and the encodings of those that have one.

        `settings` are the quantization_configs of the model and its parts. Tensors that only serve
        to decode others, such as scales, are in neither.
        """
        del settings
        return tensors, {}


@cache
def all_forms() -> tuple[Form, ...]:
    """Return every form of this folder, in the order of their modules' names."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").FORM for name in modules)


def weight_names() -> Iterator[WeightNames]:
    """Yield names of weight files, those of safetensors first; only then are forms imported."""
    yield SAFETENSORS
    yield from (form.names for form in all_forms() if form.names is not None)


_DOWNLOADS_SHOWN = ContextVar("downloads are shown", default=True)


@contextmanager
def downloads_shown(shown: bool) -> Iterator[None]:
    """Choose whether downloads inside the block show their progress on standard error."""
    token = _DOWNLOADS_SHOWN.set(shown)
    try:
        yield
    finally:
        _DOWNLOADS_SHOWN.reset(token)


def are_downloads_shown() -> bool:
    """Return whether progress is shown here; outside of `downloads_shown` blocks it is."""
    return _DOWNLOADS_SHOWN.get()
