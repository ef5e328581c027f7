"""The logical weights of a merge, and the MLLM's stored tensors that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.reader import TensorReader
from lean_merge.checkpoints.rows import DifferenceRows, Place, WeightSource
from lean_merge.mapping.experts import ZeroRows

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


def task_vectors(rows: Mapping[str, WeightSource]) -> tuple[WeightSource, ...]:
    """Return the rows of the experts; those of one with a parent are the difference from it."""
    parents = {role: rows.get(f"parent of {role}") for role in rows if role.startswith("expert ")}
    return tuple(
        rows[role] if parent is None else DifferenceRows(rows[role], parent)
        for role, parent in parents.items()
    )
