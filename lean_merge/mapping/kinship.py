"""Judge by configurations and tokenizers whether two models were tuned from one foundation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.safepaths import checked_file, open_regular
from lean_merge.errors import CheckpointError, shown
from lean_merge.mapping.placement import INTERLEAVED_QKV, QKV, Heads
from lean_merge.mapping.structure import Decoder, text_config

_MAX_TOKENIZER = 100_000_000
_TOKENIZER_MEMORY = 1 << 30
"""Bytes that parsing a tokenizer may take; the largest real ones, of 33 MB, need three quarters."""
_CHUNK = 1 << 20
_LARGEST_ID = 1 << 62
_LONGEST_ITEM = 1 << 16
"""Bytes of one token with its id, at most."""
_STRING = rb'"((?:[^"\\]|\\.)*)"'
_SECTION = re.compile(rb'"(vocab|added_tokens)"\s*:\s*([{\[])')
_ITEMS = {
    b"vocab{": re.compile(rb"\s*" + _STRING + rb"\s*:\s*(\d{1,15})\s*([,}])"),
    b"vocab[": re.compile(rb"\s*\[\s*" + _STRING + rb"\s*,[^\[\]\"]*\]\s*([,\]])"),
    b"added_tokens[": re.compile(rb'\s*(\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\})\s*([,\]])'),
}
"""The items of the sections that hold tokens: objects by token, or lists in the order of ids."""
_ALIKE = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
"""Names of activations that compute the same as another."""
HEADS = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head size",
}


def head_counts(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the values of `HEADS` that the config states; those left to a default are absent."""
    config = text_config(checkpoint)
    stated = {key: config.get(key) for key in HEADS}
    return {key: value for key, value in stated.items() if type(value) is int and 0 < value < 2**31}


def heads(checkpoint: Checkpoint) -> Heads | None:
    """Return the heads of the language model; None if the config does not tell."""
    stated = head_counts(checkpoint)
    queries = stated.get("num_attention_heads")
    if queries is None:
        return None
    size = stated.get("head_dim")
    if size is None:
        hidden = text_config(checkpoint).get("hidden_size")
        if type(hidden) is not int:
            return None
        size = hidden // queries
    pairs = stated.get("num_key_value_heads", queries)
    return Heads(queries, pairs, size) if size > 0 and queries % pairs == 0 else None


def sizes(checkpoint: Checkpoint, decoder: Decoder) -> dict[str, int]:
    """Return the language model's sizes by words: heads are from its config, others from shapes."""
    result = {"number of layers": decoder.depth}
    for (_, rest), place in decoder.weights.items():
        rows, columns = place.shape
        leaf = rest.rsplit(".", 1)[-1]
        if leaf in {"q_proj", "k_proj", QKV, INTERLEAVED_QKV}:
            result.setdefault("hidden size", columns)
        if leaf == "k_proj":
            result.setdefault("key/value width", rows)
        if "expert" in rest:
            continue
        if leaf in {"gate_proj", "up_proj"}:
            result.setdefault("intermediate size", rows)
    result.update({HEADS[key]: value for key, value in head_counts(checkpoint).items()})
    return result


def config_warnings(base: Checkpoint, other: Checkpoint, role: str) -> list[str]:
    """Return a sentence for each difference that allows a merge but may cost quality."""
    warnings = []
    ours, theirs = rope_theta(base), rope_theta(other)
    kinds = ours.keys() | theirs.keys() if ours and theirs else ()
    if any(_of_kind(ours, kind) != _of_kind(theirs, kind) for kind in kinds):
        warnings.append(
            f"rope_theta is {plain_theta(ours)} in the base and {plain_theta(theirs)} in the "
            f"{role}; the merged model keeps the MLLM's."
        )
    act, other_act = _activation(base), _activation(other)
    if act and other_act and _ALIKE.get(act, act) != _ALIKE.get(other_act, other_act):
        warnings.append(
            f"hidden_act is {shown(act)} in the base and {shown(other_act)} in the {role}."
        )
    return warnings


def _activation(checkpoint: Checkpoint) -> str | None:
    config = text_config(checkpoint)
    stated = config.get("hidden_activation") or config.get("hidden_act")
    return stated if isinstance(stated, str) else None


def rope_theta(checkpoint: Checkpoint) -> dict[str, float]:
    """Return rope_theta by kind of layer; the only kind is "" if all layers share it.

    Configs of transformers 4 have values of their own for layers of sliding attention, those of
    version 5 the parameters of each kind.
    """
    config = text_config(checkpoint)
    parameters = config.get("rope_parameters") or config.get("rope_scaling")
    places = {"": config}
    if isinstance(parameters, dict):
        nested = {k: v for k, v in parameters.items() if isinstance(v, dict)}
        places |= nested or ({"": parameters} if "rope_theta" in parameters else {})
    found = {kind: place.get("rope_theta") for kind, place in places.items()}
    for key in ("rope_local_base_freq", "local_rope_theta"):
        if key in config:
            found.setdefault("sliding_attention", config[key])
            found.setdefault("full_attention", config.get("global_rope_theta", found[""]))
    if len(found) > 1:
        del found[""]
    # An integer beyond the range of floats is not a frequency.
    return {
        k: float(v)
        for k, v in found.items()
        if isinstance(v, (int, float)) and abs(v) <= sys.float_info.max
    }


