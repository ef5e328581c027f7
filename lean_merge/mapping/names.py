"""Map each in-scope weight of the base to its counterparts in the MLLM and every expert."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from lean_merge.checkpoints.checkpoint import Checkpoint, by_role
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader
from lean_merge.checkpoints.rows import DifferenceRows, Place, WeightSource
from lean_merge.errors import CoverageError, RecipeError, shown
from lean_merge.mapping.experts import ZeroRows, map_expert
from lean_merge.mapping.gate import Faults, check_heads, check_roles, locate, report, title
from lean_merge.mapping.kinship import compare_tokens, config_warnings, tokenizer_warnings
from lean_merge.mapping.placement import FUSED
from lean_merge.mapping.scopes import MATRICES, places_beside
from lean_merge.mapping.structure import Decoder, Key, language_layout, nature

__all__ = [
    "Coverage",
    "LogicalWeight",
    "MappedWeight",
    "language_layout",
    "layer_of",
    "map_roles",
]

NameRules = tuple[tuple[str, str], ...]
"""(pattern, template) pairs; the first pattern that is found in a name decides."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_of(canonical: str) -> int | None:
    """Return the layer's number in a weight's canonical name, from 0; None if it names no layer."""
    match = _LAYER.search(canonical)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class LogicalWeight:
    """One matrix of the model's mathematics, with the source of its rows in every role.

    Attributes
    ----------
    canonical
        Its name as Llama would have it, whatever the storage: "layers.3.self_attn.q_proj", with the
        number of the base's layer.
    place
        Its place in the MLLM's stored tensor, and therefore in the output.
    base, mllm
        Its rows in these roles, counted from 0; one object if the base receives.
    experts
        The same for each expert, in the caller's order.
    is_matrix
        Whether it is a matrix of attention or of a feed-forward layer.
    stays
        Why it always stays as the MLLM has it; empty for one that may be merged.
    """

    canonical: str
    place: Place
    base: WeightSource
    mllm: WeightSource
    experts: tuple[WeightSource, ...]
    is_matrix: bool = True
    stays: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the weight's out and in."""
        return self.base.shape

    @property
    def in_columns(self) -> bool:
        """Return whether the rows of any role are columns of what is stored."""
        return any(source.in_columns for source in self.roles)

    @property
    def others(self) -> tuple[WeightSource, ...]:
        """Return the roles that have a task vector: the MLLM, then the experts.

        If the base receives, there is no MLLM, and zeros take the place of its task vector.
        """
        if self.mllm is self.base:
            return ZeroRows(self.base, self.base.file), *self.experts
        return self.mllm, *self.experts

    @property
    def row_runs(self) -> tuple[tuple[int, int], ...]:
        """Return each run of its rows in the MLLM's stored matrix as (first, count), in order."""
        width = self.shape[1]
        spans = self.place.spans(slice(0, self.shape[0]))
        return tuple((first // width, count // width) for first, count in spans)

    def load(self, reader: TensorReader) -> LogicalWeight:
        """Return the same weight with all sources loaded; see `WeightSource.load`."""
        base = self.base.load(reader)
        return replace(
            self,
            base=base,
            mllm=base if self.mllm is self.base else self.mllm.load(reader),
            experts=tuple(expert.load(reader) for expert in self.experts),
        )

    @property
    def roles(self) -> tuple[WeightSource, ...]:
        """Return all roles, the base first."""
        return self.base, *self.others


@dataclass(frozen=True, slots=True)
class MappedWeight:
    """One stored tensor of the MLLM and the logical weights in it.

    Attributes
    ----------
    mllm
        The tensor.
    slices
        The logical weights that make up the tensor: a single one, or q, k and v, or gate and up, or
        those of many experts, or the rows of a vocabulary that are merged and those that stay.
    """

    mllm: TensorSpec
    slices: tuple[LogicalWeight, ...]

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """Return every tensor that is read to merge it, each once."""
        roles = (source for rows in self.slices for source in rows.roles)
        return tuple(dict.fromkeys(spec for source in roles for spec in source.stored))

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        """Return the parts of those tensors that are read, none of them twice."""
        return self.extents_of(role for each in self.slices for role in each.roles)

    @staticmethod
    def extents_of(sources: Iterable[WeightSource]) -> tuple[TensorSpec, ...]:
        """Return the parts of tensors that `sources` read, none of them twice."""
        found: list[TensorSpec] = []
        parts = {part for source in sources for part in source.extents}
        for part in sorted(parts, key=lambda each: (each.file, each.offset)):
            last = found[-1] if found else None
            if last is None or last.file != part.file or part.offset > last.offset + last.nbytes:
                found.append(part)
            else:
                end = max(part.offset + part.nbytes, last.offset + last.nbytes)
                found[-1] = replace(last, nbytes=end - last.offset)
        return tuple(found)


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
            experts_rows = _task_vectors(rows)
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
        shared, told = places_beside(scope)(every, tensors, found, tokens)
        more, rows_told = _beside(shared, every, others)
        weights |= more
        warnings += [*told, *rows_told]
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


def _task_vectors(rows: Mapping[str, WeightSource]) -> tuple[WeightSource, ...]:
    """Return the rows of the experts; those of one with a parent are the difference from it."""
    parents = {role: rows.get(f"parent of {role}") for role in rows if role.startswith("expert ")}
    return tuple(
        rows[role] if parent is None else DifferenceRows(rows[role], parent)
        for role, parent in parents.items()
    )


def _beside(
    shared: Mapping[str, Mapping[str, Place]],
    models: Mapping[str, Checkpoint],
    others: Mapping[str, Checkpoint],
) -> tuple[dict[str, MappedWeight], list[str]]:
    """Return the MLLM's tensors with the weights of `shared_places`, by name, and sentences.

    An adapter changes none of them.
    """
    parts: dict[TensorSpec, list[LogicalWeight]] = {}
    told = []
    for canonical, theirs in shared.items():
        place, ours = theirs["mllm"], models["base"].rows(theirs["base"])
        is_base = models["mllm"] is models["base"]
        rows_of = {
            role: models[role].rows(theirs[role])
            if role in theirs
            else ZeroRows(ours, each.files[0])
            for role, each in others.items()
        }
        experts = _task_vectors(rows_of)
        mllm = ours if is_base else models["mllm"].rows(place)
        of_tensor = parts.setdefault(place.tensor, [])
        of_tensor.append(LogicalWeight(canonical, place, ours, mllm, experts, is_matrix=False))
        (rows, width), stored = place.shape, place.tensor.shape
        if len(stored) == 2 and stored[0] > rows:
            left = stored[0] - rows
            place = Place(place.tensor, (left, width), rows * width, left, left)
            own, stays = models["mllm"].rows(place), "rows of tokens that not all models have"
            of_tensor.append(
                LogicalWeight(
                    f"{canonical}.added", place, own, own, (own,) * len(experts), False, stays
                )
            )
            told.append(f"{left} rows of {canonical} stay: not all models have their tokens.")
    return {each.name: MappedWeight(each, tuple(of)) for each, of in parts.items()}, told


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
