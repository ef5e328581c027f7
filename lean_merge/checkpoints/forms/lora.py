"""Read LoRA adapters as PEFT saves them: their config, factors, and the rows that they add."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints.dtypes import FLOATING, torch_dtype
from lean_merge.checkpoints.forms import Adapter, Change, Form
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.patterns import BoundedPattern, bounded_pattern
from lean_merge.checkpoints.reader import TensorReader
from lean_merge.checkpoints.rows import (
    Buffer,
    Place,
    StoredRows,
    WeightSource,
    fresh_buffer,
    row_block,
)
from lean_merge.errors import CheckpointError, shown

_MERGED = "merge the adapter into its base first (PEFT's merge_and_unload) and pass the result"
_MAX_PATTERNS = 10_000
_MAX_STEPS = 1_000_000
"""Comparisons of modules with patterns, at most; those of real adapters are some thousands."""
_NAME = re.compile(r"[\w.-]*")
# This is far beyond any lora_alpha, and small enough that no quotient of it overflows.
_MAX_NUMBER = 1e30
_WRAPPER = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.weight")
# These leave the base as it is. Others, such as PiSSA, train against a changed base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_VARIANTS = {
    "use_dora": "DoRA, whose magnitudes make the change no product of two factors",
    "layer_replication": "layers replicated, so it fits another model than the base",
    "alora_invocation_tokens": "activated LoRA, which is in force for some tokens only",
    "use_qalora": "QALoRA, whose factors see pooled inputs",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA, which changes the base too",
    "arrow_config": "Arrow routing between adapters",
    "megatron_config": "Megatron's layers",
    "target_parameters": "parameters targeted without a module (target_parameters)",
}


class Lora(Form):
    """The form of folders with an adapter_config.json of the peft_type LORA."""

    def adapter(self, file: Path, config: Mapping[str, Any]) -> LoraAdapter | None:
        """Return the adapter with the entries of the config that decide the numbers.

        Raises
        ------
        CheckpointError
            It is a variant whose change is no product of two factors, or the config makes no sense.
        """

        def fail(fault: str) -> CheckpointError:
            return CheckpointError(f"{file}: {fault}; {_MERGED}.")

        if config.get("peft_type") != "LORA":
            return None
        for key, what in _VARIANTS.items():
            if config.get(key):
                raise fail(f"is made with {what} ({key})")
        start = config.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise fail(
                f"was started from the base's own weights (init_lora_weights {shown(start)}), "
                "so its factors are not the change of the base"
            )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if rank is None or not _is_rank(rank) or alpha is None or not _is_number(alpha):
            raise fail(
                f"states r {shown(rank)} and lora_alpha {shown(alpha)}, which are no rank and no "
                "factor"
            )
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        for key, stated, fits in (
            ("rank_pattern", ranks, _is_rank),
            ("alpha_pattern", alphas, _is_positive),
        ):
            if not isinstance(stated, dict) or not all(map(fits, stated.values())):
                raise fail(f"has a {key} that gives modules no positive numbers")
        if len(alphas) > _MAX_PATTERNS:
            raise fail(f"has an alpha_pattern of {len(alphas)} keys, more than {_MAX_PATTERNS}")
        for key in alphas:
            try:
                module_pattern(key)
            except ValueError as error:
                raise fail(f"has the alpha_pattern {shown(key)}, which {error}") from error
        base = config.get("base_model_name_or_path")
        return LoraAdapter(
            base=base if isinstance(base, str) and base else None,
            alpha=float(alpha),
            alphas=Alphas(alphas),
            ranks=frozenset([rank, *ranks.values()]),
            rslora=bool(config.get("use_rslora")),
        )


FORM = Lora()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def module_pattern(key: str) -> BoundedPattern:
    """Return PEFT's pattern for a key of alpha_pattern, which fits the end of a module's name.

    A key whose only metacharacters are dots repeats nothing, so `re` matches it in a time bounded
    by both lengths. For other keys, which come from strangers too, `re` could take years.

    Raises
    ------
    ValueError
        The key cannot be matched as PEFT does; the message is a predicate with the mend.
    """
    return bounded_pattern(key, f"(.*\\.)?({key})$", is_plain=bool(_NAME.fullmatch(key)))


class Alphas:
    """The alphas that a config gives to modules by patterns, of which the first that fits counts.

    Keys that are plain names are looked up. A dot in them fits any character, so they are kept by
    their length and by where their dots are, of which an adapter has few kinds.

    Raises
    ------
    ValueError
        A key cannot be matched as PEFT does; the message is a predicate with the mend.
    """

    def __init__(self, stated: Mapping[str, float]) -> None:
        self._named: dict[tuple[int, tuple[int, ...]], dict[str, tuple[int, float]]] = {}
        self._others: list[tuple[int, BoundedPattern, float]] = []
        for number, (key, alpha) in enumerate(stated.items()):
            pattern = module_pattern(key)
            if _NAME.fullmatch(key):
                dots = tuple(at for at, each in enumerate(key) if each == ".")
                group = self._named.setdefault((len(key), dots), {})
                group.setdefault(key, (number, float(alpha)))
            else:
                self._others.append((number, pattern, float(alpha)))

    @property
    def steps(self) -> int:
        """Return how many comparisons a module takes; 0 if there are no patterns."""
        return len(self._named) + len(self._others)

    def of(self, module: str) -> float | None:
        """Return the alpha of a module; None if no pattern fits its name."""
        found = [(number, alpha) for number, each, alpha in self._others if each.match(module)]
        for (length, dots), group in self._named.items():
            start = len(module) - length
            if start == 0 or (start > 0 and module[start - 1] == "."):
                end = list(module[start:])
                for at in dots:
                    end[at] = "."
                if (named := group.get("".join(end))) is not None:
                    found.append(named)
        return min(found)[1] if found else None


@dataclass(frozen=True, slots=True)
class LoraAdapter(Adapter):
    """The entries of adapter_config.json that decide the numbers.

    Attributes
    ----------
    base
        The model that it was trained on, as its author named it.
    alpha
        The lora_alpha of modules that no pattern names.
    alphas
        The alphas of modules that patterns name.
    ranks
        Every rank that the config gives to some module.
    rslora
        Whether alpha is divided by sqrt(r) instead of r.
    """

    base: str | None
    alpha: float
    alphas: Alphas
    ranks: frozenset[int]
    rslora: bool

    def changes(
        self, tensors: Mapping[str, TensorSpec]
    ) -> tuple[Mapping[str, LoraChange], Sequence[str]]:
        found: dict[str, dict[str, TensorSpec]] = {}
        rest = []
        for name, spec in tensors.items():
            if ".lora_magnitude_vector" in name:
                raise CheckpointError(
                    f"{spec.file}: tensor {shown(name)} is of DoRA, whose magnitudes make the "
                    f"change no product of two factors; {_MERGED}."
                )
            match = _FACTOR.fullmatch(name)
            if match is None:
                rest.append(name)
                continue
            module = match["module"].removeprefix(_WRAPPER)
            if found.setdefault(module, {}).setdefault(match["factor"], spec) is not spec:
                raise CheckpointError(
                    f"{spec.file}: holds several adapters for {shown(module)}; save one by itself."
                )
        for module, factors in found.items():
            if len(factors) != 2:
                one = next(iter(factors.values()))
                raise CheckpointError(
                    f"{one.file}: tensor {shown(one.name)} lacks its other factor for "
                    f"{shown(module)}; save the adapter again with PEFT."
                )
        if self.alphas.steps * len(found) > _MAX_STEPS:
            raise CheckpointError(
                f"{next(iter(tensors.values())).file.parent}: the alpha_pattern has so many kinds "
                f"of keys that matching them with {len(found)} modules could take for ever; "
                f"{_MERGED}."
            )
        changes = {
            module: LoraChange(module, factors["B"], factors["A"], self)
            for module, factors in found.items()
        }
        return changes, rest

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor by which PEFT multiplies a module's B A of this rank."""
        stated = self.alphas.of(module)
        alpha = self.alpha if stated is None else stated
        return alpha / (math.sqrt(rank) if self.rslora else rank)


