"""A prior for DRIFT: the update of every weight itself, whole or in factors, beside no model.

`lean_merge.drift` reads it, and docs/formats.md specifies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from lean_merge.checkpoints import TensorReader, TensorSpec
from lean_merge.checkpoints.dtypes import tensor_nbytes
from lean_merge.checkpoints.jsonfile import to_json
from lean_merge.drift.prior import (
    PRIOR_DTYPES,
    PRIOR_FILE,
    scale_shape,
    tensor_shapes,
)
from lean_merge.errors import CheckpointError, DataError, RecipeError
from lean_merge.mapping import MappedWeight
from lean_merge.outputs.approximating import Approximating
from lean_merge.outputs.base import Outcome, Output, Request, Sink, register_kind
from lean_merge.outputs.companions import write_report
from lean_merge.outputs.cutting import CuttingOutput
from lean_merge.outputs.priorcheck import PriorComparison
from lean_merge.outputs.priordocument import complete_report, described_prior, described_tensor
from lean_merge.outputs.priornumbers import Span
from lean_merge.outputs.priorsettings import PriorSettings
from lean_merge.outputs.priorsinks import (
    FactorSink,
    WholeSink,
    factor_parts,
    stored_block,
    write_factor,
)
from lean_merge.recipe import MergeRecipe
from lean_merge.sizes import format_size
from lean_merge.store import OutputFolder, OutputTensor, Shard, plan_shards
from lean_merge.tasks import CopyTask, WeightTask
from lean_merge.tasks.tiles import TILE_ELEMENTS, TILE_ROWS

_LARGEST_FLOAT8 = 448.0


@register_kind
class PriorOutput(CuttingOutput):
    """The difference D of every matrix in scope, in safetensors, with prior.json beside it.

    Parameters
    ----------
    request
        RecipeError is raised for what is no matrix.
    """

    name: ClassVar[str] = "prior"
    in_recipes: ClassVar[bool] = False
    forms_updates: ClassVar[bool] = True
    may_be_empty: ClassVar[bool] = False
    is_model: ClassVar[bool] = False
    done: ClassVar[str] = "kept"
    called: ClassVar[str] = "a prior"
    compares: ClassVar[bool] = True
    settings: ClassVar[PriorSettings] = PriorSettings()

    @classmethod
    def command(cls, file: Path, recipe: MergeRecipe, moved: list[str], facts: Any) -> list[str]:
        """Return the words that make it anew; it has options in the place of a recipe."""
        words = ["prior", "--no-resume", "--mllm", recipe.receiver]
        if recipe.mllm_model is not None:
            words += ["--base", recipe.base_model]
        for expert in recipe.experts:
            words += ["--expert", expert.model]
        if any(expert.parameters for expert in recipe.experts):
            for expert in recipe.experts:
                words += ["--weight", f"{dict(expert.parameters).get('weight', 1.0):g}"]
        for name, value in dict(facts["prior"]).items():
            words += [f"--{name}", str(value)]
        for name in ("include", "exclude"):
            words += [each for pattern in getattr(recipe, name) for each in (f"--{name}", pattern)]
        for name in ("allow_partial", "allow_text_mllm", "force"):
            words += [f"--{name.replace('_', '-')}"] if getattr(recipe, name) else []
        return [*words, "--seed", str(recipe.seed), "--shard-size", str(recipe.shard_size)]

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.facts_of: dict[str, dict[str, Any]] = {}
        self.spans = {
            part.canonical: Span.of(part) for weight in self.weights for part in weight.slices
        }
        for weight in self.weights:
            if len(weight.mllm.shape) not in (2, 3):
                raise RecipeError(
                    f"A prior holds matrices and stacks of them, and {weight.mllm.name} is "
                    f"{[*weight.mllm.shape]}; leave it out with --exclude."
                )
            for part in weight.slices:
                if not part.is_matrix:
                    raise RecipeError(
                        f"A prior holds matrices alone, and {part.canonical} is none; give --scope "
                        "matrices."
                    )
        if not self.settings.is_whole:
            ranks = {
                part.canonical: self.settings.largest_rank(part.shape)
                for weight in self.weights
                for part in weight.slices
            }
            made: dict[tuple[int, int], Approximating] = {}
            self.methods = {
                name: made.setdefault((id(method), rank), Approximating(method, rank))
                for name, method in self.methods.items()
                if (rank := ranks.get(name)) is not None
            }

    @cached_property
    def tensors(self) -> Mapping[str, OutputTensor]:
        """Return the MLLM's tensors in scope, in its order, with the dtype of the prior."""
        in_scope = {weight.mllm.name for weight in self.weights}
        names = (name for name in self.mllm.tensors if name in in_scope)
        return {name: self._tensor(name, self.mllm.tensors[name].shape) for name in names}

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str = "") -> OutputTensor:
        dtype = dtype or PRIOR_DTYPES[self.settings.dtype]
        size = tensor_nbytes(dtype, shape)
        assert size is not None
        return OutputTensor(name, dtype, shape, size)

    def _with_scale(self, name: str, shape: tuple[int, ...], dim: int = 0) -> list[OutputTensor]:
        """Return a tensor, and in float8 that of its scales."""
        found = [self._tensor(name, shape)]
        if self.settings.dtype == "float8_e4m3fn":
            found.append(self._tensor(f"{name}.scale", scale_shape(shape, dim), "F32"))
        return found

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Return the files of a whole prior; those of factors depend on their ranks."""
        if not self.settings.is_whole:
            return ()
        dims = {w.mllm.name: self.spans[w.slices[0].canonical].dim for w in self.weights}
        tensors = [
            each
            for name, tensor in self.tensors.items()
            for each in self._with_scale(name, tensor.shape, dims[name])
        ]
        return plan_shards(tensors, shard_size=self.recipe.shard_size)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what decides the bytes beside recipe and inputs."""
        return {"prior": self.settings.to_dict()}

    @cached_property
    def _numbers(self) -> int:
        """The most numbers that all factors have."""
        return sum(
            sum(part.shape) * self.settings.largest_rank(part.shape)
            for weight in self.weights
            for part in weight.slices
        )

    @cached_property
    def bytes_written(self) -> int:
        """Return the most bytes of all weight files."""
        if self.settings.is_whole:
            return sum(shard.size for shard in self.shards)
        tensors = [
            each
            for weight in self.weights
            for name, shape in self.shapes_of(weight, self._ranks(weight, None)).items()
            for each in self._with_scale(name, shape)
        ]
        return sum(shard.size for shard in plan_shards(tensors, shard_size=self.recipe.shard_size))

    @property
    def bytes_on_disk(self) -> int:
        """Return the most bytes of those files, and of the blocks that they are made of."""
        return self.bytes_written + (0 if self.settings.is_whole else 4 * self._numbers)

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the strips through which D passes."""
        widest = max((part.shape[1] for each in self.weights for part in each.slices), default=0)
        factors = max(
            (
                sum(part.shape) * self.settings.largest_rank(part.shape)
                for each in self.weights
                for part in each.slices
            ),
            default=0,
        )
        strips_of = 6 * 4 * max(TILE_ELEMENTS, TILE_ROWS * widest)
        return strips_of if self.settings.is_whole else max(strips_of, 40 * factors)

    def described(self, *, written: int, disk: int) -> str:
        """Return a description for people, in a few words."""
        if self.settings.is_whole:
            return f"prior, {format_size(written)} on disk"
        return (
            f"prior, at most {format_size(written)} on disk, and {format_size(disk)} while it is "
            "made"
        )

    def sink(self, folder: OutputFolder | None) -> Sink:
        """Return a sink that writes D, or keeps its factors, in `folder`."""
        assert folder is not None
        if not self.settings.is_whole:
            return FactorSink(self.settings, folder)
        found = folder.finished
        self.facts_of = {name: found[name]["prior"] for name in self.tensors if name in found}
        return WholeSink(self.settings, self.shards, folder, self.facts_of)

    def _ranks(self, weight: MappedWeight, facts: Mapping[str, Any] | None) -> dict[str, int]:
        """Return the rank of each part of a tensor, or the largest that it can have."""
        return {
            part.canonical: self.settings.largest_rank(part.shape)
            if facts is None
            else facts[part.canonical]["rank"]
            for part in weight.slices
        }

    def rank_of(self, weight: MappedWeight, ranks: Mapping[str, int]) -> int:
        """Return the rank of a tensor's factors: those of the parts of one matrix add up."""
        sums: dict[int | None, int] = {}
        for part in weight.slices:
            matrix = self.spans[part.canonical].matrix
            sums[matrix] = sums.get(matrix, 0) + ranks[part.canonical]
        return max(sums.values())

    def shapes_of(
        self, weight: MappedWeight, ranks: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a tensor's factors by name, from the ranks of its parts."""
        return tensor_shapes(weight.mllm.name, weight.mllm.shape, self.rank_of(weight, ranks))

    def lay_out(self, folder: OutputFolder, tasks: Sequence[WeightTask]) -> None:
        """Write the factors from their blocks, once all ranks are known."""
        if self.settings.is_whole:
            return
        for task in tasks:
            result = folder.blocks.groups[task.tensor.name].result
            self.facts_of[task.tensor.name] = result["prior"]
        self._check_not_zero()
        every = {
            task.tensor.name: self._ranks(task.weight, self.facts_of[task.tensor.name])
            for task in tasks
        }
        tensors = [
            each
            for task in tasks
            for name, shape in self.shapes_of(task.weight, every[task.tensor.name]).items()
            for each in self._with_scale(name, shape)
        ]
        shards: dict[str, Shard] = {}
        for shard in plan_shards(tensors, shard_size=self.recipe.shard_size):
            folder.add(shard)
            shards |= dict.fromkeys(shard.offsets, shard)
        for task in tasks:
            ranks = every[task.tensor.name]
            shapes = self.shapes_of(task.weight, ranks)
            for name, shape in shapes.items():
                stored = partial(stored_block, folder, task.tensor.name, name.rpartition(".")[2])
                parts = factor_parts(task, self.spans, ranks, stored)
                writers = {
                    each: folder.writer(shards[each], each)
                    for each in (name, f"{name}.scale")
                    if each in shards
                }
                write_factor(name, shape, parts, writers, self.settings.dtype)

    def _check_not_zero(self) -> None:
        """Raise DataError if D is zero everywhere, since a prior without a direction is none."""
        parts = [each for facts in self.facts_of.values() for each in facts.values()]
        if any(each["norm"] for each in parts):
            return
        minuend = ", ".join(expert.model for expert in self.recipe.experts)
        other = self.recipe.base_model
        raise DataError(
            f"D is zero in all {len(parts)} weights, for {minuend} equals {other} in all of them, "
            "so that there is nothing to pull along; pass another expert."
        )

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write prior.json, the recipe and the report, in which each weight has its kept share."""
        self._check_not_zero()
        complete_report(outcome.report, self.settings, self.facts_of)
        weights = {}
        for weight in sorted(self.weights, key=lambda each: each.mllm.name):
            facts = self.facts_of[weight.mllm.name]
            rank = (
                None if self.settings.is_whole else self.rank_of(weight, self._ranks(weight, facts))
            )
            weights[weight.mllm.name] = described_tensor(weight, rank, facts, self.spans)
        document = described_prior(self.recipe, self.settings, self.facts_of, weights)
        folder.write_file(PRIOR_FILE, to_json(document))
        write_report(self, folder, outcome)

    def names(self, task: CopyTask | WeightTask) -> tuple[str, ...]:
        """Return the names of the tensors that a task may make."""
        name = task.tensor.name
        found = [name] if self.settings.is_whole else [f"{name}.left", f"{name}.right"]
        if self.settings.dtype == "float8_e4m3fn":
            found += [f"{each}.scale" for each in found]
        return tuple(found)

    def can_hold(self, names: Set[str]) -> bool:
        """Return whether all are names of tensors that a prior of these weights may have."""
        possible = {
            f"{name}{side}{scale}"
            for name in self.tensors
            for side in ("", ".left", ".right")
            for scale in ("", ".scale")
        }
        return names <= possible

    def comparison(
        self,
        tasks: Sequence[CopyTask | WeightTask],
        *,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> PriorComparison:
        """Return what compares the differences of the sampled weights with those stored."""
        return PriorComparison(
            self.settings,
            self.spans,
            self.names,
            self.shapes_of,
            stored=stored,
            reader=reader,
            sampled=sampled,
        )

    @classmethod
    def again(cls, facts: Mapping[str, Any]) -> type[Output]:
        """Return this kind with the settings that the journal's facts tell."""
        told = facts.get("prior")
        if not isinstance(told, dict) or {*told} != {"difference", "rank", "dtype"}:
            raise CheckpointError(
                "The journal does not tell the prior's settings as ours do, so it can only be "
                "verified with --without-inputs."
            )
        return prior_kind(PriorSettings(**told))


def prior_kind(settings: PriorSettings) -> type[PriorOutput]:
    """Return the kind of output that makes a prior with these settings."""
    return type(
        "ConfiguredPrior",
        (PriorOutput,),
        {"settings": settings, "exact": settings.rank == "full"},
    )


__all__ = ["PriorOutput", "prior_kind"]
