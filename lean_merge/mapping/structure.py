"""Find language models inside checkpoints by the structure of their tensors' names.

A decoder stores `<prefix>layers.<N>.<rest>`, and a vision tower often does too, with some of the
same leaves. The prefix does not tell them apart, because it changes between families and between
versions of one library. The set of names that make up a whole layer does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lean_merge.checkpoints.checkpoint import Checkpoint, language_configs
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place
from lean_merge.errors import CoverageError
from lean_merge.mapping.placement import (
    Heads,
    canonical,
    is_matrix,
    is_stack,
    places,
    stack_places,
)

_WEIGHT, _BIAS = ".weight", ".bias"
# To find the language model, every part (the tensors under one prefix) is compared with every
# other, and so is every kind of layer (a set of names). A hostile checkpoint with thousands of them
# would take hours; real ones have tens.
_MAX_PARTS = 100
_MAX_KINDS = 300
_LAYERS = "layers"

LANGUAGE = frozenset({"language", "text", "llm", "lm", "vlm", "thinker", "llama"})
MODALITIES: Mapping[str, frozenset[str]] = {
    "vision": frozenset(
        {"vision", "visual", "image", "img", "video", "pixel", "vit", "clip", "siglip", "dino"}
        | {"vpm"}
    ),
    "audio": frozenset(
        {"audio", "speech", "sound", "voice", "acoustic", "whisper", "conformer", "wav", "codec"}
        | {"talker", "code2wav", "token2wav", "tts", "vocoder", "mimi", "snac", "apm"}
    ),
}
_OTHERS = frozenset(
    {
        "tower",
        "qformer",
        "resampler",
        "perceiver",
        "projector",
        "connector",
        "merger",
        "adapter",
        "vq",
    }
    | {"mtp", "nextn", "depformer", "depth", "dit", "action", "expert", "sam", "eagle"}
)
"""Parts that no modality tells: bridges between parts, drafts of tokens, and generators."""
_NEUTRAL = frozenset({"encoder", "decoder", "model", "base", "backbone", "quantization", "rope"})
_TAILS = ("encoder", "decoder")

Key = tuple[int, str]
"""(layer, rest): a logical weight's place in a language model, whatever its prefix and storage."""


