"""Find what a language model has beside its matrices: norms, biases, routers, embeddings, head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lean_merge.checkpoints.checkpoint import COMPUTED, Checkpoint
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place
from lean_merge.mapping.experts import ZeroRows
from lean_merge.mapping.gate import title
from lean_merge.mapping.kinship import Tokens, heads
from lean_merge.mapping.placement import FUSED, Heads, places
from lean_merge.mapping.structure import Decoder, text_config
from lean_merge.mapping.weights import LogicalWeight, MappedWeight, task_vectors

_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
_ALIASES = {"tok_embeddings": _EMBEDDING, "output": _HEAD}
_KINDS = ("weight", "bias")


def weights_beside(
    roles: Mapping[str, Checkpoint],
    others: Mapping[str, Checkpoint],
    tensors: Mapping[str, Mapping[str, TensorSpec]],
    found: Mapping[str, Decoder],
    tokens: Mapping[str, Tokens],
) -> tuple[dict[str, MappedWeight], list[str]]:
    """Find the weights that the language models of all roles have beside their matrices.

    Parameters
    ----------
    roles, tensors, found
        Each role that is a whole model, "base" and "mllm" among them, its tensors by the names to
        go by, and its language model.
    others
        All roles but the base. An adapter among them changes none of these weights.
    tokens
        How the tokenizers of the other roles agree with the base's.

    Returns
    -------
    dict
        The MLLM's tensors that hold such weights, by name. Of a vocabulary, the rows of tokens
        that all roles have are merged.
    list of str
        Sentences that say what stays as the MLLM has it, and why.
    """
    shared, told = _shared_places(roles, tensors, found, tokens)
    parts: dict[TensorSpec, list[LogicalWeight]] = {}
    for canonical, theirs in shared.items():
        place, ours = theirs["mllm"], roles["base"].rows(theirs["base"])
        is_base = roles["mllm"] is roles["base"]
        rows_of = {
            role: roles[role].rows(theirs[role])
            if role in theirs
            else ZeroRows(ours, each.files[0])
            for role, each in others.items()
        }
        experts = task_vectors(rows_of)
        mllm = ours if is_base else roles["mllm"].rows(place)
        of_tensor = parts.setdefault(place.tensor, [])
        of_tensor.append(LogicalWeight(canonical, place, ours, mllm, experts, is_matrix=False))
        (rows, width), stored = place.shape, place.tensor.shape
        if len(stored) == 2 and stored[0] > rows:
            left = stored[0] - rows
            place = Place(place.tensor, (left, width), rows * width, left, left)
            own, stays = roles["mllm"].rows(place), "rows of tokens that not all models have"
            of_tensor.append(
                LogicalWeight(
                    f"{canonical}.added", place, own, own, (own,) * len(experts), False, stays
                )
            )
            told.append(f"{left} rows of {canonical} stay: not all models have their tokens.")
    return {each.name: MappedWeight(each, tuple(of)) for each, of in parts.items()}, told


def _shared_places(
    roles: Mapping[str, Checkpoint],
    tensors: Mapping[str, Mapping[str, TensorSpec]],
    found: Mapping[str, Decoder],
    tokens: Mapping[str, Tokens],
) -> tuple[dict[str, dict[str, Place]], list[str]]:
    """Return the places of equal shape, by canonical name and role, and what stays, and why."""
    places_of = {
        role: _beside_matrices(each, found[role], tensors[role]) for role, each in roles.items()
    }
    receiver, shared = places_of["mllm"], dict[str, dict[str, Place]]()
    stays: dict[str, list[str]] = {}
    for name in receiver:
        theirs = {role: _own_or_tied(name, role, roles, places_of) for role in roles}
        if not name.startswith("layers.") and theirs["base"] is None:
            continue  # a part beside the language model, such as a projector
        is_vocabulary = not name.startswith("layers.") and receiver[name].shape[0] > 1
        fault = _fault(theirs, roles, is_vocabulary)
        if not fault and is_vocabulary:
            fault, theirs = _vocabulary(theirs, tokens)
        if fault:
            stays.setdefault(fault, []).append(name)
        else:
            shared[name] = {role: place for role, place in theirs.items() if place is not None}
    own_heads = [role for role, each in places_of.items() if _HEAD in each]
    if _HEAD not in receiver and own_heads:
        reason = f"the MLLM's head is its embedding, and the {title(own_heads[0])} has another"
        stays[reason] = [_HEAD]
    partly = {place.tensor.name for name, place in receiver.items() if name not in shared}
    whole = {n: each for n, each in shared.items() if each["mllm"].tensor.name not in partly}
    return whole, [
        f"{len(names)} weights that scope: language names, such as {names[0]}, stay as the MLLM "
        f"has them: {reason}."
        for reason, names in stays.items()
    ]


def _beside_matrices(
    checkpoint: Checkpoint, decoder: Decoder, tensors: Mapping[str, TensorSpec]
) -> dict[str, Place]:
    """Return all tensors of a language model that hold no matrix in scope, by canonical name."""
    known, found = heads(checkpoint), dict[str, Place]()
    for (layer, rest), spec in decoder.others.items():
        if not spec.name.endswith(COMPUTED):
            parts = _parts(rest, spec, known)
            found |= {f"layers.{layer}.{part}": place for part, place in parts.items()}
    # The layers' name and an empty word come last in "model.layers.".
    outer = decoder.prefix.split(".")[:-2]
    stem = "".join(f"{each}." for each in outer)
    for name, spec in tensors.items():
        module, _, kind = name.removeprefix(stem).partition(".")
        if name.startswith(stem) and kind in _KINDS:
            found[_canonical(module, kind)] = _whole(spec)
    for depth in range(len(outer) - 1, -1, -1):
        for leaf in (_HEAD, "output"):
            for kind in _KINDS:
                spec_or_none = tensors.get(".".join([*outer[:depth], leaf, kind]))
                if spec_or_none is not None:
                    found.setdefault(_canonical(leaf, kind), _whole(spec_or_none))
    return {name: place for name, place in found.items() if 0 not in place.shape}


def _canonical(module: str, kind: str) -> str:
    name = _ALIASES.get(module, module)
    return name if kind == "weight" else f"{name}.{kind}"


def _parts(rest: str, spec: TensorSpec, known: Heads | None) -> dict[str, Place]:
    """Return the logical weights in a tensor of a layer; a fused bias holds several."""
    module = rest.removesuffix(".bias")
    if module != rest and module.rpartition(".")[2] in FUSED and len(spec.shape) == 1:
        column = replace(spec, shape=(*spec.shape, 1))
        split = places(module, column, [] if known is None else [known])
        if all(each.run == each.shape[0] for each in split.values()):
            return {
                f"{part}.bias": Place(spec, (1, each.shape[0]), each.first, 1, 1)
                for part, each in split.items()
            }
    return {rest: _whole(spec)}


def _whole(spec: TensorSpec) -> Place:
    """Return the place of a whole tensor as a matrix, in which a vector is one row."""
    rows = spec.shape[0] if len(spec.shape) > 1 else 1
    return Place(spec, (rows, math.prod(spec.shape) // max(1, rows)), 0, rows, rows)


def _own_or_tied(
    name: str,
    role: str,
    roles: Mapping[str, Checkpoint],
    places_of: Mapping[str, Mapping[str, Place]],
) -> Place | None:
    """Return a role's place of a name; that of its embedding for a head that is tied to it."""
    place, config = places_of[role].get(name), roles[role].config or {}
    tied = text_config(roles[role]).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if place is None and name == _HEAD and tied is not False:
        return places_of[role].get(_EMBEDDING)
    return place


