"""Find the weights of a live model that a prior tells of, by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lean_merge.checkpoints import Checkpoint, TensorSpec
from lean_merge.drift.prior import Prior
from lean_merge.drift.rectangles import Rectangle, blocks_of
from lean_merge.drift.shards import box_of, is_spread
from lean_merge.errors import CoverageError, RecipeError, shown
from lean_merge.mapping import stated_heads
from lean_merge.mapping.placement import Heads
from lean_merge.mapping.structure import Decoder, Key, Parts, decoders

FROZEN = "frozen"
"""The reason of weights that need no gradient."""
_WRAPPERS = re.compile(
    r"\b(_orig_mod|_checkpoint_wrapped_module|base_layer|modules_to_save\.[^.]+)\."
)
"""Parts of names that torch.compile, activation checkpointing and PEFT put in."""
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of a change s B A that PEFT trains beside a weight.

    Attributes
    ----------
    module
        PEFT's module, which has the weight as its base layer.
    adapter
        The adapter's name.
    """

    module: Any
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """Return A [r, in]."""
        found: nn.Parameter = self.module.lora_A[self.adapter].weight
        return found

    @property
    def b(self) -> nn.Parameter:
        """Return B [out, r]."""
        found: nn.Parameter = self.module.lora_B[self.adapter].weight
        return found

    @property
    def scale(self) -> float:
        """Return s."""
        return float(self.module.scaling[self.adapter])

    @property
    def trained(self) -> list[nn.Parameter]:
        """Return those of A and B that are trained."""
        return [each for each in (self.a, self.b) if each.requires_grad]


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor of the model.

    Attributes
    ----------
    name, parameter
        Its name in the model, and the tensor itself.
    shape
        Its shape as a weight, also where it is stored quantised.
    owner
        PEFT's module that has it as its base layer, if any.
    pairs
        The factors that are trained beside it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    owner: Any = None
    pairs: tuple[Pair, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Return whether the weight changes in training, whole or by factors."""
        return bool(self.pairs) or self.parameter.requires_grad


@dataclass(frozen=True, slots=True)
class Match:
    """One logical weight that is pulled.

    Attributes
    ----------
    name
        Its canonical name, such as "layers.0.self_attn.q_proj".
    live
        The model's tensor that holds it.
    blocks
        Where it lies there, as far as this process holds it.
    source, stored
        The prior's tensor that holds its difference, and where it lies there.
    """

    name: str
    live: LiveTensor
    blocks: tuple[Rectangle, ...]
    source: str
    stored: tuple[Rectangle, ...]


@dataclass(slots=True)
class Matches:
    """All weights that are pulled, and the names of those that are not, by the reason."""

    pulled: list[Match] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, name: str) -> None:
        """Note that the weight `name` is not pulled."""
        self.left.setdefault(reason, []).append(name)


def match(model: nn.Module, prior: Prior, *, allow_partial: bool) -> Matches:
    """Find the model's weight for every one that the prior tells of, and the other way round.

    Raises
    ------
    CoverageError
        The model has no weight, or several, for one of the prior's, or one in scope that the prior
        lacks, or shapes differ. With `allow_partial` it is raised only if nothing is left.
    RecipeError
        The model is trained in a way that cannot be pulled.
    """
    tensors = {_WRAPPERS.sub("", each.name): each for each in _tensors(model)}
    config = _config(model)
    heads = _heads(config)
    theirs = _of_prior(prior, heads)
    shapes = {name: each.shape for name, each in tensors.items()}
    ours = _like(theirs, decoders(_specs(shapes), heads), Parts(config), prior)
    found, faults = Matches(), list[str]()
    for key, stored in theirs.weights.items():
        name, place = _canonical(key), ours.weights.get(key)
        if place is None:
            faults.append(f"{name}: the model lacks it, the prior has it in {stored.tensor.name}")
        elif place.shape != stored.shape:
            sizes = f"{list(place.shape)} in the model and {list(stored.shape)} in the prior"
            faults.append(f"{name}: its shape is {sizes}")
        elif _checked(live := tensors[place.tensor.name]).is_trained:
            blocks = blocks_of(place, None if live.pairs else box_of(live.parameter))
            found.pulled.append(Match(name, live, blocks, stored.tensor.name, blocks_of(stored)))
        else:
            found.leave(FROZEN, name)
    foreign = _foreign_layers(ours, theirs)
    for key, place in ours.weights.items():
        live = tensors[place.tensor.name]
        if key in theirs.weights or not live.is_trained:
            continue
        if key[0] in foreign:
            found.leave("in a layer of a kind that the prior lacks", _canonical(key))
        else:
            faults.append(f"{_canonical(key)}: the prior lacks it, the model trains {live.name}")
    for role, decoder in (("model", ours), ("prior", theirs)):
        faults += [f"{name}: the {role} has it {why}" for name, why in decoder.unclear.items()]
    if faults and not (allow_partial and found.pulled):
        raise CoverageError(_message(faults, prior))
    for fault in faults:
        found.leave("not in both", fault)
    if not found.pulled:
        raise CoverageError(
            f"{prior.path}: all {len(found.left[FROZEN])} weights that the prior tells of are "
            "frozen in the model; train some of them, whole or by LoRA."
        )
    return found


def _message(faults: Sequence[str], prior: Prior) -> str:
    listed = "".join(f"\n  {each}" for each in faults[:_LISTED])
    more = f"\n  ... and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return (
        f"{prior.path}: the prior and the model do not fit at {len(faults)} places, so these "
        f"weights would be trained without DRIFT:{listed}{more}\n"
        "Make the prior for this model, or go on without them with allow_partial=True."
    )


def _canonical(key: Key) -> str:
    return f"layers.{key[0]}.{key[1]}"


def _tensors(model: nn.Module) -> Iterator[LiveTensor]:
    """Yield the model's parameters, each once."""
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        modules[path] = module
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RecipeError(
                "The model is sharded by FSDP1 (FullyShardedDataParallel), which hides where its "
                "weights are; use FSDP2 (fully_shard, or fsdp_version 2 of accelerate)."
            )
        outer, _, last = path.rpartition(".")
        owner = modules[outer] if last == "base_layer" else None
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                pairs = tuple(_pairs(owner)) if leaf == "weight" else ()
                name = f"{path}.{leaf}" if path else leaf
                yield LiveTensor(name, parameter, _shape(module, parameter), owner, pairs)


def _shape(module: Any, parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter as a weight; a layer of packed numbers states it."""
    if not parameter.is_floating_point():
        sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if all(isinstance(each, int) for each in sizes):
            return sizes  # type: ignore[return-value]
    return tuple(parameter.shape)


def _pairs(owner: Any) -> Iterator[Pair]:
    """Yield the factors of every adapter that a module of PEFT uses, if they are trained."""
    factors = getattr(owner, "lora_A", None)
    for adapter in getattr(owner, "active_adapters", ()) if isinstance(factors, nn.Module) else ():
        if adapter in owner.lora_A and (pair := Pair(owner, adapter)).trained:
            yield pair


def _checked(live: LiveTensor) -> LiveTensor:
    """Return the tensor, or raise RecipeError if it is trained in a way that cannot be pulled."""
    name, parameter, owner = shown(live.name), live.parameter, live.owner
    if hasattr(parameter, "ds_id"):
        raise RecipeError(
            f"{name} is partitioned by DeepSpeed ZeRO-3, which takes gradients away before an "
            "optimizer's step; use FSDP2 (fully_shard) or DDP."
        )
    if parameter.is_meta or any(each.is_meta for pair in live.pairs for each in pair.trained):
        raise RecipeError(f"{name} is on the meta device; load the model's weights first.")
    if is_spread(parameter):
        placements: Any = getattr(parameter, "placements", ())
        if not all(each.is_shard() or each.is_replicate() for each in placements):
            raise RecipeError(f"{name} is spread as {placements}, which cannot be pulled.")
    if owner is None:
        return live
    variants = {**getattr(owner, "lora_variant", {})}
    if len(getattr(owner, "lora_magnitude_vector", ())) or variants:
        kinds = {type(each).__name__ for each in variants.values()} or {"DoRA"}
        raise RecipeError(
            f"{name} is trained by a variant of LoRA ({', '.join(sorted(kinds))}): DoRA and the "
            "like do not train W + s B A, so DRIFT cannot act on them; use plain LoRA."
        )
    known = {id(each) for pair in live.pairs for each in (pair.a, pair.b)}
    unknown = [
        each
        for each, trained in owner.named_parameters()
        if trained.requires_grad and id(trained) not in known and not each.endswith("bias")
    ]
    if unknown and (live.pairs or not live.parameter.requires_grad):
        raise RecipeError(
            f"{name} is trained by {unknown[0]}, on which DRIFT cannot act; train the weight "
            "itself or plain LoRA factors of it, not both."
        )
    if live.pairs and live.shape != (live.pairs[0].b.shape[0], live.pairs[0].a.shape[1]):
        raise RecipeError(
            f"{name} is stored as [in, out], and DRIFT acts on LoRA of [out, in] alone; train it "
            "whole."
        )
    return live


def _config(model: nn.Module) -> Mapping[str, Any]:
    """Return the configuration of the model inside its wrappers; it may be empty."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            found: Mapping[str, Any] = config.to_dict()
            return found
    return {}


def _heads(config: Mapping[str, Any]) -> list[Heads]:
    known = stated_heads(Checkpoint("the model", Path(), {}, config, ()))
    return [] if known is None else [known]


def _specs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, "F32", each, Path(), 0, 0) for name, each in shapes.items()}


