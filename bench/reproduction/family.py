"""One trained family: its three models, their task vectors and spectra, and its exams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lean_merge import Expert, MergeRecipe, analyze, stream
from lean_merge.demo.evaluate import load
from lean_merge.demo.run import FAMILY
from reproduction.exam import Exam, Weights

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "bench" / "family" / "seeds"
_IN_SCOPE = re.compile(
    r"(?<!vision_tower\.encoder\.)(layers\.\d+\.(self_attn|mlp)\.\w+_proj)\.weight$"
)


@dataclass(frozen=True)
class Svd:
    """U [out, r], sigma [r], V [in, r] of one task vector, float64."""

    left: Tensor
    sigma: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Svd:
        """The whole decomposition, by LAPACK."""
        left, sigma, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return cls(left, sigma, right.T)


class TaskVectors:
    """Three models of one family, their task vectors and spectra, and merges of them.

    Weights are float32, under their names within the language model.

    Parameters
    ----------
    folder : Path
        Holds ``base``, ``mllm`` and ``expert``.
    base, mllm, expert : mapping of str to Tensor
        The weights in scope of each.
    """

    def __init__(self, folder: Path, base: Weights, mllm: Weights, expert: Weights) -> None:
        self.folder = folder
        self.base, self.mllm, self.expert = dict(base), dict(mllm), dict(expert)

    @cached_property
    def exams(self) -> Mapping[str, Any]:
        """Exams of the MLLM, and of the base's and the expert's text models."""
        raise NotImplementedError

    @cached_property
    def of_mllm(self) -> dict[str, Tensor]:
        """dV of every weight in scope."""
        return {name: self.mllm[name] - self.base[name] for name in self.base}

    @cached_property
    def of_expert(self) -> dict[str, Tensor]:
        """dM of every weight in scope."""
        return {name: self.expert[name] - self.base[name] for name in self.base}

    @cached_property
    def svd_of_mllm(self) -> dict[str, Svd]:
        """The spectra of dV."""
        return {name: Svd.of(matrix) for name, matrix in self.of_mllm.items()}

    @cached_property
    def svd_of_expert(self) -> dict[str, Svd]:
        """The spectra of dM."""
        return {name: Svd.of(matrix) for name, matrix in self.of_expert.items()}

    @cached_property
    def similarity(self) -> dict[str, Tensor]:
        """s_i of every weight, for all i."""
        pairs = {n: (self.svd_of_mllm[n], self.svd_of_expert[n]) for n in self.base}
        return {n: (v.right * m.right).sum(0).abs() for n, (v, m) in pairs.items()}

    @cached_property
    def ratio(self) -> dict[str, float]:
        """lambda of every weight."""
        return {
            n: float(self.svd_of_mllm[n].sigma.sum() / self.svd_of_expert[n].sigma.sum())
            for n in self.base
        }

    def recipe(self, method: str, out_dtype: str = "float32", **parameters: Any) -> MergeRecipe:
        """A recipe on this family's checkpoints."""
        return MergeRecipe(
            base_model=str(self.folder / "base"),
            mllm_model=str(self.folder / "mllm"),
            experts=(Expert(str(self.folder / "expert")),),
            merge_method=method,
            parameters=tuple(parameters.items()),
            out_dtype=out_dtype,
        )

    def merged(self, method: str, out_dtype: str = "float32", **parameters: Any) -> Weights:
        """What lean-merge makes of this family, streamed into memory."""
        return in_scope(stream(self.recipe(method, out_dtype, **parameters)))

    @cached_property
    def update(self) -> dict[str, Tensor]:
        """What IP-Merging at its defaults would add to every weight, were it selected."""
        merged = self.merged("ip_merging", threshold=0.0)
        return {name: merged[name] - start for name, start in self.mllm.items()}

    @cached_property
    def survey(self) -> dict[str, Any]:
        """What `lean-merge analyze` says of thresholds: chance, the gap, and `auto`."""
        with TemporaryDirectory() as folder:
            analysis = analyze(self.recipe("ip_merging"), Path(folder) / "analysis").analysis
        survey: dict[str, Any] = analysis.document["thresholds"][0]
        return survey

    def plus(self, updates: Mapping[str, Tensor]) -> Weights:
        """The MLLM with updates on some of its weights."""
        return added(self.mllm, updates)


class Family(TaskVectors):
    """An embedded family as it was saved.

    Parameters
    ----------
    seed : int
        That of its training.
    problems : int, optional
        Held-out problems for each task; all of them without it.
    """

    def __init__(self, seed: int, *, problems: int | None = None) -> None:
        self.seed = seed
        self._problems = problems
        folder = folder_of(seed)
        self._loaded = {role: load(folder / role) for role in ("base", "mllm", "expert")}
        super().__init__(folder, *(self._weights(role) for role in self._loaded))

    def _weights(self, role: str) -> dict[str, Tensor]:
        model = self._loaded[role][0]
        language_model = getattr(model.model, "language_model", model.model)
        return {k: v.clone() for k, v in in_scope(language_model.state_dict().items()).items()}

    def loaded(self, role: str) -> tuple[Any, Any]:
        """A role's model in float32 with its processor or tokenizer; its exam uses it too."""
        found: tuple[Any, Any] = self._loaded[role]
        return found

    @cached_property
    def exams(self) -> Mapping[str, Exam]:
        """Exams of the MLLM, and of the base's and the expert's text models."""
        return {role: Exam(*pair, count=self._problems) for role, pair in self._loaded.items()}


def folder_of(seed: int) -> Path:
    """Where the checkpoints of a training seed are kept."""
    return FAMILY if seed == 0 else SEEDS / str(seed)


def seeds() -> list[int]:
    """The training seeds that are committed, in order."""
    return [0, *sorted(int(each.name) for each in SEEDS.glob("[0-9]*"))]


def in_scope(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The language model's 2-D weights by their names within it, in float32."""
    found = {}
    for name, tensor in tensors:
        match = _IN_SCOPE.search(name)
        if match:
            found[match[0]] = tensor.float()
    return found


def added(weights: Weights, updates: Mapping[str, Tensor]) -> Weights:
    """Weights with updates on some of them, in float32."""
    return {n: w + updates[n].float() if n in updates else w for n, w in weights.items()}
