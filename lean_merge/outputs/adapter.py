"""A LoRA adapter in PEFT's format, which holds a merge's updates as factors of low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
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
    REPORT,
    Outcome,
    Output,
    ReadRows,
    Request,
    dtype_named,
    register_kind,
)
from lean_merge.outputs.blocks import BlockSink
from lean_merge.outputs.card import adapter_card
from lean_merge.outputs.companions import card_facts, write_report
from lean_merge.outputs.cutting import cut_update, cutting_bytes
from lean_merge.outputs.modulenames import module_name
from lean_merge.outputs.peft import AdapterModule, StoredFactors, adapter_layout, write_adapter
from lean_merge.sizes import format_size
from lean_merge.store import BlockGroup, OutputFolder
from lean_merge.tasks import CopyTask, Truncated, WeightTask


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
class AdapterOutput(Output):
    """An adapter for the MLLM, without any of the MLLM's own tensors.

    Parameters
    ----------
    request
        RecipeError is raised unless all updates are of low rank, or a rank is given to which they
        are cut; and of matrices that transformers does not stack when it loads them.
    """

    name: ClassVar[str] = "lora"
    may_be_empty: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    most_waiting: ClassVar[int] = 1
    compares: ClassVar[bool] = True

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        rank = self.recipe.lora_rank
        if isinstance(rank, int):
            shapes = {part.canonical: part.shape for each in self.weights for part in each.slices}
            self.methods = approximated(self.methods, shapes, rank)
        for weight in self.weights:
            self._check(weight)

    def _check(self, weight: MappedWeight) -> None:
        """Raise RecipeError for a weight whose update an adapter cannot hold."""
        for part in weight.slices:
            if not part.is_matrix:
                raise RecipeError(
                    f"An adapter cannot hold {part.canonical}: of norms, biases, embeddings and "
                    "heads it has no factors. Give --scope matrices, or write a checkpoint."
                )
        if ".experts." in weight.mllm.name or len(weight.mllm.shape) != 2:
            raise RecipeError(
                f"An adapter cannot hold {weight.mllm.name}: transformers stacks the experts of a "
                "mixture when it loads them, each with a rank of its own. Leave them out with "
                "--exclude experts, or write a checkpoint."
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

    def module(self, weight: MappedWeight, parts: tuple[StoredFactors, ...] = ()) -> AdapterModule:
        """Return the module of a tensor in scope, named as transformers loads it."""
        name = module_name(weight.mllm.name, prefix=self.prefix, config=self.mllm.config)
        return AdapterModule(name, weight.mllm.shape[1], parts)

    @cached_property
    def _largest(self) -> tuple[AdapterModule, ...]:
        """Return all modules with the largest ranks that they can have."""
        rank, modules = self.recipe.lora_rank, []
        for weight in self.weights:
            parts = []
            for part in weight.slices:
                method = self.methods.get(part.canonical)
                largest = (method.largest_rank(part.shape) if method else 0) or 0
                if isinstance(rank, int):
                    largest = min(largest, rank)
                parts.append(StoredFactors(part.row_runs, largest))
            modules.append(self.module(weight, tuple(parts)))
        return tuple(modules)

    @cached_property
    def bytes_written(self) -> int:
        """Return the most bytes of adapter_model.safetensors."""
        return adapter_layout(self._largest, self.dtype).size

    @property
    def bytes_on_disk(self) -> int:
        """Return the most bytes of that file, and of the blocks that it is made of."""
        numbers = sum(module.rank * module.in_features for module in self._largest)
        numbers += sum(part.rows * part.rank for module in self._largest for part in module.parts)
        return self.bytes_written + 4 * numbers

    @staticmethod
    def storing_bytes(rank: int) -> int:
        """Return how many bytes it takes to cut an update of at most `rank`."""
        return cutting_bytes(rank)

    @staticmethod
    def waiting_bytes(update: int, rank: int, kept: int) -> int:
        """Return the bytes of one update, and of cutting it."""
        return update + cutting_bytes(rank)

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
        modules = [
            self.module(
                task.weight,
                tuple(_stored(part, groups[task.tensor.name]) for part in task.weight.slices),
            )
            for task in tasks
            if groups[task.tensor.name].blocks
        ]
        write_adapter(folder, modules, dtype=self.dtype, base_model=self.recipe.receiver)

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write the card, recipe and report."""
        card = adapter_card(**card_facts(self), summary=_summary(outcome.report))
        folder.write_file("README.md", card.encode())
        write_report(self, folder, outcome)

    def names(self, task: CopyTask | WeightTask) -> tuple[str, ...]:
        """Return the names of a module's factors, which it has if it gets an update."""
        if isinstance(task, CopyTask):
            return ()
        module = self.module(task.weight)
        return module.key_a, module.key_b

    def can_hold(self, names: Set[str]) -> bool:
        """Return whether all are names of possible factors; only a merge tells which there are."""
        modules = map(self.module, self.weights)
        return names <= {key for module in modules for key in (module.key_a, module.key_b)}

    def comparison(
        self,
        tasks: Sequence[CopyTask | WeightTask],
        *,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> AdapterComparison:
        """Return what compares the factors of the sampled weights with a merge."""
        return AdapterComparison(
            self.module, self.dtype, self.recipe.lora_rank, stored, reader, sampled
        )


def _stored(weight: LogicalWeight, group: BlockGroup) -> StoredFactors:
    a, b = (group.blocks.get(f"{weight.canonical}.{factor}") for factor in "ab")
    return StoredFactors(weight.row_runs, 0 if a is None else a.shape[0], a, b)


def _summary(report: Mapping[str, Any]) -> str:
    """Return a few sentences for the adapter's card."""
    counts = report["counts"]
    ranks = [row["lora_rank"] for row in report["weights"] if row["lora_rank"]]
    errors = [row["lora_error"] for row in report["weights"] if row["lora_rank"]]
    return (
        f"{counts['merged']} weights of the language model get an update, {counts['unchanged']} "
        f"were in scope but stay as they are. The ranks are {min(ranks)} to {max(ranks)}; they cut "
        f"off at most {max(errors):.1e} of an update's Frobenius norm. `{REPORT}` tells for each "
        "weight what was decided and why."
    )