def _of_kind(thetas: Mapping[str, float], kind: str) -> float | None:
    """Return the frequency of one kind of layer; None if the config states none for it."""
    return thetas.get(kind, thetas.get("") if kind else _only(thetas))


def _only(thetas: Mapping[str, float]) -> float | None:
    return next(iter(thetas.values())) if len(set(thetas.values())) == 1 else None


def plain_theta(thetas: Mapping[str, float]) -> str:
    """Return frequencies by kind of layer as they stand in a sentence."""
    return ", ".join(f"{kind} {value:g}".strip() for kind, value in thetas.items())


@dataclass(frozen=True, slots=True)
class Tokens:
    """The agreement of another tokenizer with the base's.

    Attributes
    ----------
    common, moved
        How many tokens both have, and how many of these have different ids.
    added : int
        The first id of a token that only the other has; infinity if it has none.
    """

    common: int = 0
    moved: int = 0
    added: float = math.inf


def compare_tokens(base: Checkpoint, others: Mapping[str, Checkpoint]) -> dict[str, Tokens]:
    """Compare each role's tokenizer with the base's, as far as both can be understood."""
    digest = _tokenizer_digest(base)
    found: dict[str, Tokens] = {}
    ours = None
    for role, other in others.items():
        found[role] = Tokens()
        theirs_digest = digest if digest is None else _tokenizer_digest(other)
        if theirs_digest is not None and theirs_digest != digest:
            ours = _token_ids(base) if ours is None else ours
            theirs = _token_ids(other)
            _, first, second = np.intersect1d(
                ours[0], theirs[0], assume_unique=True, return_indices=True
            )
            moved = int((ours[1][first] != theirs[1][second]).sum())
            own = np.delete(theirs[1], second) if len(ours[0]) else ours[1]
            added = float(own.min()) if own.size else math.inf
            found[role] = Tokens(len(first), moved, added)
    return found


def tokenizer_warnings(tokens: Mapping[str, Tokens]) -> list[str]:
    """Return a sentence for each role that says how many of the base's tokens have another id."""
    return [
        f"The tokenizers of base and {role} share {each.common} tokens, of which {each.moved} have "
        "different ids; the merged model keeps the MLLM's tokenizer."
        for role, each in tokens.items()
        if each.moved
    ]


def _tokenizer_digest(checkpoint: Checkpoint) -> bytes | None:
    """Return a digest of tokenizer.json; None if there is none that could be parsed."""
    file = checkpoint.path / "tokenizer.json"
    digest = hashlib.sha256()
    try:
        if not os.path.lexists(file):
            return None
        with open_regular(checked_file(checkpoint.path, file)) as stream:
            for _ in range(0, _MAX_TOKENIZER, _CHUNK):
                digest.update(stream.read(_CHUNK))
            return None if stream.read(1) else digest.digest()
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}); check its rights."
        ) from error


def _token_ids(checkpoint: Checkpoint) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return digests of the tokens in tokenizer.json, sorted, and their ids.

    Twelve bytes a token are kept, and the file is not parsed as a whole, which would take twenty
    times its size. What cannot be understood has no tokens.
    """
    found: dict[bool, tuple[array[int], array[int]]]
    found = {added: (array("Q"), array("q")) for added in (False, True)}
    with open_regular(checkpoint.path / "tokenizer.json") as stream:
        for token, place, added in _tokens(stream):
            if abs(place) > _LARGEST_ID:
                continue
            digest = hashlib.blake2b(token, digest_size=8).digest()
            found[added][0].append(int.from_bytes(digest, "little"))
            found[added][1].append(place)
    keys, ids = (np.concatenate([found[False][n], found[True][n]]) for n in (0, 1))
    # Of a token that is there twice the last id counts, and added tokens come last.
    unique, last = np.unique(keys[::-1], return_index=True)
    return unique, ids[::-1][last]


def _tokens(stream: IO[bytes]) -> Iterator[tuple[bytes, int, bool]]:
    """Yield each token, its id, and whether it was added; only a part of the file is in memory."""
    held, items, count, ended = b"", None, 0, False
    while not ended:
        part = stream.read(_CHUNK)
        held, at, ended = held + part, 0, not part
        while True:
            if items is None:
                start = _SECTION.search(held, at)
                if start is None:
                    at = max(at, len(held) - _LONGEST_ITEM)
                    break
                at, count, section = start.end(), 0, start[1] + start[2]
                items = _ITEMS.get(section)
                continue
            match = items.match(held, at)
            if match is None and len(held) - at < _LONGEST_ITEM and not ended:
                break
            if match is not None:
                at = match.end()
                yield from _token(section, match, count)
                count += 1
            if match is None or match[match.lastindex or 0] in b"}]":
                items = None
        held = held[at:]


def _token(section: bytes, match: re.Match[bytes], count: int) -> Iterator[tuple[bytes, int, bool]]:
    """Yield the token that was matched in a section, where it is the `count`-th, if it is one."""
    try:
        if section == b"added_tokens[":
            item = json.loads(match[1])
            if isinstance(item.get("content"), str) and type(item.get("id")) is int:
                yield item["content"].encode("utf-8", "surrogatepass"), item["id"], True
            return
        # Files may differ in what they escape.
        token = match[1]
        if b"\\" in token:
            token = json.loads(b'"%s"' % token).encode("utf-8", "surrogatepass")
        yield token, int(match[2]) if section == b"vocab{" else count, False
    except ValueError:
        return
