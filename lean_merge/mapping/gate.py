"""The coverage gate reports all that prevents a merge before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place
from lean_merge.errors import CoverageError
from lean_merge.mapping.kinship import HEADS, head_counts, heads, sizes
from lean_merge.mapping.structure import Decoder, Key, decoders

ONE_BASE = "pass checkpoints that were all tuned from one base"
NAMES = "say which tensors are the base's with names: in the recipe"
_SHOWN = 8


def title(role: str) -> str:
    """Return a role's name as it stands in a sentence."""
    return "MLLM" if role == "mllm" else role


@dataclass(slots=True)
class Faults:
    """A list of all that does not map, with a line for each fault."""

    lines: list[str] = field(default_factory=list)

    def add(self, role: str, key: Key, fault: str) -> None:
        """Note that `role` has a `fault` at (layer, rest)."""
        self.lines.append(f"layers.{key[0]}.{key[1]}: the {title(role)} {fault}")

    def check_decoder(self, role: str, decoder: Decoder, base: Decoder) -> None:
        """Note the faults that no weight of the base reveals: unclear stacks and surplus layers."""
        self.lines += [
            f"{name}: the {title(role)} stores these experts in one tensor {why}, so it cannot be "
            "told which numbers are whose"
            for name, why in decoder.unclear.items()
        ]
        if decoder.depth > base.depth:
            self.lines.append(
                f"{decoder.prefix}{base.depth}: the {title(role)} has {decoder.depth} layers, "
                f"the base only {base.depth}"
            )

    def counterpart(
        self, role: str, checkpoint: Checkpoint, decoder: Decoder, key: Key, base: Place
    ) -> Place | None:
        """Return the place of a role's weight at `key`, or note why it does not fit the base."""
        place, other = decoder.weights.get(key), decoder.others.get(key)
        if place is None and other is None:
            self.add(role, key, "lacks it")
            return None
        shape = place.shape if place is not None else other.shape if other is not None else ()
        if place is None or shape != base.shape:
            self.add(role, key, f"has the shape {list(shape)}, the base {list(base.shape)}")
        elif (fault := checkpoint.fault(place.tensor)) is not None:
            self.add(role, key, fault)
        else:
            return place
        return None


def locate(
    base: Checkpoint,
    others: Mapping[str, Checkpoint],
    named: Mapping[str, Mapping[str, TensorSpec]] = MappingProxyType({}),
) -> dict[str, Decoder]:
    """Return the language model in each role, "base" first.

    Parameters
    ----------
    base, others
        The checkpoints, by role.
    named
        All tensors by the names to go by, for each role whose tensors the recipe renames. The
        language model of such a role is where the base's is.

    Raises
    ------
    CoverageError
        A role has no layers like the base's, or several that are equally like them.
    """
    roles = {"base": base, **others}
    known = [each for each in map(heads, roles.values()) if each is not None]
    all_found = {}
    for role, checkpoint in roles.items():
        own = heads(checkpoint)
        tensors = named.get(role, checkpoint.tensors)
        all_found[role] = decoders(tensors, known if own is None else [own, *known])
    candidates = all_found.pop("base")
    if not candidates:
        raise CoverageError(
            f"{base.source}: the base has no language model layers (…layers.N.…q_proj.weight and "
            "the like); pass the text model that the others were tuned from."
        )
    fitting = [
        candidate
        for candidate in candidates.values()
        if all(
            any(d.has_whole_layer_of(candidate) for d in each.values())
            for each in all_found.values()
        )
    ]
    # A base that is itself multimodal has towers too: its decoder has the fullest layers.
    best = _only_best("base", base, {d.prefix: d.rank() for d in fitting or candidates.values()})
    chosen = candidates[best]
    located = {"base": chosen}
    for role, each in all_found.items():
        if role in named and best in each:
            each = {best: each[best]}
        located[role] = _like(chosen, role, others[role], each)
    return located


def _like(base: Decoder, role: str, source: Checkpoint, found: dict[str, Decoder]) -> Decoder:
    found = {prefix: decoder.numbered_as(base) for prefix, decoder in found.items()}
    fitting = {p: d for p, d in found.items() if d.has_whole_layer_of(base)}
    if not fitting:
        names = base.one_layer()
        closest = max(found.values(), key=lambda d: len(names & d.one_layer()), default=None)
        if closest is None:
            fault = "has no layers with weights like the base's"
        else:
            lacking = sorted(names - closest.one_layer())
            fault = f"has layers under {closest.prefix!r}, but they lack {', '.join(lacking)}"
        raise CoverageError(f"{source.source}: the {title(role)} {fault}; {ONE_BASE}, or {NAMES}.")
    # Names count before shapes: a tower may share a width with the base, rarely a whole layer.
    scores = {}
    for prefix, decoder in fitting.items():
        shared = [key for key in base.weights if key in decoder.weights]
        equal = [key for key in shared if decoder.weights[key].shape == base.weights[key].shape]
        exact = [key for key in equal if (key in decoder.exact) == (key in base.exact)]
        scores[prefix] = (len(shared), len(equal), len(exact))
    return found[_only_best(role, source, scores)]


def _only_best(role: str, source: Checkpoint, scores: Mapping[str, tuple[int, ...]]) -> str:
    top = max(scores.values())
    best = [prefix for prefix, score in scores.items() if score == top]
    if len(best) > 1:
        raise CoverageError(
            f"{source.source}: the {title(role)} has several equally likely language models, under "
            f"{', '.join(map(repr, sorted(best)))}; pass a checkpoint with only one of them, or "
            f"{NAMES}."
        )
    return best[0]


def check_heads(base: Checkpoint, others: Mapping[str, Checkpoint]) -> None:
    """Raise CoverageError if heads differ, for then equal shapes do not mean equal functions."""
    ours = head_counts(base)
    for role, other in others.items():
        theirs = head_counts(other)
        for key, words in HEADS.items():
            if key in ours and key in theirs and ours[key] != theirs[key]:
                raise CoverageError(
                    f"{other.source}: the {title(role)} has {theirs[key]} for {words} ({key} in "
                    f"config.json), the base {ours[key]}, so their weights do not correspond; "
                    f"{ONE_BASE}."
                )


def report(
    faults: Faults,
    checkpoints: Mapping[str, Checkpoint],
    found: Mapping[str, Decoder],
    *,
    mapped: int,
) -> str:
    """Return the gate's message: the sizes that differ, the weights that do not map, the mend."""
    ours = sizes(checkpoints["base"], found["base"])
    differences = []
    for role, checkpoint in checkpoints.items():
        theirs = sizes(checkpoint, found[role])
        unequal = [
            f"{words} {ours[words]} in the base, {theirs[words]} in the {title(role)}"
            for words in ours
            if words in theirs and ours[words] != theirs[words]
        ]
        if unequal:
            differences.append(f"{'; '.join(unequal)} ({checkpoint.source})")
    reason = f" They differ in size: {'; '.join(differences)}." if differences else ""
    shown = "".join(f"\n  {line}" for line in faults.lines[:_SHOWN])
    rest = len(faults.lines) - _SHOWN
    more = f"\n  ... and {rest} more" if rest > 0 else ""
    partial = (
        f", or merge only the {mapped} weights that map with --allow-partial" if mapped else ""
    )
    return (
        f"The models do not map onto each other at {len(faults.lines)} places.{reason}"
        f"{shown}{more}\n{ONE_BASE[0].upper()}{ONE_BASE[1:]}{partial}."
    )
