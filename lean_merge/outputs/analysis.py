"""An analysis holds the evidence of every weight from which merges are decided, but no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints.jsonfile import to_json
from lean_merge.mapping import LogicalWeight, MappedWeight
from lean_merge.methods import Decision, Evidence, EvidenceMethod, Method, Watching
from lean_merge.methods.plainfacts import plain_portrait, to_plain
from lean_merge.outputs.base import RECIPE, Outcome, Output, ReadRows, Request, register_kind
from lean_merge.outputs.blocks import BlockSink
from lean_merge.outputs.document import ANALYSIS, build_document
from lean_merge.outputs.factors import factor_shapes, factors_layout, write_factors
from lean_merge.outputs.gathered import Gathered
from lean_merge.outputs.recorded import Analysis, open_analysis
from lean_merge.recipe import MergeRecipe
from lean_merge.store import OutputFolder, Shard
from lean_merge.tasks import CopyTask, WeightTask, needs_analysis
from lean_merge.tasks.tiles import STRIP_ELEMENTS, sampled_rows


class EvidenceSink(BlockSink):
    """A sink that keeps facts beside the engine's notes, and factors as blocks.

    Parameters
    ----------
    folder
        Open; it stays unsealed.
    """

    def __init__(self, folder: OutputFolder) -> None:
        super().__init__(folder)
        self._waiting: dict[str, Any] = {}

    def keep(
        self, task: WeightTask, weight: LogicalWeight, decision: Decision, read: ReadRows
    ) -> None:
        """Keep the evidence of one weight, if it was analysed."""
        evidence = decision.evidence
        self._waiting[weight.canonical] = None
        if evidence is not None:
            plain = to_plain(evidence.facts)
            plain["base_norm"] = base_norm(weight, read)
            for expert, portrait in zip(plain["experts"], evidence.portraits, strict=True):
                expert.update(plain_portrait(portrait))
            self._waiting[weight.canonical] = plain
            self._put_factors(weight, evidence)

    def _put_factors(self, weight: LogicalWeight, evidence: Evidence) -> None:
        """Put directions into blocks as rows, so that a few of them can be read alone."""
        every, factors = torch.arange(evidence.facts.stored), evidence.factors
        self._put_rows(f"{weight.canonical}.mllm.vectors", factors.vectors(every))
        for k in range(len(weight.experts)):
            self._put_rows(f"{weight.canonical}.expert{k + 1}.images", factors.images(k, every))

    def _put_rows(self, name: str, columns: Tensor) -> None:
        """Put `columns` [length, r] into a block as rows, a few at a time."""
        length, count = columns.shape
        height = max(1, STRIP_ELEMENTS // length)
        firsts = range(0, count, height)
        rows = (columns[:, first : first + height].T.contiguous() for first in firsts)
        self.put(name, (count, length), rows)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return the engine's note from the folder's journal."""
        result = super().finished(task)
        return result.get("note") if isinstance(result, dict) else None

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Note the facts in the journal too."""
        super().finish(task, {"note": note, "evidence": self._waiting})
        self._waiting = {}


@register_kind
class AnalysisOutput(Output):
    """Facts in analysis.json, and factors in analysis.safetensors.

    Parameters
    ----------
    request
        The request; its methods are replaced by ones that gather evidence.
    """

    name: ClassVar[str] = "analysis"
    in_recipes: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    samples_base: ClassVar[bool] = True
    refuses_strangers: ClassVar[bool] = False
    is_model: ClassVar[bool] = False
    called: ClassVar[str] = "an analysis"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.gathered = Gathered.by(self.recipe)
        self.methods = _watching(request.methods)
        # Nothing is gathered of norms, biases, embeddings and heads.
        self.weights = tuple(w for w in request.weights if any(p.is_matrix for p in w.slices))

    @classmethod
    def check(cls, recipe: MergeRecipe) -> None:
        """Raise RecipeError for a method that gathers no evidence."""
        Gathered.by(recipe)

    @classmethod
    def open(cls, folder: Path, *, own: bool = False) -> Analysis:
        """Open an analysis, and check it as far as its headers and numbers go."""
        return replace(open_analysis(folder), own=own)

    @property
    def bytes_written(self) -> int:
        """Return the most bytes of analysis.safetensors."""
        return _largest_factors(self.weights, self.methods).size

    @property
    def bytes_on_disk(self) -> int:
        """Return the most bytes of that file, and of the blocks that it is made of."""
        largest = _largest_factors(self.weights, self.methods)
        return 2 * largest.size - len(largest.header)

    def sink(self, folder: OutputFolder | None) -> EvidenceSink:
        """Return a sink that keeps the evidence in `folder`."""
        assert folder is not None
        return EvidenceSink(folder)

    def lay_out(self, folder: OutputFolder, tasks: Sequence[WeightTask]) -> None:
        """Write analysis.safetensors from the factors of all weights."""
        groups = (folder.blocks.groups[task.tensor.name] for task in tasks)
        write_factors(
            folder, {name: block for group in groups for name, block in group.blocks.items()}
        )

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write the recipe and analysis.json."""
        methods = {
            name: method.method
            for name, method in self.methods.items()
            if isinstance(method, Watching)
        }
        evidence: dict[str, Any] = {}
        for name in dict.fromkeys(weight.name for weight in outcome.weights):
            evidence |= folder.blocks.groups[name].result["evidence"]
        document = build_document(self.recipe, self.gathered, methods, evidence, outcome)
        folder.write_file(RECIPE, self.recipe.to_yaml().encode())
        folder.write_file(ANALYSIS, to_json(document))


def _watching(methods: Mapping[str, Method[Any]]) -> dict[str, Method[Any]]:
    """Return methods that gather as these do, and keep the evidence."""
    made: dict[int, Method[Any]] = {}
    for method in methods.values():
        if isinstance(method, EvidenceMethod):
            made.setdefault(id(method), Watching(method))
    return {name: made[id(method)] for name, method in methods.items() if id(method) in made}


def _largest_factors(weights: Sequence[MappedWeight], methods: Mapping[str, Method[Any]]) -> Shard:
    """Lay out the factors of these weights with the most directions that they can have."""
    shapes: dict[str, tuple[int, int]] = {}
    for part, method in _looked_at(weights, methods):
        count = method.most_stored(part.shape)
        shapes |= factor_shapes(part.canonical, part.shape, len(part.experts), count)
    return factors_layout(shapes)


def _looked_at(
    weights: Sequence[MappedWeight], methods: Mapping[str, Method[Any]]
) -> Iterator[tuple[LogicalWeight, EvidenceMethod[Any]]]:
    """Yield the weights that are analysed, with the methods that gather their evidence."""
    for weight in weights:
        for part in weight.slices:
            method = methods.get(part.canonical)
            if isinstance(method, Watching):
                method = method.method
            if isinstance(method, EvidenceMethod) and needs_analysis(method, part):
                yield part, method


def base_norm(weight: LogicalWeight, read: ReadRows) -> float:
    """Estimate ||W_0||_F from the first rows, well enough to compare magnitudes."""
    out_features, in_features = weight.shape
    values = read(weight.base, slice(0, sampled_rows(weight.shape)))
    mean = float(values.double().square().mean())
    return math.sqrt(mean * out_features * in_features)