def _of_prior(prior: Prior, heads: Sequence[Heads]) -> Decoder:
    """Return the layers that a prior tells of. Raises CoverageError unless it is one model's."""
    found = decoders(_specs({name: each.shape for name, each in prior.weights.items()}), heads)
    if len(found) != 1:
        raise CoverageError(
            f"{prior.path}: the prior's weights are not those of one language model, but under "
            f"{', '.join(map(repr, sorted(found))) or 'no layers'}; make it again."
        )
    return next(iter(found.values()))


def _like(theirs: Decoder, every: Mapping[str, Decoder], parts: Parts, prior: Prior) -> Decoder:
    """Return the part of the model that has most of the prior's weights, in their shapes."""
    scores = {}
    for prefix, each in every.items():
        shared = [key for key in theirs.weights if key in each.weights]
        equal = [key for key in shared if each.weights[key].shape == theirs.weights[key].shape]
        if shared and parts.is_language(prefix):
            scores[prefix] = len(equal), len(shared)
    best = [prefix for prefix in scores if scores[prefix] == max(scores.values())]
    if len(best) == 1:
        return every[best[0]]
    if best:
        raise CoverageError(
            f"{prior.path}: the model has several language models that are equally like the "
            f"prior's, under {', '.join(map(repr, sorted(best)))}; pass the one that is meant."
        )
    wanted = ", ".join(shown(name) for name in list(prior.weights)[:3])
    layers = ", ".join(map(repr, sorted(every))) or "no prefix"
    raise CoverageError(
        f"{prior.path}: none of the weights that the prior tells of, such as {wanted}, is in the "
        f"model, which has layers under {layers}; pass the model that the prior was made for."
    )


def _foreign_layers(ours: Decoder, theirs: Decoder) -> set[int]:
    """Return the model's layers that the prior has nothing of and that are of another kind.

    An MLLM may have layers of cross-attention between those of its base.
    """
    known = theirs.rests()
    common = frozenset.intersection(*known.values())
    return {n for n, rests in ours.rests().items() if n not in known and not common <= rests}
