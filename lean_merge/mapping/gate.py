"""The coverage gate reports all that prevents a merge before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place
from lean_merge.errors import CoverageError
from lean_merge.mapping.kinship import HEADS, head_counts, heads, sizes
from lean_merge.mapping.structure import (
    Decoder,
    Key,
    Parts,
    decoders,
    modalities,
    nature,
    text_config,
)

ONE_BASE = "pass checkpoints that were all tuned from one base"
NAMES = "say which tensors are the base's with names: in the recipe"
_SHOWN = 12


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

    def check_surplus(self, role: str, decoder: Decoder, base: Decoder) -> None:
        """Note the matrices in the layers of a role that the base does not have."""
        for key in decoder.weights:
            if key not in base.weights and key[0] < base.depth:
                self.add(role, key, "has it, but the base lacks it")

    def kinds(self) -> list[str]:
        """Return the lines without the numbers of layers and experts, each with its count."""
        found: dict[str, list[str]] = {}
        for line in self.lines:
            found.setdefault(re.sub(r"(?<=\.)\d+(?=[.:])", "*", line), []).append(line)
        return [
            lines[0] if len(lines) == 1 else f"{kind} ({len(lines)} times)"
            for kind, lines in found.items()
        ]

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
    found = {}
    for role, checkpoint in roles.items():
        own = heads(checkpoint)
        tensors = named.get(role, checkpoint.tensors)
        every = decoders(tensors, known if own is None else [own, *known])
        found[role] = _language_models(role, checkpoint, every)
    candidates = found.pop("base")
    fitting = {
        prefix: each
        for prefix, each in candidates.items()
        if all(
            any(d.has_whole_layer_of(each) for d in theirs.values()) for theirs in found.values()
        )
    }
    chosen = _chosen(base, fitting or candidates)
    located = {"base": chosen}
    for role, theirs in found.items():
        if role in named and chosen.prefix in theirs:
            theirs = {chosen.prefix: theirs[chosen.prefix]}
        located[role] = _like(chosen, role, others[role], theirs)
    return located


def _language_models(
    role: str, checkpoint: Checkpoint, found: Mapping[str, Decoder]
) -> dict[str, Decoder]:
    """Return the parts that are not another part of the model by their names or by the config."""
    parts = Parts(checkpoint.config)
    kept = {prefix: each for prefix, each in found.items() if parts.is_language(prefix)}
    if kept:
        return kept
    others = f", but for {', '.join(map(repr, sorted(found)))} of other parts" if found else ""
    raise CoverageError(
        f"{checkpoint.source}: the {title(role)} has no language model layers "
        f"(...layers.N....q_proj.weight and the like){others}; {ONE_BASE}, or {NAMES}."
    )


def _chosen(base: Checkpoint, candidates: dict[str, Decoder]) -> Decoder:
    """Return the base's language model, by its config, by its name, or as by far the largest."""
    config, parts = text_config(base), Parts(base.config)

    def as_configured(decoder: Decoder) -> bool:
        widths = {size for place in decoder.weights.values() for size in place.shape}
        depth, width = config.get("num_hidden_layers"), config.get("hidden_size")
        return depth == decoder.depth and width in widths

    def is_named(decoder: Decoder) -> bool:
        return parts.kind(decoder.prefix) == "language"

    for rule in (as_configured, is_named):
        candidates = {p: d for p, d in candidates.items() if rule(d)} or candidates
    numbers = {prefix: each.rank()[1] for prefix, each in candidates.items()}
    most = max(numbers.values())
    return candidates[_only_best("base", base, {p: (10 * n > most,) for p, n in numbers.items()})]


def _like(base: Decoder, role: str, source: Checkpoint, found: dict[str, Decoder]) -> Decoder:
    found = {prefix: decoder.numbered_as(base) for prefix, decoder in found.items()}
    fitting = {p: d for p, d in found.items() if d.has_whole_layer_of(base)}
    if not fitting:
        # What a whole kind of layer lacks is for the gate to say, if there is no doubt where.
        names = base.one_layer()
        fitting = {p: d for p, d in found.items() if 2 * len(names & d.one_layer()) >= len(names)}
    if not fitting:
        closest = max(found.values(), key=lambda d: len(names & d.one_layer()))
        lacking = ", ".join(sorted(names - closest.one_layer()))
        raise CoverageError(
            f"{source.source}: the {title(role)} has layers under {closest.prefix!r}, but they "
            f"lack {lacking}; {ONE_BASE}, or {NAMES}."
        )
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


def check_roles(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise CoverageError for an MLLM of text alone beside a model that has vision or audio."""
    if any(map(modalities, checkpoints.values())) and not modalities(checkpoints["mllm"]):
        looks = "; ".join(f"{title(role)}: {nature(each)}" for role, each in checkpoints.items())
        raise CoverageError(
            f"{checkpoints['mllm'].source}: the MLLM has text alone, beside a model that has more. "
            f"It looks as if roles were exchanged ({looks}); exchange them, or go on with "
            "--allow-text-mllm."
        )


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
    kinds = faults.kinds()
    shown = "".join(f"\n  {line}" for line in kinds[:_SHOWN])
    rest = len(kinds) - _SHOWN
    more = f"\n  ... and {rest} more kinds" if rest > 0 else ""
    partial = (
        f", or merge only the {mapped} tensors that map with --allow-partial" if mapped else ""
    )
    return (
        f"The models do not map onto each other at {len(faults.lines)} places.{reason}"
        f"{shown}{more}\n{ONE_BASE[0].upper()}{ONE_BASE[1:]}{partial}."
    )
