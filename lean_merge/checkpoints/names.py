"""Whose weight is whose: maps each in-scope weight of the base to the MLLM and every expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from lean_merge.checkpoints.adaptermap import map_adapter
from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.dtypes import FLOATING
from lean_merge.checkpoints.gate import Faults, check_heads, locate, report, title
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.kinship import config_warnings, qkv_rows, tokenizer_warnings
from lean_merge.checkpoints.reader import TensorReader
from lean_merge.checkpoints.rows import PlainRows, WeightSource
from lean_merge.checkpoints.scaledrows import ScaledRows
from lean_merge.checkpoints.structure import (
    GATE_UP,
    INTERLEAVED_QKV,
    QKV,
    Decoder,
    Key,
    language_layout,
)
from lean_merge.errors import CoverageError

__all__ = ["Coverage", "LogicalWeight", "MappedWeight", "language_layout", "map_roles"]

Rows = Callable[[int, int], WeightSource]
"""Gives rows [first, first + count) of one role's tensor."""


@dataclass(frozen=True, slots=True)
class LogicalWeight:
    """One matrix of the model's mathematics, and how its rows are had in every role.

    Attributes
    ----------
    canonical
        Its name on the base's side without prefix and ".weight": "layers.3.self_attn.q_proj".
    start, stop
        Its rows in the MLLM's stored tensor, which is where they are written.
    base, mllm
        Its rows in these roles, counted from 0.
    experts
        The same for each expert, in the caller's order.
    """

    canonical: str
    start: int
    stop: int
    base: WeightSource
    mllm: WeightSource
    experts: tuple[WeightSource, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """out, in."""
        return self.base.shape

    @property
    def others(self) -> tuple[WeightSource, ...]:
        """The roles that have a task vector: the MLLM, then the experts."""
        return self.mllm, *self.experts

    def load(self, reader: TensorReader) -> LogicalWeight:
        """The same, with all that is read once and kept; see `WeightSource.load`."""
        return replace(
            self,
            base=self.base.load(reader),
            mllm=self.mllm.load(reader),
            experts=tuple(expert.load(reader) for expert in self.experts),
        )

    @property
    def roles(self) -> tuple[WeightSource, ...]:
        """All roles, the base first."""
        return self.base, *self.others


@dataclass(frozen=True, slots=True)
class MappedWeight:
    """One stored tensor of the MLLM and the logical weights in it.

    Attributes
    ----------
    mllm
        The tensor.
    slices
        The logical weights: one whole, or q, k, v, or gate, up; their rows tile the tensor.
    """

    mllm: TensorSpec
    slices: tuple[LogicalWeight, ...]

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """Every tensor that is read to merge it, each once."""
        roles = (source for rows in self.slices for source in rows.roles)
        return tuple(dict.fromkeys(spec for source in roles for spec in source.stored))


@dataclass(frozen=True, slots=True)
class Coverage:
    """What will be merged, and what the caller should know about it.

    Attributes
    ----------
    weights
        In the order of the MLLM's tensors.
    left_out
        With `allow_partial`, a line for each in-scope weight that could not be mapped.
    prefixes
        Where each role's language model was found, by role: "base", "mllm", "expert 1", ...
    warnings
        Sentences about what may cost quality.
    """

    weights: tuple[MappedWeight, ...]
    left_out: tuple[str, ...]
    prefixes: Mapping[str, str]
    warnings: tuple[str, ...]


def map_roles(
    base: Checkpoint,
    mllm: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    allow_partial: bool = False,
) -> Coverage:
    """Maps every in-scope weight of the base, or says why that cannot be done.

    In scope are the 2-D weights of attention and feed-forward layers, experts of a mixture
    included; norms, biases, routers, embeddings and everything outside the language model are not.

    Parameters
    ----------
    base
        The language model that the others were tuned from.
    mllm
        The multimodal model.
    experts
        Language models tuned from `base`, or adapters of it.
    allow_partial
        Leave out what does not map, instead of raising.

    Raises
    ------
    CoverageError
        A weight has no counterpart of its shape in some role, the roles have different heads, the
        language model cannot be told from other parts, or nothing maps at all.
    """
    others = {"mllm": mllm} | {f"expert {n}": each for n, each in enumerate(experts, start=1)}
    whole = {role: each for role, each in others.items() if each.adapter is None}
    found = locate(base, whole)
    faults = Faults()
    for role, decoder in found.items():
        faults.check_decoder(role, decoder, found["base"])
    adapters = {
        role: map_adapter(role, each, base, found["base"], faults)
        for role, each in others.items()
        if each.adapter is not None
    }
    mapped: dict[str, MappedWeight] = {}
    unsplit: Counter[str] = Counter()
    for key, spec in found["base"].weights.items():
        rows: dict[str, Rows | None] = {}
        for role, each in others.items():
            if role in adapters:
                rows[role] = partial(adapters[role].rows, key, spec)
                continue
            twin = faults.counterpart(role, found[role], key, spec, scaled=each.scales)
            rows[role] = None if twin is None else partial(stored_rows, each, twin)
        present = [each for each in rows.values() if each is not None]
        if spec.dtype not in FLOATING and spec.name not in base.scales:
            faults.add("base", key, f"has the dtype {spec.dtype}, which cannot be merged")
        elif len(present) == len(rows):
            parts = _parts(key, spec.shape[0], (base, *whole.values()), unsplit)
            present.insert(0, partial(stored_rows, base, spec))
            slices = _slices(f"layers.{key[0]}.{key[1]}", parts, present)
            target = found["mllm"].weights[key]
            mapped[target.name] = MappedWeight(target, slices)
    if faults.lines and not (allow_partial and mapped):
        roles = {"base": base, **whole}
        raise CoverageError(report(faults, roles, found, mapped=len(mapped)))
    check_heads(base, whole)
    warnings = _scope_warnings(found["base"], found["mllm"], unsplit)
    warnings += [line for each in adapters.values() for line in each.warnings]
    for role, other in others.items():
        warnings += config_warnings(base, other, title(role))
    warnings += tokenizer_warnings(base, {title(role): each for role, each in others.items()})
    return Coverage(
        weights=tuple(mapped[name] for name in mllm.tensors if name in mapped),
        left_out=tuple(faults.lines),
        prefixes=MappingProxyType(
            {role: each.prefix for role, each in found.items()}
            | {role: each.prefix for role, each in adapters.items()}
        ),
        warnings=tuple(warnings),
    )


def stored_rows(checkpoint: Checkpoint, spec: TensorSpec, first: int, count: int) -> WeightSource:
    """Rows [first, first + count) of a checkpoint's tensor, with its scales if it has any."""
    scale = checkpoint.scales.get(spec.name)
    if scale is not None:
        return ScaledRows(spec, scale, first, count)
    return PlainRows(spec, first, count)


def _parts(
    key: Key, rows: int, checkpoints: Sequence[Checkpoint], unsplit: Counter[str]
) -> dict[str, int]:
    """The leaves of the logical weights in a stored matrix of `rows` rows, and their rows."""
    leaf = key[1].rpartition(".")[2]
    parts: dict[str, int] = {leaf: rows}
    if leaf == GATE_UP and rows % 2 == 0:
        parts = {"gate_proj": rows // 2, "up_proj": rows // 2}
    elif leaf == QKV:
        splits = (qkv_rows(checkpoint, rows) for checkpoint in checkpoints)
        split = next((each for each in splits if each is not None), None)
        if split is not None:
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), split, strict=True))
    if leaf in parts and leaf in {GATE_UP, QKV, INTERLEAVED_QKV}:
        unsplit[leaf] += 1
    return parts