def _fault(
    theirs: Mapping[str, Place | None], roles: Mapping[str, Checkpoint], is_vocabulary: bool
) -> str:
    """Say why a weight cannot be merged, or nothing; vocabularies may differ in their rows."""
    ours = theirs["mllm"]
    first = 1 if is_vocabulary else 0
    for role, place in theirs.items():
        if place is None:
            return f"the {title(role)} lacks them"
        if fault := roles[role].fault(place.tensor):
            return f"the {title(role)} {fault}"
        if ours is not None and place.shape[first:] != ours.shape[first:]:
            return f"their shapes in the {title(role)} differ"
    return ""


def _vocabulary(
    theirs: Mapping[str, Place | None], tokens: Mapping[str, Tokens]
) -> tuple[str, dict[str, Place | None]]:
    """Cut a vocabulary to the rows of tokens that all roles have, or say why it stays."""
    moved = [role for role, each in tokens.items() if each.moved and role in theirs]
    counts = [place.shape[0] for place in theirs.values() if place is not None]
    rows = int(min(*counts, tokens["mllm"].added)) if "mllm" in tokens else min(counts)
    if moved or not rows:
        reason = f"the tokenizer of the {title(moved[0])} gives tokens other ids" if moved else ""
        return reason or "no token of the MLLM is one of the base's", {}
    return "", {
        role: place and replace(place, shape=(rows, place.shape[1]), run=rows, period=rows)
        for role, place in theirs.items()
    }
