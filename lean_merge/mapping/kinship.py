"""Judge by configurations and tokenizers whether two models were tuned from one foundation."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, shown
from lean_merge.mapping.placement import INTERLEAVED_QKV, QKV, Heads
from lean_merge.mapping.structure import Decoder

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_MAX_TOKENIZER = 100_000_000
_TOKENIZER_MEMORY = 1 << 30
"""Bytes that parsing a tokenizer may take; the largest real ones, of 33 MB, need three quarters."""
_CHUNK = 1 << 20
HEADS = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head size",
}


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model; it may be empty."""
    config = checkpoint.config or {}
    for key in ("thinker_config", *_TEXT_CONFIGS):
        inner = config.get(key)
        if isinstance(inner, dict):
            config = inner
    return config


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
    if ours and theirs and ours != theirs:
        warnings.append(
            f"rope_theta is {plain_theta(ours)} in the base and {plain_theta(theirs)} in the "
            f"{role}; the merged model keeps the MLLM's."
        )
    act, other_act = (text_config(each).get("hidden_act") for each in (base, other))
    if isinstance(act, str) and isinstance(other_act, str) and act != other_act:
        warnings.append(
            f"hidden_act is {shown(act)} in the base and {shown(other_act)} in the {role}."
        )
    return warnings


def rope_theta(checkpoint: Checkpoint) -> dict[str, float]:
    """Return rope_theta by kind of layer; the only kind is "" if all layers share it."""
    config = text_config(checkpoint)
    parameters = config.get("rope_parameters")
    places = {"": config}
    if isinstance(parameters, dict):
        places = {"": parameters} | {k: v for k, v in parameters.items() if isinstance(v, dict)}
    found = {kind: place.get("rope_theta") for kind, place in places.items()}
    found = found if any(found.values()) else {"": config.get("rope_theta")}
    # An integer beyond the range of floats is not a frequency.
    return {
        k: float(v)
        for k, v in found.items()
        if isinstance(v, (int, float)) and abs(v) <= sys.float_info.max
    }


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
    ours: dict[str, int] = {}
    for role, other in others.items():
        found[role] = Tokens()
        theirs_digest = digest if digest is None else _tokenizer_digest(other)
        if theirs_digest is not None and theirs_digest != digest:
            ours = ours or vocabulary(base)
            theirs = vocabulary(other)
            common = ours.keys() & theirs.keys()
            moved = sum(ours[token] != theirs[token] for token in common)
            own = (theirs[token] for token in theirs.keys() - common)
            found[role] = Tokens(len(common), moved, min(own if ours else (), default=math.inf))
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
        with open(checked_file(checkpoint.path, file), "rb") as stream:
            for _ in range(0, _MAX_TOKENIZER, _CHUNK):
                digest.update(stream.read(_CHUNK))
            return None if stream.read(1) else digest.digest()
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}); check its rights."
        ) from error


def vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """Return token ids by token, as far as tokenizer.json can be understood."""
    try:
        content = read_object(
            checkpoint.path / "tokenizer.json",
            limit=_MAX_TOKENIZER,
            what="tokenizer",
            mend="",
            unique=False,
            memory=_TOKENIZER_MEMORY,
        )
    except CheckpointError:
        return {}
    result: dict[str, int] = {}
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        result.update({k: v for k, v in vocabulary.items() if type(v) is int})
    elif isinstance(vocabulary, list):
        for place, item in enumerate(vocabulary):
            if isinstance(item, list) and item and isinstance(item[0], str):
                result[item[0]] = place
    added = content.get("added_tokens")
    for item in added if isinstance(added, list) else []:
        if isinstance(item, dict) and isinstance(item.get("content"), str):
            if type(item.get("id")) is int:
                result[item["content"]] = item["id"]
    return result