def _slices(
    path: str, parts: Mapping[str, int], roles: Sequence[Rows]
) -> tuple[LogicalWeight, ...]:
    """The logical weights that lie one after the other in the tensors of base, MLLM, experts."""
    parent = path.rpartition(".")[0]
    slices, start = [], 0
    for leaf, count in parts.items():
        base, mllm, *experts = (rows(start, count) for rows in roles)
        slices.append(
            LogicalWeight(f"{parent}.{leaf}", start, start + count, base, mllm, tuple(experts))
        )
        start += count
    return tuple(slices)


def _scope_warnings(base: Decoder, mllm: Decoder, unsplit: Counter[str]) -> list[str]:
    """What is merged as one, and what of the language layers is copied although it might matter."""
    warnings = [
        f"{count} fused {leaf} weights are merged as one matrix each, because nothing says which "
        "of their rows belong to which projection."
        for leaf, count in unsplit.items()
    ]
    unknown = list(mllm.unknown)
    surplus = [key for key in mllm.weights if key not in base.weights and key[0] < base.depth]
    for keys, why in (
        (unknown, "are of a kind that is not merged"),
        (surplus, "have no counterpart in the base"),
    ):
        if keys:
            layer, rest = keys[0]
            warnings.append(
                f"{len(keys)} weight matrices of the MLLM's language layers, such as "
                f"layers.{layer}.{rest}, {why}; they are copied as they are."
            )
    return warnings
