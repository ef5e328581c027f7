"""Find the weights of the base that an adapter changes, by structure as for whole models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.forms import Adapter, Change
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place, WeightSource
from lean_merge.errors import CheckpointError, CoverageError, shown
from lean_merge.mapping.experts import ExpertMap, ZeroRows, maps_experts
from lean_merge.mapping.gate import ONE_BASE, Faults
from lean_merge.mapping.kinship import heads
from lean_merge.mapping.placement import Heads, canonical, is_matrix, places
from lean_merge.mapping.structure import Decoder, Key, Parts, split_name, tail


@dataclass(frozen=True, slots=True)
class AdapterMap(ExpertMap):
    """The changes that an adapter makes to the base's weights.

    Attributes
    ----------
    prefix
        The beginning of the names of its modules, up to the language model's layers.
    changes
        What it adds to the base's logical weights, by (layer, rest): the change of a module, and
        the place of the logical weight in it.
    file
        The file with the adapter's tensors.
    warnings
        Sentences about the parts of the adapter that are not merged.
    """

    prefix: str
    changes: Mapping[Key, tuple[Change, Place]]
    file: Path
    warnings: tuple[str, ...]

    def task_vector(self, key: Key, base: WeightSource) -> WeightSource:
        """Return the rows that the adapter adds to the base's weight at `key`; they may be zero."""
        if key not in self.changes:
            return ZeroRows(base, self.file)
        change, place = self.changes[key]
        return change.rows(place)

    def added(self, key: Key, whole: WeightSource) -> WeightSource:
        """Return the rows of a weight, to which the adapter's are added if it changes that one."""
        if key not in self.changes:
            return whole
        change, place = self.changes[key]
        return change.rows(place, onto=whole)


@maps_experts
def map_adapter(
    role: str,
    checkpoint: Checkpoint,
    roles: Mapping[str, Checkpoint],
    found: Mapping[str, Decoder],
    faults: Faults,
    named: Mapping[str, TensorSpec],
) -> AdapterMap | None:
    """Map an adapter's changes as `map_expert` says; None for what is no adapter."""
    if checkpoint.adapter is None:
        return None
    adapter, base = checkpoint.adapter, found["base"]
    changes, rest = adapter.changes(named)
    known = heads(roles["base"])
    split = {module: _in_scope(module, change, base) for module, change in changes.items()}
    prefix = _prefix(checkpoint.source, changes, split, list(found.values()), known)
    _refuse_whole_weights(rest, named, prefix)
    numbers = _numbers(checkpoint, prefix, [each for each in split.values() if each], roles, found)
    outside = list(rest)
    rows: dict[Key, tuple[Change, Place]] = {}
    for module, change in changes.items():
        at = split[module]
        if at is None or at[0] != prefix or (numbers and at[1] in found["mllm"].extra):
            outside.append(module)
            continue
        change.check()
        for (layer, name), part in _parts(at, change, known):
            key = numbers.get(layer, layer), name
            weight = base.weights.get(key)
            if weight is None:
                faults.add(role, key, "changes it, but the base lacks it")
            elif weight.shape != part.shape:
                theirs, ours = list(part.shape), list(weight.shape)
                faults.add(role, key, f"changes a weight of shape {theirs}, the base has {ours}")
            else:
                rows[key] = change, part
    warnings = _warnings(role, adapter, outside, roles["base"])
    return AdapterMap(prefix, rows, checkpoint.files[0], tuple(warnings))


def _in_scope(module: str, change: Change, base: Decoder) -> tuple[str, int, str] | None:
    """Return a module's (prefix, layer, canonical rest); None if it is no matrix of a layer.

    Both halves of an encoder-decoder have the prefix of the decoder, as in a `Decoder`.
    """
    split = split_name(f"{module}.weight")
    if split is None:
        return None
    rest = canonical(split[2].removesuffix(".weight"))
    if not is_matrix(rest, replace(change.tensor, shape=change.shape or change.tensor.shape)):
        return None
    start, middle, layers = tail(split[0])
    if middle == "encoder" and tail(base.prefix)[1] == "decoder":
        return f"{start}decoder.{layers}", split[1], f"encoder.{rest}"
    return *split[:2], rest


