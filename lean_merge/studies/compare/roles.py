"""Describe a model before any weight is read: by its sizes, positions, tokenizer and formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lean_merge.checkpoints import Checkpoint
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.errors import CheckpointError, CoverageError, shown
from lean_merge.mapping.gate import locate, title
from lean_merge.mapping.kinship import (
    heads,
    plain_theta,
    rope_theta,
    sizes,
)
from lean_merge.mapping.structure import Decoder, Parts, decoders, text_config

SIZES = "sizes"
POSITIONS = "positions"
TOKENIZER = "tokenizer"
FORMAT = "format"
_MAX_TOKENIZER = 100_000_000
_TOKENIZER_MEMORY = 1 << 30
"""Bytes that parsing one may take; the largest real ones, of 33 MB, need three quarters."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class RoleDescription:
    """The place of one role's language model, and its facts by (kind, words).

    `fault` says why no language model was found, or what else keeps its weights from being read.
    """

    role: str
    source: str
    prefix: str | None
    decoder: Decoder | None
    facts: Mapping[tuple[str, str], Any]
    tokens: Mapping[str, int]
    fault: str | None


def described_roles(
    checkpoints: Mapping[str, Checkpoint], named: Mapping[str, Mapping[str, TensorSpec]]
) -> list[RoleDescription]:
    """Describe all roles, the base first.

    Parameters
    ----------
    checkpoints
        The checkpoints by role: "base", "mllm", "expert 1", ...
    named
        For roles that the recipe renames, the tensors by their new names.
    """
    return [_described(role, checkpoints, named) for role in checkpoints]


def _described(
    role: str,
    checkpoints: Mapping[str, Checkpoint],
    named: Mapping[str, Mapping[str, TensorSpec]],
) -> RoleDescription:
    checkpoint = checkpoints[role]
    decoder, fault = None, None
    if checkpoint.adapter is not None:
        base = checkpoint.adapter.base
        fault = f"is an adapter{'' if base is None else f' of {shown(base)}'}, not a whole model"
    else:
        decoder = _language_model(role, checkpoints, named)
        fault = None if decoder else "has no layers that look like a language model's"
    return RoleDescription(
        role=role,
        source=checkpoint.source,
        prefix=decoder.prefix if decoder else None,
        decoder=decoder,
        facts=_facts(checkpoint, decoder),
        tokens=vocabulary(checkpoint),
        fault=fault,
    )


def _language_model(
    role: str,
    checkpoints: Mapping[str, Checkpoint],
    named: Mapping[str, Mapping[str, TensorSpec]],
) -> Decoder | None:
    """Return the layers that would be merged, or else the fullest layers that there are."""
    checkpoint = checkpoints[role]
    others = {} if role == "base" else {role: checkpoint}
    names = {each: named[each] for each in ("base", role) if each in named}
    try:
        return locate(checkpoints["base"], others, names)[role]
    except CoverageError:
        own = heads(checkpoint)
        tensors = named.get(role, checkpoint.tensors)
        try:
            found = decoders(tensors, [] if own is None else [own])
        except CoverageError:
            return None
        parts = Parts(checkpoint.config)
        kept = [each for prefix, each in found.items() if parts.is_language(prefix)]
        return max(kept, key=Decoder.rank, default=None)


def _facts(checkpoint: Checkpoint, decoder: Decoder | None) -> dict[tuple[str, str], Any]:
    """Return the facts that are known; others are absent."""
    config = text_config(checkpoint)
    found: dict[tuple[str, str], Any] = {}
    if decoder is not None:
        found.update({(SIZES, words): n for words, n in sizes(checkpoint, decoder).items()})
        dtypes = Counter(place.tensor.dtype for place in decoder.weights.values())
        found[FORMAT, "dtype"] = ", ".join(dtype for dtype, _ in dtypes.most_common())
    rows = _vocabulary_rows(checkpoint)
    if rows is not None:
        found[SIZES, "vocabulary rows"] = rows
    thetas = rope_theta(checkpoint)
    if thetas:
        found[POSITIONS, "rope_theta"] = plain_theta(thetas)
    scaling = _scaling(config)
    if scaling is not None:
        found[POSITIONS, "rope scaling"] = scaling
    for key, words in (
        ("max_position_embeddings", "longest context"),
        ("sliding_window", "sliding window"),
    ):
        if type(config.get(key)) is int:
            found[POSITIONS, words] = config[key]
    for key, words in (("model_type", "architecture"), ("hidden_act", "activation")):
        if isinstance(config.get(key), str):
            found[FORMAT, words] = config[key]
    if isinstance(config.get("tie_word_embeddings"), bool):
        found[FORMAT, "tied embeddings"] = config["tie_word_embeddings"]
    return found


def _scaling(config: Mapping[str, Any]) -> str | None:
    """Return the kind of rope scaling and its factor, from old and new configurations."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if isinstance(found, dict):
            kind = found.get("rope_type", found.get("type"))
            factor = found.get("factor")
            if isinstance(kind, str) and kind != "default":
                known = isinstance(factor, (int, float)) and not isinstance(factor, bool)
                return f"{kind} by {factor:g}" if known else kind
    return None


def _vocabulary_rows(checkpoint: Checkpoint) -> int | None:
    for name, spec in checkpoint.tensors.items():
        if name.endswith(_EMBEDDINGS) and len(spec.shape) == 2:
            return int(spec.shape[0])
    return None


def tokenizer_facts(roles: list[RoleDescription]) -> list[dict[str, Any]]:
    """For each role except the base, count its tokens, those shared, and those with another id."""
    base = roles[0].tokens
    rows = []
    for each in roles[1:]:
        common = base.keys() & each.tokens.keys()
        rows.append(
            {
                "role": each.role,
                "tokens": len(each.tokens) or None,
                "base_tokens": len(base) or None,
                "shared": len(common) if base and each.tokens else None,
                "moved": sum(base[token] != each.tokens[token] for token in common)
                if base and each.tokens
                else None,
            }
        )
    return rows


def differences(
    roles: list[RoleDescription], tokenizers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the facts that differ between some role and the base, sizes first."""
    base = roles[0]
    order = {kind: n for n, kind in enumerate((SIZES, POSITIONS, TOKENIZER, FORMAT))}
    keys = dict.fromkeys(key for each in roles for key in each.facts)
    found = [
        {
            "kind": kind,
            "what": words,
            "values": {each.role: each.facts.get((kind, words)) for each in roles},
        }
        for kind, words in keys
        if any(_differ(kind, base.facts, each.facts, words) for each in roles[1:])
    ]
    for row in tokenizers:
        changed = row["moved"] or (row["tokens"] or 0) != row["shared"]
        if row["shared"] is not None and (changed or row["base_tokens"] != row["shared"]):
            found.append(
                {
                    "kind": TOKENIZER,
                    "what": f"tokens of the {title(row['role'])}",
                    "values": {
                        "base": row["base_tokens"],
                        row["role"]: f"{row['tokens']}, {row['shared']} shared, "
                        f"{row['moved']} of them with another id",
                    },
                }
            )
    return sorted(found, key=lambda each: order[each["kind"]])


def _differ(
    kind: str,
    ours: Mapping[tuple[str, str], Any],
    theirs: Mapping[tuple[str, str], Any],
    words: str,
) -> bool:
    one, other = ours.get((kind, words)), theirs.get((kind, words))
    # A missing rope scaling means that there is none; a config may leave others to a default.
    if words == "rope scaling":
        return one != other
    return one is not None and other is not None and one != other


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
