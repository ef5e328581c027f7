"""Whose weight an adapter's factors change: found by structure, as for whole models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lean_merge.checkpoints.adapters import AdapterConfig, split_factor
from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.dtypes import FLOATING
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.errors import CheckpointError, CoverageError, shown
from lean_merge.mapping.gate import FAMILY, Faults
from lean_merge.mapping.kinship import heads
from lean_merge.mapping.lorarows import LoraRows, ZeroRows
from lean_merge.mapping.placement import LEAVES, Heads, Place, canonical, places
from lean_merge.mapping.rows import WeightSource, source
from lean_merge.mapping.structure import Decoder, Key, split_name

_MERGED = "merge the adapter into its base first (PEFT's merge_and_unload) and pass the result"
Pair = tuple[TensorSpec, TensorSpec]
"""B [out, r] and A [r, in]."""


@dataclass(frozen=True, slots=True)
class AdapterMap:
    """An adapter's factors by the base's weights.

    Attributes
    ----------
    prefix
        Where the language model's layers are in the names of its modules.
    factors
        What it adds to the base's logical weights, by (layer, rest).
    file
        Of the adapter's tensors.
    warnings
        Sentences about what of the adapter is not merged.
    """

    prefix: str
    factors: Mapping[Key, LoraRows]
    file: Path
    warnings: tuple[str, ...]

    def rows(self, key: Key, base: WeightSource) -> WeightSource:
        """The task vector of the base's weight at `key`."""
        return self.factors.get(key) or ZeroRows(base, self.file)


def map_adapter(
    role: str,
    adapter: Checkpoint,
    base: Checkpoint,
    found: Decoder,
    faults: Faults,
    named: Mapping[str, TensorSpec],
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
    named
        The adapter's tensors by the names to go by.

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
    pairs, outside = _pairs(named)
    known = heads(base)
    prefix = _prefix(adapter, pairs, found, known)
    factors: dict[Key, LoraRows] = {}
    for module, pair in pairs.items():
        split = _in_scope(module)
        if split is None or split[0] != prefix:
            outside.append(module)
            continue
        _check_pair(module, pair, config)
        for key, part in _parts(split, pair, known):
            weight = found.weights.get(key)
            if weight is None:
                faults.add(role, key, "changes it, but the base lacks it")
            elif weight.shape != (part.shape[0], pair[1].shape[1]):
                theirs, ours = [part.shape[0], pair[1].shape[1]], list(weight.shape)
                faults.add(role, key, f"changes a weight of shape {theirs}, the base has {ours}")
            else:
                scaling = config.scaling(module, pair[1].shape[0])
                factors[key] = LoraRows(source(part), source(_whole(pair[1])), scaling)
    warnings = _warnings(role, adapter, outside, base)
    return AdapterMap(prefix, factors, adapter.files[0], tuple(warnings))


def _in_scope(module: str) -> tuple[str, int, str] | None:
    """(prefix, layer, canonical rest) of a module of a language model's layers, else None."""
    split = split_name(f"{module}.weight")
    if split is None:
        return None
    rest = canonical(split[2].removesuffix(".weight"))
    return (*split[:2], rest) if rest.rsplit(".", 1)[-1] in LEAVES else None


def _whole(tensor: TensorSpec) -> Place:
    return Place(tensor, (tensor.shape[0], tensor.shape[1]), 0, tensor.shape[0], tensor.shape[0])


def _parts(
    split: tuple[str, int, str], pair: Pair, known: Heads | None
) -> Iterator[tuple[Key, Place]]:
    """The rows of B that belong to each logical weight of a module, which may be fused."""
    left, right = pair
    # As if the module's own weight were stored; of its places, B has the rows.
    whole = replace(left, shape=(left.shape[0], right.shape[1]))
    rank = left.shape[1]
    for rest, place in places(split[2], whole, [] if known is None else [known]).items():
        first = place.first // place.shape[1] * rank
        yield (
            (split[1], rest),
            replace(place, tensor=left, shape=(place.shape[0], rank), first=first),
        )


def _pairs(named: Mapping[str, TensorSpec]) -> tuple[dict[str, Pair], list[str]]:
    """(B, A) by module, and the names of all other tensors."""
    found: dict[str, dict[str, TensorSpec]] = {}
    rest = []
    for name, spec in named.items():
        if ".lora_magnitude_vector" in name:
            raise CheckpointError(
                f"{spec.file}: tensor {shown(name)} is of DoRA, whose magnitudes make the change "
                f"no product of two factors; {_MERGED}."
            )
        factor = split_factor(name)
        if factor is None:
            _refuse_whole(name, spec)
            rest.append(name)
        elif found.setdefault(factor[0], {}).setdefault(factor[1], spec) is not spec:
            raise CheckpointError(
                f"{spec.file}: holds several adapters for {shown(factor[0])}; save one by itself."
            )
    for module, factors in found.items():
        if len(factors) != 2:
            one = next(iter(factors.values()))
            raise CheckpointError(
                f"{one.file}: tensor {shown(one.name)} lacks its other factor for "
                f"{shown(module)}; save the adapter again with PEFT."
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
            f"{spec.file}: tensor {shown(name)} is a whole weight in scope (modules_to_save) and "
            f"no change of the base's; {_MERGED}."
        )


def _prefix(
    adapter: Checkpoint, pairs: Mapping[str, Pair], base: Decoder, known: Heads | None
) -> str:
    """Where the language model's layers are in the adapter's names: where most shapes fit."""
    scores: dict[str, tuple[int, int]] = {}
    for module, pair in pairs.items():
        split = _in_scope(module)
        if split is None or any(len(factor.shape) != 2 for factor in pair):
            continue
        for key, part in _parts(split, pair, known):
            weight = base.weights.get(key)
            fits = weight is not None and weight.shape == (part.shape[0], pair[1].shape[1])
            before = scores.get(split[0], (0, 0))
            scores[split[0]] = (before[0] + (weight is not None), before[1] + fits)
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


def _check_pair(module: str, pair: Pair, config: AdapterConfig) -> None:
    left, right = pair
    for spec in pair:
        if spec.dtype not in FLOATING:
            raise CheckpointError(
                f"{spec.file}: tensor {shown(spec.name)} has the dtype {spec.dtype}, which "
                "cannot be merged; save the adapter in float32, bfloat16 or float16."
            )
    if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
        raise CheckpointError(
            f"{left.file}: the factors of {shown(module)} have shapes {list(left.shape)} and "
            f"{list(right.shape)}, which have no product; save the adapter again with PEFT."
        )
    if config.alpha_patterns and not module.isascii():
        raise CheckpointError(
            f"{left.file}: the name of {shown(module)} is not ASCII, so it is not sure which "
            f"alpha_pattern fits it; {_MERGED}."
        )
    if right.shape[0] not in config.ranks:
        raise CheckpointError(
            f"{left.file}: the factors of {shown(module)} have rank {right.shape[0]}, which the "
            "config does not state, so their scaling is not known; pass the adapter's own config."
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
            f"The adapter ({role}) says that it was trained on {shown(named)}, and the base is "
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