def _parts(
    split: tuple[str, int, str], change: Change, known: Heads | None
) -> Iterator[tuple[Key, Place]]:
    """Yield the logical weights in a module, which may be fused, and their places in it."""
    if change.shape is not None:
        whole = replace(change.tensor, shape=change.shape)
        for rest, place in places(split[2], whole, [] if known is None else [known]).items():
            yield (split[1], rest), place


def _refuse_whole_weights(
    names: Sequence[str], tensors: Mapping[str, TensorSpec], prefix: str
) -> None:
    """Raise CheckpointError for a whole weight in scope, which PEFT saves for modules_to_save."""
    for name in names:
        split, spec = split_name(name), tensors[name]
        if split is None or prefix not in (split[0], split[0].removeprefix("base_model.model.")):
            continue
        if is_matrix(canonical(split[2].removesuffix(".weight")), spec):
            raise CheckpointError(
                f"{spec.file}: tensor {shown(name)} is a whole weight in scope (modules_to_save) "
                "and no change of the base's; merge the adapter into its base first (PEFT's "
                "merge_and_unload) and pass the result."
            )


def _prefix(
    source: str,
    changes: Mapping[str, Change],
    split: Mapping[str, tuple[str, int, str] | None],
    found: Sequence[Decoder],
    known: Heads | None,
) -> str:
    """Return the prefix of the language model's layers in the adapter's names.

    It is the one that names allow and under which most shapes fit. Names do not allow a tower, nor
    layers that are called otherwise than those of the base and of the MLLM.
    """
    base, parts = found[0], Parts(None)
    like = {tail(each.prefix)[1:] for each in found}
    shapes: dict[str, set[tuple[int, int]]] = {}
    for (_, rest), place in base.weights.items():
        shapes.setdefault(rest, set()).add(place.shape)
    scores: dict[str, tuple[int, int]] = {}
    for module, change in changes.items():
        at = split[module]
        if at is None or not parts.is_language(at[0]) or tail(at[0])[1:] not in like:
            continue
        for (_, rest), part in _parts(at, change, known):
            found_shapes = shapes.get(rest, set())
            before = scores.get(at[0], (0, 0))
            scores[at[0]] = (
                before[0] + bool(found_shapes),
                before[1] + (part.shape in found_shapes),
            )
    best = [prefix for prefix, score in scores.items() if score == max(scores.values())]
    if not best or scores[best[0]] == (0, 0):
        others = sorted({at[0] for at in split.values() if at} - set(best))
        where = f", only parts under {', '.join(map(repr, others[:4]))}" if others else ""
        raise CoverageError(
            f"{source}: the adapter changes no weight that the base has in scope{where}; "
            f"{ONE_BASE}."
        )
    if len(best) > 1:
        raise CoverageError(
            f"{source}: the adapter changes several parts that are equally like the base, "
            f"under {', '.join(map(repr, sorted(best)))}; pass an adapter of only one of them."
        )
    return best[0]


def _numbers(
    adapter: Checkpoint,
    prefix: str,
    changed: Sequence[tuple[str, int, str]],
    roles: Mapping[str, Checkpoint],
    found: Mapping[str, Decoder],
) -> Mapping[int, int]:
    """Return the base's number of each layer of the MLLM if the adapter counts as the MLLM does.

    That is a question only where the MLLM has layers between those of the base.
    """
    base, mllm = found["base"], found["mllm"]
    if not mllm.numbers:
        return {}
    layers = {layer for before, layer, _ in changed if before == prefix}
    stated = None if adapter.adapter is None else adapter.adapter.base
    named = {role: stated is not None and _same_model(stated, roles[role]) for role in found}
    kinds = [Parts(None).kind(each) for each in (prefix, base.prefix, mllm.prefix)]
    if max(layers) >= base.depth:
        return mllm.numbers
    if named["base"] != named["mllm"]:
        return mllm.numbers if named["mllm"] else {}
    if kinds[1] != kinds[2]:
        return mllm.numbers if kinds[0] == kinds[2] else {}
    raise CoverageError(
        f"{adapter.source}: the adapter may count its layers as the base does, or as the MLLM, "
        f"which has others between them, such as {mllm.prefix}{mllm.extra[0]}; name the model that "
        "it was trained on as base_model_name_or_path in its adapter_config.json."
    )


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
