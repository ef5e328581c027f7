"""Map each in-scope weight of the base to its counterparts in the MLLM and every expert."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lean_merge.checkpoints.checkpoint import Checkpoint, by_role
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.errors import CoverageError, RecipeError, shown
from lean_merge.mapping.experts import map_expert
from lean_merge.mapping.gate import Faults, check_heads, check_roles, locate, report, title
from lean_merge.mapping.kinship import compare_tokens, config_warnings, tokenizer_warnings
from lean_merge.mapping.placement import FUSED
from lean_merge.mapping.scopes import MATRICES, finder_of
from lean_merge.mapping.structure import Decoder, Key, nature
from lean_merge.mapping.weights import LogicalWeight, MappedWeight, task_vectors

NameRules = tuple[tuple[str, str], ...]
"""(pattern, template) pairs; the first pattern that is found in a name decides."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The weights that will be merged, and what the caller should know about them.

    Attributes
    ----------
    weights
        The MLLM's tensors in scope, in their order.
    left_out
        With `allow_partial`, a line for each in-scope weight that could not be mapped.
    prefixes
        The prefix of each role's language model, by role: "base", "mllm", "expert 1", ...
    natures
        What each role looks like, in words, such as "text and vision (model.visual)".
    warnings
        Sentences about what may cost quality.
    """

    weights: tuple[MappedWeight, ...]
    left_out: tuple[str, ...]
    prefixes: Mapping[str, str]
    natures: Mapping[str, str]
    warnings: tuple[str, ...]


def map_roles(
    base: Checkpoint,
    mllm: Checkpoint,
    experts: Sequence[Checkpoint],
    parents: Mapping[int, Checkpoint] = MappingProxyType({}),
    *,
    allow_partial: bool = False,
    allow_text_mllm: bool = False,
    names: Mapping[str, NameRules] = MappingProxyType({}),
    scope: str = "matrices",
) -> Coverage:
    """Map every in-scope weight of the base, or say why that cannot be done.

    In scope are all matrices in the layers of the language model, experts of a mixture included,
    however they are stored, but for what `NO_MATRICES` and `NO_MODULES` name, such as norms and
    routers. With scope "language" these are joined by norms, biases, routers, embeddings and head,
    as far as all roles have them in one shape. Nothing outside the language model is.

    Parameters
    ----------
    base
        The language model that the others were tuned from.
    mllm
        The multimodal model; the base itself if that receives.
    experts
        Language models tuned from `base`, or adapters of it.
    parents
        The models that experts were tuned from, if not from the base, by the experts' numbers.
    allow_partial
        Whether to leave out weights that do not map, instead of raising.
    allow_text_mllm
        Whether to take an MLLM of text alone although another role has vision or audio.
    names
        The rules that turn a role's names into the base's, by role: "mllm", "expert 1", "base".
        `renamed` explains them.
    scope
        "matrices" or "language".

    Raises
    ------
    RecipeError
        `names` does not fit the checkpoints.
    CoverageError
        A weight has no counterpart of its shape in some role, the roles have different heads, the
        language model cannot be told from other parts, roles look exchanged, or nothing maps at
        all.
    """
    roles = by_role(base, mllm, experts, parents)
    others = {"mllm": mllm, **roles}
    del others["base"]
    _refuse_parents_of_adapters(experts, parents)
    whole = {role: each for role, each in others.items() if each.adapter is None}
    named = {role: renamed(roles[role], role, names[role]) for role in names}
    models = {"base", *whole}
    if not allow_text_mllm and mllm is not base:
        check_roles({"base": base, **whole})
    found = locate(base, whole, {role: each for role, each in named.items() if role in models})
    faults = Faults()
    for role, decoder in found.items():
        faults.check_decoder(role, decoder, found["base"])
        faults.check_surplus(role, decoder, found["base"])
    adapters = {
        role: map_expert(role, each, roles, found, faults, named.get(role, each.tensors))
        for role, each in others.items()
        if each.adapter is not None
    }
    attached = {
        role: map_expert(role, each.attached, roles, found, faults, each.attached.tensors)
        for role, each in whole.items()
        if each.attached is not None
    }
    mapped: dict[Key, LogicalWeight] = {}
    for key, place in found["base"].weights.items():
        theirs = {
            role: faults.counterpart(role, each, found[role], key, place)
            for role, each in whole.items()
        }
        present = {role: each for role, each in theirs.items() if each is not None}
        if (fault := base.fault(place.tensor)) is not None:
            faults.add("base", key, fault)
        elif len(present) == len(theirs):
            ours = base.rows(place)
            rows = {
                role: adapters[role].task_vector(key, ours)
                if role in adapters
                else attached[role].added(key, each.rows(present[role]))
                if role in attached
                else each.rows(present[role])
                for role, each in others.items()
            }
            experts_rows = task_vectors(rows)
            receiving = ours if mllm is base else mllm.rows(present["mllm"])
            mapped[key] = LogicalWeight(
                f"layers.{key[0]}.{key[1]}", present["mllm"], ours, receiving, experts_rows
            )
    weights = _by_tensor(found["mllm"], mapped, faults)
    if faults.lines and not (allow_partial and weights):
        raise CoverageError(report(faults, {"base": base, **whole}, found, mapped=len(weights)))
    check_heads(base, whole)
    warnings = _scope_warnings(found["base"], found["mllm"])
    warnings += [
        line for each in (*adapters.values(), *attached.values()) for line in each.warnings
    ]
    for role, other in others.items():
        warnings += config_warnings(base, other, title(role))
    tokens = compare_tokens(base, others)
    warnings += tokenizer_warnings({title(role): each for role, each in tokens.items()})
    if scope != MATRICES:
        every = {"base": base, **whole}
        tensors = {role: named.get(role, each.tensors) for role, each in every.items()}
        beside, told = finder_of(scope)(every, others, tensors, found, tokens)
        weights |= beside
        warnings += told
    return Coverage(
        weights=tuple(weights[name] for name in mllm.tensors if name in weights),
        left_out=tuple(faults.lines),
        prefixes=MappingProxyType(
            {
                role: each.prefix
                for role, each in found.items()
                if role != "mllm" or mllm is not base
            }
            | {role: each.prefix for role, each in adapters.items()}
        ),
        natures=MappingProxyType(
            {role: nature(each) if role in models else "an adapter" for role, each in roles.items()}
        ),
        warnings=tuple(warnings),
    )


def _refuse_parents_of_adapters(
    experts: Sequence[Checkpoint], parents: Mapping[int, Checkpoint]
) -> None:
    for number in parents:
        if experts[number - 1].adapter is not None:
            raise CoverageError(
                f"{experts[number - 1].source}: expert {number} is an adapter, which is the "
                "difference from its own parent already; leave out the expert's parent."
            )


def _by_tensor(
    mllm: Decoder, mapped: Mapping[Key, LogicalWeight], faults: Faults
) -> dict[str, MappedWeight]:
    """Return the stored tensors of the MLLM whose weights are all mapped, by name.

    A tensor that holds a weight that does not map is left alone as a whole.
    """
    parts: dict[TensorSpec, list[Key]] = {}
    for key, place in mllm.weights.items():
        parts.setdefault(place.tensor, []).append(key)
    weights = {}
    for tensor, keys in parts.items():
        slices = tuple(mapped[key] for key in keys if key in mapped)
        if len(slices) == len(keys):
            weights[tensor.name] = MappedWeight(tensor, slices)
        elif slices:
            faults.lines.append(
                f"{tensor.name}: left as it is, because {len(keys) - len(slices)} of the "
                f"{len(keys)} weights in it do not map"
            )
    return weights


def _scope_warnings(base: Decoder, mllm: Decoder) -> list[str]:
    """Warn of fused weights that are merged as one, and of layers that are only copied."""
    unsplit = Counter(rest.rpartition(".")[2] for _, rest in base.weights)
    warnings = [
        f"{unsplit[leaf]} fused {leaf} weights are merged as one matrix each, because nothing says "
        "which of their rows belong to which projection."
        for leaf in sorted(FUSED & unsplit.keys())
    ]
    if mllm.extra:
        warnings.append(
            f"{len(mllm.extra)} layers of the MLLM, such as {mllm.prefix}{mllm.extra[0]}, are of a "
            "kind that the base lacks; they are copied as they are, and the others counted without "
            "them."
        )
    return warnings


def renamed(checkpoint: Checkpoint, role: str, rules: NameRules) -> Mapping[str, TensorSpec]:
    """Return all tensors of a checkpoint by the names that the rules give them.

    Where a rule's pattern is first found in a name, the template takes its place, as in `re.sub`.
    A tensor that no rule fits keeps its name.

    Raises
    ------
    RecipeError
        A rule fits no tensor, a template cannot be filled, or two tensors get one name.
    """
    compiled = [(re.compile(pattern), template) for pattern, template in rules]
    unused = [pattern for pattern, _ in rules]
    tensors: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.tensors.items():
        new = name
        for pattern, template in compiled:
            new, found = pattern.subn(template, name, count=1)
            if found:
                unused = [each for each in unused if each != pattern.pattern]
                break
        if new in tensors:
            raise RecipeError(
                f"names.{role}: {shown(tensors[new].name)} and {shown(name)} of "
                f"{checkpoint.source} both become {shown(new)}; make the patterns tell them "
                "apart."
            )
        tensors[new] = spec
    if unused:
        examples = ", ".join(shown(name) for name in list(checkpoint.tensors)[:3])
        raise RecipeError(
            f"names.{role}: the pattern {shown(unused[0])} is the first to fit for no tensor of "
            f"{checkpoint.source}, whose names are like {examples}; correct it or leave it out."
        )
    return tensors
