"""A LoRA adapter in PEFT's format, which holds a merge's updates as factors of low rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from lean_merge.checkpoints import TensorReader, TensorSpec
from lean_merge.errors import RecipeError
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Decision
from lean_merge.outputs.adaptercheck import AdapterComparison
from lean_merge.outputs.approximating import approximated
from lean_merge.outputs.base import (
    Outcome,
    ReadRows,
    Request,
    dtype_named,
    register_kind,
)
from lean_merge.outputs.blocks import BlockSink
from lean_merge.outputs.card import adapter_card
from lean_merge.outputs.companions import card_facts, write_report
from lean_merge.outputs.cutting import CuttingOutput, cut_update
from lean_merge.outputs.modules import Modules, RowRuns, modules_of, rows_inside
from lean_merge.outputs.peft import (
    AdapterModule,
    StoredFactors,
    adapter_layout,
    same_rank,
    write_adapter,
)
from lean_merge.sizes import format_size
from lean_merge.store import OutputFolder
from lean_merge.tasks import CopyTask, Truncated, WeightResult, WeightTask

CUT_WARNING = 0.05
"""A warning is given above this share of an update's norm that an adapter's rank cuts off."""


class AdapterSink(BlockSink):
    """A sink that keeps the factors of every update, cut to the rank that the recipe wants.

    Parameters
    ----------
    folder
        The output folder, in whose blocks the factors wait.
    rank
        The recipe's `lora_rank`: a number, or "auto".
    """

    def __init__(self, folder: OutputFolder, rank: int | str) -> None:
        super().__init__(folder)
        self._rank = rank

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> Truncated | None:
        """Cut the update to its rank k, and put B [out, k] and A [k, in] into blocks."""
        update = cut_update(decision, self._rank)
        if update is None:
            return None
        if update.rank:
            out_features, in_features = weight.shape
            self.put(f"{weight.canonical}.b", (out_features, update.rank), update.b())
            self.put(f"{weight.canonical}.a", (update.rank, in_features), update.a())
        return update.truncated


@register_kind
class AdapterOutput(CuttingOutput):
    """An adapter for the MLLM, without any of the MLLM's own tensors.

    Parameters
    ----------
    request
        RecipeError is raised unless all updates are of low rank, or a rank is given to which they
        are cut; and of matrices that a loader puts into modules of their own.
    """

    name: ClassVar[str] = "lora"
    may_be_empty: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    compares: ClassVar[bool] = True

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        rank = self.recipe.lora_rank
        if isinstance(rank, int):
            shapes = {part.canonical: part.shape for each in self.weights for part in each.slices}
            self.methods = approximated(self.methods, shapes, rank)
        for weight in self.weights:
            self._check(weight)
        self._modules: Modules = modules_of(self.mllm, self.weights)

    def _check(self, weight: MappedWeight) -> None:
        """Raise RecipeError for a weight that is no matrix, or whose update has full rank."""
        for part in weight.slices:
            if not part.is_matrix:
                raise RecipeError(
                    f"An adapter cannot hold {part.canonical}: of norms, biases, embeddings and "
                    "heads it has no factors. Give --scope matrices, or write a checkpoint."
                )
        for part in weight.slices:
            method = self.methods.get(part.canonical)
            if method is not None and method.largest_rank(part.shape) is None:
                raise RecipeError(
                    f"The update of {part.canonical} has full rank, which no adapter holds: "
                    f"{self.recipe.merge_method} does not confine it to a few directions. Give "
                    "--lora-rank N for the best approximation of rank N, use ip_merging with "
                    "project among its stages, or write a checkpoint."
                )

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the factors in the file."""
        wanted = self.recipe.out_dtype
        return torch.float32 if wanted == "auto" else dtype_named(wanted)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return warnings for people, in sentences."""
        return self._modules.notes

    def warnings(self, weights: Sequence[WeightResult]) -> list[str]:
        """Warn if a rank that was asked for cuts off a large part of an update."""
        cuts = [each.stored.error for each in weights if isinstance(each.stored, Truncated)]
        large = [error for error in cuts if error > CUT_WARNING]
        if not large:
            return []
        return [
            f"the adapter's rank cuts off up to {max(large):.0%} of the update's norm in "
            f"{len(large)} of {len(cuts)} weights; a larger --lora-rank keeps more"
        ]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what decides the bytes beside recipe and inputs: the names of the modules."""
        return {"modules": self._modules.digest}

    def pieces(self, weight: MappedWeight, part: LogicalWeight) -> list[tuple[str, RowRuns]]:
        """Return the modules that a logical weight lies in by name, with its rows in each."""
        found = []
        for piece in self._modules.pieces[weight.mllm.name]:
            runs = rows_inside(part.row_runs, piece.runs)
            if runs:
                found.append((piece.module, runs))
        return found

    def module(self, name: str) -> AdapterModule:
        """Return the module of this name, without its parts."""
        return AdapterModule(name, *self._modules.sizes[name])

    def modules(
        self,
        weights: Iterable[MappedWeight],
        stored: Callable[[MappedWeight, LogicalWeight], StoredFactors],
    ) -> list[AdapterModule]:
        """Put together all modules that get an update from the factors of each logical weight."""
        parts: dict[str, list[StoredFactors]] = {}
        for weight in weights:
            for part in weight.slices:
                factors = stored(weight, part)
                for name, runs in self.pieces(weight, part) if factors.rank else ():
                    parts.setdefault(name, []).append(replace(factors, runs=runs))
        modules = [replace(self.module(name), parts=tuple(own)) for name, own in parts.items()]
        return same_rank(modules) if self.recipe.lora_uniform_rank else modules

    def _largest_rank(self, part: LogicalWeight) -> int:
        """Return the largest rank that the update of a weight can have."""
        method, rank = self.methods.get(part.canonical), self.recipe.lora_rank
        largest = (method.largest_rank(part.shape) if method else 0) or 0
        return min(largest, rank) if isinstance(rank, int) else largest

    @cached_property
    def _largest(self) -> tuple[AdapterModule, ...]:
        """Return all modules with the largest ranks that they can have."""
        return tuple(
            self.modules(
                self.weights, lambda weight, part: StoredFactors((), self._largest_rank(part))
            )
        )

    @cached_property
    def bytes_written(self) -> int:
        """Return the most bytes of adapter_model.safetensors."""
        return adapter_layout(self._largest, self.dtype).size

    @property
    def bytes_on_disk(self) -> int:
        """Return the most bytes of that file, and of the blocks that it is made of."""
        parts = [part for weight in self.weights for part in weight.slices]
        numbers = sum(sum(part.shape) * self._largest_rank(part) for part in parts)
        return self.bytes_written + 4 * numbers

    def described(self, *, written: int, disk: int) -> str:
        """Return a description for people, in a few words."""
        return (
            f"adapter, at most {format_size(written)} on disk, and {format_size(disk)} while it is "
            "made"
        )

    def sink(self, folder: OutputFolder | None) -> AdapterSink:
        """Return a sink that keeps the factors in `folder`."""
        assert folder is not None
        return AdapterSink(folder, self.recipe.lora_rank)

    def lay_out(self, folder: OutputFolder, tasks: Sequence[WeightTask]) -> None:
        """Write adapter_model.safetensors and adapter_config.json from the kept factors."""
        groups = folder.blocks.groups

        def stored(weight: MappedWeight, part: LogicalWeight) -> StoredFactors:
            blocks = groups[weight.mllm.name].blocks
            a, b = (blocks.get(f"{part.canonical}.{factor}") for factor in "ab")
            return StoredFactors((), 0 if a is None else a.shape[0], a, b)

        write_adapter(
            folder,
            self.modules((task.weight for task in tasks), stored),
            dtype=self.dtype,
            base_model=self.recipe.receiver,
            beside=self._modules.beside,
            task=self._modules.task,
        )

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write the card, recipe and report."""
        card = adapter_card(card_facts(self, outcome))
        folder.write_file("README.md", card.encode())
        write_report(self, folder, outcome)

    def names(self, task: CopyTask | WeightTask) -> tuple[str, ...]:
        """Return the names of a module's factors, which it has if it gets an update."""
        if isinstance(task, CopyTask):
            return ()
        pieces = self._modules.pieces[task.tensor.name]
        modules = [self.module(piece.module) for piece in pieces]
        return tuple(key for module in modules for key in (module.key_a, module.key_b))

    def can_hold(self, names: Set[str]) -> bool:
        """Return whether all are names of possible factors; only a merge tells which there are."""
        modules = map(self.module, self._modules.sizes)
        return names <= {key for module in modules for key in (module.key_a, module.key_b)}

    def comparison(
        self,
        tasks: Sequence[CopyTask | WeightTask],
        *,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> AdapterComparison:
        """Return what compares the factors of the sampled weights with a merge.

        A module is compared as a whole, with all tensors that it is made of.
        """
        tensors: dict[str, list[str]] = {}
        for name, pieces in self._modules.pieces.items():
            for piece in pieces:
                tensors.setdefault(piece.module, []).append(name)
        chosen = {name: names for name, names in tensors.items() if not sampled.isdisjoint(names)}
        return AdapterComparison(
            pieces=self.pieces,
            tensors=chosen,
            modules={name: self.module(name) for name in chosen},
            dtype=self.dtype,
            rank=self.recipe.lora_rank,
            is_padded=self.recipe.lora_uniform_rank,
            stored=stored,
            reader=reader,
        )
