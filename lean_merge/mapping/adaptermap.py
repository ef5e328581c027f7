"""Find the weights of the base that an adapter changes, by structure as for whole models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.forms import Adapter, Change
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader
from lean_merge.checkpoints.rows import Buffer, Place, WeightSource
from lean_merge.errors import CheckpointError, CoverageError, shown
from lean_merge.mapping.gate import ONE_BASE, Faults
from lean_merge.mapping.kinship import heads
from lean_merge.mapping.placement import LEAVES, Heads, canonical, places
from lean_merge.mapping.structure import Decoder, Key, split_name


@dataclass(frozen=True, slots=True)
class AdapterMap:
    """The changes that an adapter makes to the base's weights.

    Attributes
    ----------
    prefix
        The beginning of the names of its modules, up to the language model's layers.
    rows
        The rows that it adds to the base's logical weights, by (layer, rest).
    file
        The file with the adapter's tensors.
    warnings
        Sentences about the parts of the adapter that are not merged.
    """

    prefix: str
    rows: Mapping[Key, WeightSource]
    file: Path
    warnings: tuple[str, ...]

    def task_vector(self, key: Key, base: WeightSource) -> WeightSource:
        """Return the rows that the adapter adds to the base's weight at `key`; they may be zero."""
        return self.rows.get(key) or ZeroRows(base, self.file)


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


def map_adapter(
    role: str,
    checkpoint: Checkpoint,
    base: Checkpoint,
    found: Decoder,
    faults: Faults,
    named: Mapping[str, TensorSpec],
) -> AdapterMap:
    """Map an adapter's changes to the in-scope weights of the base.

    Parameters
    ----------
    role
        "expert 1", ...
    checkpoint
        The adapter, opened by `open_expert`.
    base, found
        The base, and its language model.
    faults
        Takes a line for each in-scope module that fits no weight of the base.
    named
        The adapter's tensors by the names to go by.

    Raises
    ------
    CheckpointError
        A change is damaged, or the adapter replaces whole weights that are in scope.
    CoverageError
        None of its modules is in scope, or it fits several parts equally well.
    """
    adapter = checkpoint.adapter
    assert adapter is not None
    changes, rest = adapter.changes(named)
    _refuse_whole_weights(rest, named)
    outside = list(rest)
    known = heads(base)
    prefix = _prefix(checkpoint.source, changes, found, known)
    rows: dict[Key, WeightSource] = {}
    for module, change in changes.items():
        split = _in_scope(module)
        if split is None or split[0] != prefix:
            outside.append(module)
            continue
        change.check()
        for key, part in _parts(split, change, known):
            weight = found.weights.get(key)
            if weight is None:
                faults.add(role, key, "changes it, but the base lacks it")
            elif weight.shape != part.shape:
                theirs, ours = list(part.shape), list(weight.shape)
                faults.add(role, key, f"changes a weight of shape {theirs}, the base has {ours}")
            else:
                rows[key] = change.rows(part)
    warnings = _warnings(role, adapter, outside, base)
    return AdapterMap(prefix, rows, checkpoint.files[0], tuple(warnings))


def _in_scope(module: str) -> tuple[str, int, str] | None:
    """Return a module's (prefix, layer, canonical rest); None if it is not in a layer."""
    split = split_name(f"{module}.weight")
    if split is None:
        return None
    rest = canonical(split[2].removesuffix(".weight"))
    return (*split[:2], rest) if rest.rsplit(".", 1)[-1] in LEAVES else None


def _parts(
    split: tuple[str, int, str], change: Change, known: Heads | None
) -> Iterator[tuple[Key, Place]]:
    """Yield the logical weights in a module, which may be fused, and their places in it."""
    if change.shape is not None:
        whole = replace(change.tensor, shape=change.shape)
        for rest, place in places(split[2], whole, [] if known is None else [known]).items():
            yield (split[1], rest), place


def _refuse_whole_weights(names: Sequence[str], tensors: Mapping[str, TensorSpec]) -> None:
    """Raise CheckpointError for a whole weight in scope, which PEFT saves for modules_to_save."""
    for name in names:
        split, spec = split_name(name), tensors[name]
        if split is None or not name.endswith(".weight") or len(spec.shape) < 2:
            continue
        parts = split[2].removesuffix(".weight").split(".")
        if LEAVES & set(parts) and not any(part.startswith("lora_") for part in parts):
            raise CheckpointError(
                f"{spec.file}: tensor {shown(name)} is a whole weight in scope (modules_to_save) "
                "and no change of the base's; merge the adapter into its base first (PEFT's "
                "merge_and_unload) and pass the result."
            )


def _prefix(source: str, changes: Mapping[str, Change], base: Decoder, known: Heads | None) -> str:
    """Return the prefix of the language model's layers: the one under which most shapes fit."""
    scores: dict[str, tuple[int, int]] = {}
    for module, change in changes.items():
        split = _in_scope(module)
        if split is None:
            continue
        for key, part in _parts(split, change, known):
            weight = base.weights.get(key)
            fits = weight is not None and weight.shape == part.shape
            before = scores.get(split[0], (0, 0))
            scores[split[0]] = (before[0] + (weight is not None), before[1] + fits)
    best = [prefix for prefix, score in scores.items() if score == max(scores.values())]
    if not best or scores[best[0]] == (0, 0):
        raise CoverageError(
            f"{source}: the adapter changes no weight that the base has in scope; {ONE_BASE}."
        )
    if len(best) > 1:
        raise CoverageError(
            f"{source}: the adapter changes several parts that are equally like the base, "
            f"under {', '.join(map(repr, sorted(best)))}; pass an adapter of only one of them."
        )
    return best[0]


def _warnings(
    role: str, adapter: Adapter, outside: Sequence[str], base: Checkpoint
) -> Iterator[str]:
    if outside:
        yield (
            f"{len(outside)} parts of the adapter ({role}), such as {outside[0]}, are out of scope "
            "(embeddings, heads, biases, other towers); they are left out."
        )
    if adapter.base is not None and not _same_model(adapter.base, base):
        yield (
            f"The adapter ({role}) says that it was trained on {shown(adapter.base)}, and the base "
            f"is {base.source}; shapes fit, but check that they are the same model."
        )


def _same_model(named: str, base: Checkpoint) -> bool:
    """Return whether an adapter's base may be this one; folders move, so only last parts count."""
    known = {base.source.split("@")[0], base.path.name}
    stated = base.config.get("_name_or_path") if base.config is not None else None
    if isinstance(stated, str):
        known.add(stated)
    last = {name.rstrip("/").rsplit("/", 1)[-1].lower() for name in known}
    return named.rstrip("/").rsplit("/", 1)[-1].lower() in last