class LoraChange(Change):
    """The change scaling * B A of one module, where `left` is B [out, r] and `right` A [r, in]."""

    def __init__(
        self, module: str, left: TensorSpec, right: TensorSpec, config: LoraAdapter
    ) -> None:
        self.tensor = left
        matrices = len(left.shape) == len(right.shape) == 2
        self.shape = (left.shape[0], right.shape[1]) if matrices else None
        self._module, self._right, self._config = module, right, config

    def check(self) -> None:
        """Raise CheckpointError if the factors have no product or no known scaling."""
        left, right, module = self.tensor, self._right, shown(self._module)
        for spec in (left, right):
            if spec.dtype not in FLOATING:
                raise CheckpointError(
                    f"{spec.file}: tensor {shown(spec.name)} has the dtype {spec.dtype}, which "
                    "cannot be merged; save the adapter in float32, bfloat16 or float16."
                )
        if self.shape is None or left.shape[1] != right.shape[0]:
            raise CheckpointError(
                f"{left.file}: the factors of {module} have shapes {list(left.shape)} and "
                f"{list(right.shape)}, which have no product; save the adapter again with PEFT."
            )
        if self._config.alphas.steps and not self._module.isascii():
            raise CheckpointError(
                f"{left.file}: the name of {module} is not ASCII, so it is not sure which "
                f"alpha_pattern fits it; {_MERGED}."
            )
        if right.shape[0] not in self._config.ranks:
            raise CheckpointError(
                f"{left.file}: the factors of {module} have rank {right.shape[0]}, which the "
                "config does not state, so their scaling is not known; pass the adapter's own "
                "config."
            )

    def rows(self, place: Place, onto: WeightSource | None = None) -> LoraRows:
        rank = self._right.shape[0]
        # B has a row for each row of the weight, but fewer columns.
        out, first = place.shape[0], place.first // place.shape[1] * rank
        left = StoredRows(replace(place, tensor=self.tensor, shape=(out, rank), first=first))
        scaling = self._config.scaling(self._module, rank)
        return LoraRows(left, StoredRows(row_block(self._right)), scaling, onto=onto)


