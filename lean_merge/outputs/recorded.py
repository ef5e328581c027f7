"""Open a stored analysis again and check it, so that merges can be decided from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import (
    Checkpoint,
    TensorReader,
    TensorSpec,
    as_bytes,
    read_header,
)
from lean_merge.checkpoints.identity import changed_weights, look_at
from lean_merge.checkpoints.jsonfile import parse_object
from lean_merge.checkpoints.safepaths import open_regular, resolved
from lean_merge.errors import CheckpointError, RecipeError, shown
from lean_merge.methods import EvidenceMethod, Factors, Facts
from lean_merge.methods.plainfacts import from_plain
from lean_merge.outputs.document import ANALYSIS, ANALYSIS_VERSION, suggestions_of
from lean_merge.outputs.factors import FACTORS, factor_shapes
from lean_merge.outputs.gathered import FoundThreshold, Gathered

_MAX_DOCUMENT = 1 << 30
_MEND = "analyse the models again with lean-merge analyze"


@dataclass(frozen=True, slots=True)
class Analysis:
    """A complete analysis.

    Attributes
    ----------
    path
        The folder of the analysis.
    document
        The content of analysis.json.
    gathered
        The settings that its evidence depends on beside the inputs.
    sha256
        The digest of analysis.json.
    seen
        What `look_at` told of its files before they were opened.
    own
        Whether a merge made it for itself, and removes it at its end.
    """

    path: Path
    document: dict[str, Any]
    gathered: Gathered
    sha256: str
    _facts: Mapping[str, Facts]
    _tensors: Mapping[str, TensorSpec]
    seen: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    own: bool = False

    def suggested_thresholds(
        self, methods: Mapping[str, EvidenceMethod[Any]]
    ) -> tuple[FoundThreshold, ...]:
        """Return the threshold that these weights' similarities suggest, for each expert."""
        rows = {row["weight"]: row for row in self.document["weights"]}
        known = {name: method for name, method in methods.items() if name in self._facts}
        compared = {n: method.compared(self._facts[n]) for n, method in known.items()}
        suggestions = suggestions_of(rows, compared, len(self.document["experts"]))
        return tuple(FoundThreshold(each.auto, each.explanation) for each in suggestions)

    def facts(self, canonical: str) -> Facts | None:
        """Return the facts of a weight; None if it was not analysed."""
        return self._facts.get(canonical)

    def factors(self, canonical: str) -> Factors:
        """Return the factors of a weight that has facts; they are read when they are asked for."""
        return _FactorsInFile(self._tensors, canonical, self._facts[canonical], self.seen)

    @property
    def warnings(self) -> list[str]:
        """Return the sentences by which the analysis warned of the models."""
        stated = self.document.get("warnings")
        return (
            [each for each in stated if isinstance(each, str)] if isinstance(stated, list) else []
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the facts that tell it from any other, for the journal of a merge from it."""
        return {
            **({"own": True} if self.own else {"sha256": self.sha256}),
            "gathered": self.gathered.to_dict(),
            "environment": self.document["environment"],
        }

    def check_inputs(self, roles: Mapping[str, Checkpoint]) -> None:
        """Raise CheckpointError if the inputs are not those analysed, and name what has changed."""
        change = changed_weights(self.document["inputs"], roles)
        if change is not None:
            raise CheckpointError(
                f"{self.path}: is an analysis of other models, for {change}; {_MEND}, or restore "
                "what was analysed, with its dates."
            )


class _FactorsInFile:
    """The factors of one weight in analysis.safetensors, which implement `Factors`."""

    def __init__(
        self,
        tensors: Mapping[str, TensorSpec],
        canonical: str,
        facts: Facts,
        seen: Mapping[Path, Mapping[str, Any]],
    ) -> None:
        self._tensors, self._canonical, self._facts = tensors, canonical, facts
        self._seen = seen
        self.bytes_read = 0

    def vectors(self, kept: Tensor) -> Tensor:
        """Return the MLLM's right directions with the indices `kept`, as columns."""
        return self._columns("mllm.vectors", kept)

    def images(self, expert: int, kept: Tensor) -> Tensor:
        """Return an expert's images of those directions, as columns."""
        return self._columns(f"expert{expert + 1}.images", kept)

    def _columns(self, name: str, kept: Tensor) -> Tensor:
        """Read the rows with the indices `kept`, and return them as columns."""
        spec = self._tensors[f"{self._canonical}.{name}"]
        rows = torch.empty(kept.numel(), spec.shape[1], dtype=torch.float32)
        with TensorReader(seen=self._seen) as reader:
            for place, index in enumerate(kept.tolist()):
                reader.read_into(spec, index * spec.shape[1] * 4, as_bytes(rows[place]))
            self.bytes_read += reader.bytes_read
        if not bool(torch.isfinite(rows).all()):
            raise CheckpointError(f"{spec.file}: {spec.name} holds NaN or Inf; {_MEND}.")
        return rows.T.contiguous()


def open_analysis(path: str | Path) -> Analysis:
    """Open an analysis folder, and check it as far as its headers and numbers go.

    Raises
    ------
    CheckpointError
        There is no complete analysis, or what it says makes no sense.
    """
    folder = resolved(path)
    there = [each for each in (folder / ANALYSIS, folder / FACTORS) if each.is_file()]
    seen = look_at(folder, there[1:], there[:1])
    data = _content(folder / ANALYSIS)
    document = parse_object(data, file=folder / ANALYSIS, what="the analysis", mend=_MEND)
    try:
        if document.get("version") != ANALYSIS_VERSION:
            raise ValueError(
                f"version {shown(document.get('version'))} is not {ANALYSIS_VERSION}, which this "
                "version of lean-merge reads"
            )
        facts = _facts_of(document)
        gathered = Gathered.from_dict(document.get("gathered"))
        _check_inputs(document.get("inputs"))
        if not isinstance(document.get("environment"), dict):
            raise ValueError("the environment is missing")
    except (ValueError, RecipeError) as error:
        raise CheckpointError(
            f"{folder / ANALYSIS}: is damaged or none of ours ({error}); {_MEND}."
        ) from error
    if not (folder / FACTORS).is_file():
        raise CheckpointError(f"{folder / FACTORS}: is missing; {_MEND}.")
    tensors, _ = read_header(folder / FACTORS)
    _check_tensors(folder / FACTORS, facts, tensors)
    digest = hashlib.sha256(data).hexdigest()
    return Analysis(folder, document, gathered, digest, facts, tensors, seen)


def _content(file: Path) -> bytes:
    try:
        with open_regular(file) as stream:
            data = stream.read(_MAX_DOCUMENT + 1)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}); name the folder of a complete "
            "analysis."
        ) from error
    if len(data) > _MAX_DOCUMENT:
        raise CheckpointError(f"{file}: is larger than any analysis; {_MEND}.")
    return data