@dataclass(frozen=True)
class Decoder:
    """The tensors under one prefix of a checkpoint, if they look like layers.

    A tensor's name is the prefix, the layer's number and the rest. In keys, the rest is canonical.

    Attributes
    ----------
    prefix
        The names' beginning, up to and including "layers." or what stands for it.
    weights
        In-scope logical weights by (layer, rest), in the file's order.
    exact
        The keys of those weights whose stored name is the canonical one.
    unclear
        Tensors of stacked matrices whose logical weights cannot be told, by name, and why not.
    others
        Every other tensor by (layer, rest), of which ".weight" at its end is no part.
    extra
        The numbers of layers that the base does not have, which `numbered_as` leaves out.
    numbers
        The base's number of every other layer, where `numbered_as` gave it one.
    """

    prefix: str
    weights: dict[Key, Place] = field(default_factory=dict)
    exact: set[Key] = field(default_factory=set)
    unclear: dict[str, str] = field(default_factory=dict)
    others: dict[Key, TensorSpec] = field(default_factory=dict)
    extra: tuple[int, ...] = ()
    numbers: Mapping[int, int] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Return the number of layers."""
        return 1 + max((layer for layer, _ in self.weights), default=-1)

    def rests(self) -> dict[int, frozenset[str]]:
        """Return the rests of the in-scope weights of each layer."""
        found: dict[int, set[str]] = {}
        for layer, rest in self.weights:
            found.setdefault(layer, set()).add(rest)
        return {layer: frozenset(rests) for layer, rests in sorted(found.items())}

    @cached_property
    def layers(self) -> list[frozenset[str]]:
        """Return the distinct sets of rests that its layers are made of."""
        return sorted(set(self.rests().values()), key=lambda each: (-len(each), sorted(each)))

    def one_layer(self) -> frozenset[str]:
        """Return the rests of its fullest layer."""
        return self.layers[0]

    def has_whole_layer_of(self, other: Decoder) -> bool:
        """Return whether one layer here has every in-scope name of some layer of `other`."""
        mine = self.layers
        return any(theirs <= each for theirs in other.layers for each in mine)

    def rank(self) -> tuple[int, int]:
        """Return what ranks candidates: the names in the fullest layer, then the numbers in all."""
        return len(self.one_layer()), sum(math.prod(each.shape) for each in self.weights.values())

    def numbered_as(self, base: Decoder) -> Decoder:
        """Return this decoder with its layers numbered as the base numbers them.

        Cross-attention layers may stand between those that came from the base. Some
        names are common to all of the base's layers. If exactly as many layers as the base has
        contain these names, those are taken for the base's layers, in order.
        """
        common = frozenset.intersection(*base.layers)
        rests = self.rests()
        kept = [layer for layer, each in rests.items() if common and common <= each]
        if self.depth <= base.depth or len(kept) != base.depth:
            return self
        number = {layer: index for index, layer in enumerate(kept)}
        return replace(
            self,
            weights={(number[n], r): p for (n, r), p in self.weights.items() if n in number},
            exact={(number[n], rest) for n, rest in self.exact if n in number},
            others={(number[n], r): t for (n, r), t in self.others.items() if n in number},
            extra=tuple(layer for layer in rests if layer not in number),
            numbers=number,
        )

    def joined(self, other: Decoder, name: str) -> Decoder:
        """Return this decoder with the layers of its other half, whose keys begin with `name`."""
        return replace(
            self,
            weights=self.weights | {(n, f"{name}.{r}"): p for (n, r), p in other.weights.items()},
            exact=self.exact | {(n, f"{name}.{rest}") for n, rest in other.exact},
            unclear=self.unclear | other.unclear,
            others=self.others | {(n, f"{name}.{r}"): t for (n, r), t in other.others.items()},
        )


def split_name(name: str) -> tuple[str, int, str] | None:
    """Split "<prefix>layers.<layer>.<rest>" into its parts; return None if there is no number.

    Where nothing is called "layers", the first number in the name counts the layers:
    "lm.blocks.<layer>.<rest>".
    """
    parts = name.split(".")
    # The bound on digits keeps hostile names from becoming huge integers.
    numbered = [
        at
        for at in range(len(parts) - 2)
        if (number := parts[at + 1]).isascii() and number.isdigit() and len(number) <= 6
    ]
    if not numbered:
        return None
    at = next((each for each in numbered if parts[each] == _LAYERS), numbered[0])
    prefix = "".join(f"{part}." for part in parts[: at + 1])
    return prefix, int(parts[at + 1]), ".".join(parts[at + 2 :])


def decoders(tensors: Mapping[str, TensorSpec], heads: Sequence[Heads] = ()) -> dict[str, Decoder]:
    """Return all that may be the layers of a language model, by prefix. May raise CoverageError.

    Parameters
    ----------
    tensors
        The tensors by the names to use for them, which may differ from those on the disk.
    heads
        The possible numbers and sizes of attention heads, the likeliest first.
    """
    found: dict[str, Decoder] = {}
    stacks: dict[tuple[str, int, str], dict[str, str]] = {}
    renamed: list[tuple[Decoder, int, str, TensorSpec]] = []
    for name, spec in tensors.items():
        split = split_name(name)
        if split is None:
            continue
        prefix, layer, rest = split
        decoder = found.setdefault(prefix, Decoder(prefix))
        stem = rest.removesuffix(_WEIGHT)
        at = canonical(stem)
        if is_stack(stem, spec):
            parent, _, leaf = at.rpartition(".")
            stacks.setdefault((prefix, layer, parent), {})[leaf] = name
        elif not is_matrix(at, spec):
            named = stem if stem != rest else rest.removesuffix(_BIAS)
            decoder.others[layer, canonical(named) + stem[len(named) :]] = spec
        elif len(spec.shape) > 2:
            decoder.unclear[name] = f"of shape {list(spec.shape)} in a layout that is not known"
        elif at != stem:
            renamed.append((decoder, layer, stem, spec))
        else:
            for part, place in places(at, spec, heads).items():
                decoder.weights[layer, part] = place
                decoder.exact.add((layer, part))
    # Canonical names were entered first. If another name means the same, its tensor keeps it.
    for decoder, layer, stem, spec in renamed:
        parts = places(canonical(stem), spec, heads)
        if any((layer, part) in decoder.weights for part in parts):
            parts = places(stem, spec, heads)
        for part, place in parts.items():
            decoder.weights.setdefault((layer, part), place)
    for (prefix, layer, parent), names in stacks.items():
        _add_stack(found[prefix], layer, parent, names, tensors)
    kept = _with_encoders({prefix: each for prefix, each in found.items() if each.weights})
    if len(kept) > _MAX_PARTS or sum(len(each.layers) for each in kept.values()) > _MAX_KINDS:
        file = next(iter(tensors.values())).file
        raise CoverageError(
            f"{file.parent}: has layers under {len(kept)} prefixes, or of more than {_MAX_KINDS} "
            "kinds, which no model has; pass another checkpoint."
        )
    return kept


def _with_encoders(found: Mapping[str, Decoder]) -> dict[str, Decoder]:
    """Return the decoders, with the two halves of every encoder-decoder as one."""
    kept = dict(found)
    for prefix, decoder in found.items():
        start, middle, layers = tail(prefix)
        if middle == "decoder" and (half := f"{start}encoder.{layers}") in kept:
            kept[prefix] = decoder.joined(kept.pop(half), "encoder")
    return kept


def _add_stack(
    decoder: Decoder,
    layer: int,
    parent: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
) -> None:
    """Enter the weights of one layer's stacked experts, or say why they cannot be told."""
    stack = {leaf: tensors[name] for leaf, name in names.items()}
    reads = decoder.weights.get((layer, "self_attn.q_proj"))
    found = stack_places(stack, None if reads is None else reads.shape[1])
    for leaf, name in names.items():
        shapes = ", ".join(f"{each} {list(spec.shape)}" for each, spec in stack.items())
        if f"{name.removesuffix(_WEIGHT)}_bias" in tensors:
            decoder.unclear[name] = "with biases, whose gate and up rows may be interleaved"
        elif found is None:
            decoder.unclear[name] = f"with shapes that fit no layout, or more than one ({shapes})"
        else:
            for part, place in found[leaf].items():
                decoder.weights.setdefault((layer, f"{parent}.{part}"), place)


