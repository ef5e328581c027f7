"""Whose weight an adapter's factors change: found by structure, as for whole models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lean_merge.checkpoints.adapters import AdapterConfig, split_factor
from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.dtypes import FLOATING
from lean_merge.checkpoints.gate import FAMILY, Faults
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.jsonfile import shorten
from lean_merge.checkpoints.lorarows import LoraRows, ZeroRows
from lean_merge.checkpoints.rows import WeightSource
from lean_merge.checkpoints.structure import LEAVES, Decoder, Key, split_name
from lean_merge.errors import CheckpointError, CoverageError

_MERGED = "merge the adapter into its base first (PEFT's merge_and_unload) and pass the result"


@dataclass(frozen=True, slots=True)
class AdapterMap:
    """An adapter's factors by the base's weights.

    Attributes
    ----------
    prefix
        Where the language model's layers are in the names of its modules.
    factors
        B and A by (layer, rest), rest without ".weight", and what B A is multiplied by.
    file
        Of the adapter's tensors.
    warnings
        Sentences about what of the adapter is not merged.
    """

    prefix: str
    factors: Mapping[Key, tuple[TensorSpec, TensorSpec, float]]
    file: Path
    warnings: tuple[str, ...]

    def rows(self, key: Key, base: TensorSpec, first: int, count: int) -> WeightSource:
        """Rows [first, first + count) of the task vector of the base's weight at `key`."""
        if key not in self.factors:
            return ZeroRows(base, count, self.file)
        left, right, scaling = self.factors[key]
        return LoraRows(left, right, scaling, first, count)


def map_adapter(
    role: str, adapter: Checkpoint, base: Checkpoint, found: Decoder, faults: Faults
) -> AdapterMap:
    """Maps an adapter's factors to the in-scope weights of the base.

    Parameters
    ----------
    role
        "expert 1", ...
    adapter
        Opened by `open_expert`.
    base, found
        The base, and its language model.
    faults
        Takes a line for each in-scope module that fits no weight of the base.

    Raises
    ------
    CheckpointError
        A factor lacks its twin, does not fit its config, or the adapter replaces whole weights that
        are in scope.
    CoverageError
        None of its modules is in scope, or it fits several parts equally well.
    """
    config = adapter.adapter
    assert config is not None
    pairs, rest = _pairs(adapter)
    prefix = _prefix(adapter, pairs, found)
    factors: dict[Key, tuple[TensorSpec, TensorSpec, float]] = {}
    outside = list(rest)
    for module, (left, right) in pairs.items():
        split = split_name(module)
        in_scope = split is not None and split[0] == prefix and split[2].split(".")[-1] in LEAVES
        if split is None or not in_scope:
            outside.append(module)
            continue
        _check_pair(module, left, right, config)
        key = (split[1], split[2])
        weight = found.find(key)
        if weight is None:
            faults.add(role, key, "changes it, but the base lacks it")
        elif weight.shape != (left.shape[0], right.shape[1]):
            theirs, ours = [left.shape[0], right.shape[1]], list(weight.shape)
            faults.add(role, key, f"changes a weight of shape {theirs}, the base has {ours}")
        elif key in found.weights:
            factors[key] = (left, right, config.scaling(module))
    return AdapterMap(
        prefix, factors, adapter.files[0], tuple(_warnings(role, adapter, outside, base))
    )


def _pairs(adapter: Checkpoint) -> tuple[dict[str, tuple[TensorSpec, TensorSpec]], list[str]]:
    """(B, A) by module, and the names of all other tensors."""
    found: dict[str, dict[str, TensorSpec]] = {}
    rest = []
    for name, spec in adapter.tensors.items():
        if ".lora_magnitude_vector" in name:
            raise CheckpointError(
                f"{spec.file}: tensor {shorten(name)} is of DoRA, whose magnitudes make the change "
                f"no product of two factors; {_MERGED}."
            )
        factor = split_factor(name)
        if factor is None:
            _refuse_whole(name, spec)
            rest.append(name)
        elif found.setdefault(factor[0], {}).setdefault(factor[1], spec) is not spec:
            raise CheckpointError(
                f"{spec.file}: holds several adapters for {shorten(factor[0])}; save one by itself."
            )
    for module, factors in found.items():
        if len(factors) != 2:
            one = next(iter(factors.values()))
            raise CheckpointError(
                f"{one.file}: tensor {shorten(one.name)} lacks its other factor for "
                f"{shorten(module)}; save the adapter again with PEFT."
            )
    return {module: (factors["B"], factors["A"]) for module, factors in found.items()}, rest