@dataclass(frozen=True, slots=True)
class LoraRows(WeightSource):
    """Rows of scaling * B A, where `left` gives rows of B [out, r] and `right` is A [r, in].

    With `onto`, they are added to these rows of a whole weight.
    """

    left: WeightSource
    right: WeightSource
    scaling: float
    onto: WeightSource | None = None
    factors: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)
    """The float32 matrices scaling * B and A, once they are loaded."""

    @property
    def is_difference(self) -> bool:  # type: ignore[override]
        return self.onto is None

    @property
    def in_columns(self) -> bool:
        return self.onto is not None and self.onto.in_columns

    @property
    def name(self) -> str:
        return self.left.name

    @property
    def file(self) -> Path:
        return self.left.file

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self) -> str:
        """Return F32, because a product rounded to 16 bits would no longer have rank r."""
        return "F32"

    @property
    def _read(self) -> tuple[WeightSource, ...]:
        return (self.left, self.right) if self.onto is None else (self.left, self.right, self.onto)

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for each in self._read for spec in each.stored)

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for each in self._read for spec in each.extents)

    @property
    def _factors(self) -> int:
        """Return the bytes of the rows of B and of all of A."""
        return sum(each.nbytes(slice(0, each.shape[0])) for each in (self.left, self.right))

    @property
    def loaded(self) -> int:
        return self._factors + (0 if self.onto is None else self.onto.loaded)

    @property
    def held(self) -> int:
        """Return the bytes of both factors as stored and in float32, and of the whole weight."""
        own = sum(4 * math.prod(each.shape) for each in (self.left, self.right))
        return self._factors + own + (0 if self.onto is None else self.onto.held)

    def load(self, reader: TensorReader) -> LoraRows:
        left, right = (_whole(each, reader) for each in (self.left, self.right))
        onto = None if self.onto is None else self.onto.load(reader)
        return replace(self, factors=(left.mul_(self.scaling), right), onto=onto)

    def nbytes(self, rows: slice) -> int:
        """Return the bytes of the whole weight's rows, because the factors are in memory."""
        return 0 if self.onto is None else self.onto.nbytes(rows)

    def scratch(self, count: int) -> int:
        if self.onto is None:
            return 0
        item = torch_dtype(self.onto.dtype).itemsize
        return count * self.shape[1] * item + self.onto.scratch(count)

    def read(self, rows: slice, reader: TensorReader, buffer: Buffer, name: str) -> Tensor:
        """Return the rows of the product, summed over r in float32; `load` comes first."""
        assert self.factors is not None
        left, right = self.factors
        shape = (rows.stop - rows.start, right.shape[1])
        out = torch.mm(left[rows], right, out=buffer(name, shape, torch.float32))
        if self.onto is not None:
            out += self.onto.read(rows, reader, buffer, f"{name} whole")
        return out


def _whole(source: WeightSource, reader: TensorReader) -> Tensor:
    """Return all rows of a factor in float32, in new memory."""
    rows = slice(0, source.shape[0])
    return source.read(rows, reader, fresh_buffer, "factor").to(torch.float32, copy=True)