def language_layout(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Return the prefixes under which a language model may lie, and the layers of each.

    The likeliest comes first; towers that share leaf names follow.
    """
    found = sorted(decoders(checkpoint.tensors).values(), key=Decoder.rank, reverse=True)
    return {decoder.prefix: decoder.depth for decoder in found}


# --- parts of a model ------------------------------------------------------------------------


def _words(name: str) -> set[str]:
    """Return the words of a module's name, such as "vision" and "tower", and the name itself."""
    return {re.sub(r"\d+$", "", word) or word for word in name.lower().split("_")} | {name.lower()}


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model; it may be empty."""
    return language_configs(checkpoint.config)[-1]


def _stated(config: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the words by which the config names other parts, such as "audio" of audio_config."""
    found: set[str] = set()
    for key, value in (config or {}).items():
        words = _words(key.removesuffix("_config"))
        if key.endswith("_config") and isinstance(value, dict) and "model_type" in value:
            found |= set() if words & LANGUAGE else words - _NEUTRAL
        if key == "thinker_config" and isinstance(value, dict):
            found |= _stated(value)
    return frozenset(found)


class Parts:
    """Tells the parts of one model apart.

    Where several modules of a prefix tell something, the last of them decides: the language model
    of "vlm.language_model.", and the tower of "language_model.vision_tower.".
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self._stated = _stated(config)

    def kind(self, prefix: str) -> str:
        """Return "language", "vision", "audio" or "other"; or "" if no name tells."""
        for module in reversed(prefix.split(".")):
            words = _words(module)
            if words & LANGUAGE:
                return "language"
            for modality, known in MODALITIES.items():
                if words & known:
                    return modality
            if words & (_OTHERS | self._stated):
                return "other"
        return ""

    def is_language(self, prefix: str) -> bool:
        """Return whether the layers under a prefix may be those of a language model."""
        return self.kind(prefix) in ("", "language")


def modalities(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what the tensors show beside text: "vision", "audio", and an example of a name."""
    found: dict[str, str] = {}
    parts = Parts(checkpoint.config)
    for start in _starts(checkpoint.tensors):
        kind = parts.kind(start)
        if kind in MODALITIES:
            found.setdefault(kind, start)
    return {kind: found[kind] for kind in MODALITIES if kind in found}


def _starts(names: Iterable[str]) -> Iterator[str]:
    """Yield the beginnings of names, up to the first number or else the last module, once each."""
    found = dict.fromkeys(re.split(r"\.\d+\.|\.[^.]*$", name, maxsplit=1)[0] for name in names)
    return iter(found)


def nature(checkpoint: Checkpoint) -> str:
    """Describe a model in words: "text alone", or "text and vision (model.visual)"."""
    found = modalities(checkpoint)
    if found:
        return " and ".join(["text", *(f"{kind} ({where})" for kind, where in found.items())])
    named = [kind for kind in MODALITIES if f"{kind}_config" in (checkpoint.config or {})]
    if named:
        return f"text alone, though its config.json has a {named[0]}_config"
    return "text alone"


def tail(prefix: str) -> tuple[str, str, str]:
    """Split "model.encoder.layers." into "model.", "encoder" and "layers."; the middle may be "".

    Both halves of an encoder-decoder have the same beginning, and differ in the middle.
    """
    *before, layers, end = prefix.split(".")
    middle = before.pop() if before and before[-1] in _TAILS else ""
    return "".join(f"{module}." for module in before), middle, f"{layers}.{end}"