def _refuse_whole(name: str, spec: TensorSpec) -> None:
    """Raises for a whole weight in scope, which PEFT saves for modules_to_save."""
    split = split_name(name)
    if split is None or not name.endswith(".weight") or len(spec.shape) < 2:
        return
    parts = split[2].removesuffix(".weight").split(".")
    if LEAVES & set(parts) and not any(part.startswith("lora_") for part in parts):
        raise CheckpointError(
            f"{spec.file}: tensor {shorten(name)} is a whole weight in scope (modules_to_save) and "
            f"no change of the base's; {_MERGED}."
        )


def _prefix(
    adapter: Checkpoint, pairs: Mapping[str, tuple[TensorSpec, TensorSpec]], base: Decoder
) -> str:
    """Where the language model's layers are in the adapter's names: where most shapes fit."""
    scores: dict[str, tuple[int, int]] = {}
    for module, (left, right) in pairs.items():
        split = split_name(module)
        if split is None or split[2].split(".")[-1] not in LEAVES:
            continue
        weight = base.find((split[1], split[2]))
        fits = weight is not None and weight.shape == (left.shape[0], right.shape[-1])
        named, fitting = scores.get(split[0], (0, 0))
        scores[split[0]] = (named + (weight is not None), fitting + fits)
    best = [prefix for prefix, score in scores.items() if score == max(scores.values())]
    if not best or scores[best[0]] == (0, 0):
        raise CoverageError(
            f"{adapter.source}: the adapter changes no weight that the base has in scope; {FAMILY}."
        )
    if len(best) > 1:
        raise CoverageError(
            f"{adapter.source}: the adapter changes several parts that are equally like the base, "
            f"under {', '.join(map(repr, sorted(best)))}; pass an adapter of only one of them."
        )
    return best[0]


def _check_pair(module: str, left: TensorSpec, right: TensorSpec, config: AdapterConfig) -> None:
    for spec in (left, right):
        if spec.dtype not in FLOATING:
            raise CheckpointError(
                f"{spec.file}: tensor {shorten(spec.name)} has the dtype {spec.dtype}, which "
                "cannot be merged; save the adapter in float32, bfloat16 or float16."
            )
    rank = config.stated_rank(module)
    if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
        raise CheckpointError(
            f"{left.file}: the factors of {shorten(module)} have shapes {list(left.shape)} and "
            f"{list(right.shape)}, which have no product; save the adapter again with PEFT."
        )
    if right.shape[0] != rank:
        raise CheckpointError(
            f"{left.file}: the factors of {shorten(module)} have rank {right.shape[0]}, but the "
            f"config says {rank}, so their scaling is not known; pass the adapter's own config."
        )


def _warnings(role: str, adapter: Checkpoint, outside: list[str], base: Checkpoint) -> list[str]:
    warnings = []
    if outside:
        warnings.append(
            f"{len(outside)} parts of the adapter ({role}), such as {outside[0]}, are out of scope "
            "(embeddings, heads, biases, other towers); they are left out."
        )
    config = adapter.adapter
    named = None if config is None else config.base
    if named is not None and not _same_model(named, base):
        warnings.append(
            f"The adapter ({role}) says that it was trained on {named}, and the base is "
            f"{base.source}; shapes fit, but check that they are the same model."
        )
    return warnings


def _same_model(named: str, base: Checkpoint) -> bool:
    """Whether a name in an adapter's config may mean this base; folders move, so by last part."""
    known = {base.source.split("@")[0], base.path.name}
    stated = base.config.get("_name_or_path") if base.config is not None else None
    if isinstance(stated, str):
        known.add(stated)
    last = {name.rstrip("/").rsplit("/", 1)[-1].lower() for name in known}
    return named.rstrip("/").rsplit("/", 1)[-1].lower() in last