def _facts_of(document: Mapping[str, Any]) -> dict[str, Facts]:
    weights, experts = document.get("weights"), document.get("experts")
    if not isinstance(weights, list) or not isinstance(experts, list):
        raise ValueError("weights or experts are no list")
    found: dict[str, Facts] = {}
    for row in weights:
        name = row.get("weight") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise ValueError("a weight has no name")
        if row.get("skipped") is not None:
            continue
        try:
            found[name] = from_plain(row)
        except ValueError as error:
            raise ValueError(f"{shown(name)}: {error}") from error
        if type(row.get("base_norm")) not in (int, float):
            raise ValueError(f"{shown(name)}: base_norm is missing")
        if len(found[name].similarity) != len(experts):
            raise ValueError(f"{shown(name)}: its experts are not {len(experts)}")
    return found


def _check_inputs(entries: Any) -> None:
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError("inputs are no list of roles")
    for entry in entries:
        files = entry.get("files")
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise ValueError("a role has no files")


def _check_tensors(
    file: Path, facts: Mapping[str, Facts], tensors: Mapping[str, TensorSpec]
) -> None:
    for name, own in facts.items():
        wanted = factor_shapes(name, own.shape, len(own.similarity), own.stored)
        for tensor, shape in wanted.items():
            spec = tensors.get(tensor)
            if spec is None or spec.dtype != "F32" or spec.shape != shape:
                raise CheckpointError(
                    f"{file}: {shown(tensor)} is not F32 {[*shape]}, as {ANALYSIS} says; {_MEND}."
                )
