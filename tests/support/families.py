"""Small related checkpoints with planted directions, as transformers writes them or by hand.

The right leading singular direction of an expert's task vector lies at cosine `ALIGNED` to the
MLLM's on the weights that `Triple.is_aligned` names, and at a right angle, but for noise, on the
others. Where each role keeps a weight is spelt out here and not taken from the package.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lean_merge import Event, Expert, MergeRecipe, MergeResult, Resources, merge
from support.layouts import Where
from support.oracle import Matrix, Oracle, ip_merging

ALIGNED = 0.8
"""Cosine of the leading right directions of aligned task vectors."""
LEAVES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Slot:
    """One logical weight and where the text models and the MLLM keep it."""

    canonical: str
    in_base: Where
    in_mllm: Where

    @property
    def base(self) -> str:
        """The text models' tensor."""
        return self.in_base.name

    @property
    def mllm(self) -> str:
        """The MLLM's tensor."""
        return self.in_mllm.name


@dataclass(frozen=True)
class Triple:
    """A base, an MLLM and experts of one foundation on the disk, and where their weights are."""

    base: Path
    mllm: Path
    experts: tuple[Path, ...]
    slots: tuple[Slot, ...]
    loader: str = ""

    def is_aligned(self, canonical: str, expert: int = 0) -> bool:
        """Whether the leading directions were planted together; by turns over the experts."""
        return _planted(canonical, expert)

    def recipe(self, *, own: Sequence[Mapping[str, Any]] = (), **options: Any) -> MergeRecipe:
        """A recipe of this triple; what no field of the recipe takes is a parameter."""
        fields = MergeRecipe.__dataclass_fields__
        parameters = {name: options.pop(name) for name in list(options) if name not in fields}
        per_expert = [*own, *[{}] * (len(self.experts) - len(own))]
        return MergeRecipe(
            str(self.base),
            str(self.mllm),
            tuple(
                Expert(str(path), tuple(given.items()))
                for path, given in zip(self.experts, per_expert, strict=True)
            ),
            parameters=tuple(parameters.items()),
            **options,
        )

    def merge(
        self,
        out: Path,
        *,
        threads: int = 1,
        memory: int | None = None,
        overwrite: bool = False,
        resume: bool = True,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> MergeResult:
        """Merge on the CPU; no more is read than the plan says."""
        result = merge(
            self.recipe(**options),
            out,
            resources=Resources(device="cpu", threads=threads, memory=memory),
            overwrite=overwrite,
            resume=resume,
            on_event=on_event,
        )
        check_reads(result.report["bytes"])
        return result


@dataclass(frozen=True)
class Case:
    """One logical weight before and after a merge, in float64."""

    slot: Slot
    base: Matrix
    mllm: Matrix
    experts: tuple[Matrix, ...]
    stored: Tensor

    @property
    def update(self) -> Matrix:
        """What was added, as far as the output's dtype tells."""
        return as_matrix(self.stored) - self.mllm

    def oracle(self, expert: int = 0, **options: Any) -> Oracle:
        """What the method says of it by the book."""
        return ip_merging(self.base, self.mllm, self.experts[expert], **options)


def as_matrix(tensor: Tensor) -> Matrix:
    """A tensor's numbers in float64."""
    return tensor.to(torch.float64).numpy()


def relative_error(found: Matrix, wanted: Matrix) -> float:
    """Frobenius norm of the difference over that of `wanted`."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check_reads(counted: Mapping[str, Any]) -> None:
    """Within the plan's bound; its estimate is too."""
    assert counted["read"] <= counted["read_most"], counted
    assert counted["read_predicted"] <= counted["read_most"], counted


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, found without its index."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def shard_names(folder: Path) -> dict[str, list[str]]:
    """The names of the tensors in each weight file."""
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names[file.name] = sorted(opened.keys())
    return names


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def cases(triple: Triple, result: MergeResult) -> Iterator[Case]:
    """Every logical weight in scope."""
    base, mllm, out = load(triple.base), load(triple.mllm), load(result.path)
    experts = [load(path) for path in triple.experts]
    for slot in triple.slots:
        yield Case(
            slot,
            as_matrix(slot.in_base.get(base)),
            as_matrix(slot.in_mllm.get(mllm)),
            tuple(as_matrix(slot.in_base.get(expert)) for expert in experts),
            slot.in_mllm.get(out),
        )


def rows_of(result: MergeResult, expert: Path | None = None) -> dict[str, dict[str, Any]]:
    """The report's rows of one expert by canonical name."""
    rows = [
        row for row in result.report["weights"] if expert is None or row["expert"] == str(expert)
    ]
    found = {row["weight"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def _planted(canonical: str, expert: int) -> bool:
    """By turns, so that in each family some weights are aligned and some are not."""
    parts = canonical.split(".")
    order = [leaf.split(".")[-1] for leaf in LEAVES].index(parts[-1]) + int(parts[1])
    return (order + expert) % 3 != 2


def _seeded(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def task_vector(
    shape: tuple[int, int], canonical: str, role: int, *, size: float, noise: float = 0.05
) -> Tensor:
    """A task vector of norm about `size`: decaying directions and noise, the first one planted.

    `role` is 0 for the MLLM and the expert's number for experts, counted from 1.
    """
    out_features, in_features = shape
    count = min(8, *shape)
    shared = _orthonormal(in_features, 2 * count + 1, _seeded(canonical, "shared"))
    left = _orthonormal(out_features, count, _seeded(canonical, role, "left"))
    right = shared[:, :count]
    if role:
        right = shared[:, count : 2 * count].clone()
        if _planted(canonical, role - 1):
            right[:, 0] = ALIGNED * shared[:, 0] + (1 - ALIGNED**2) ** 0.5 * shared[:, -1]
    decay = 0.6 ** torch.arange(count)
    low_rank = (left * decay) @ right.T
    random = torch.randn(shape, generator=_seeded(canonical, role, "noise"))
    return size * (low_rank / low_rank.norm() + noise * random / random.norm())


def tune(weight: Tensor, canonical: str, role: int, *, size: float = 0.1) -> Tensor:
    """`weight` [out, in] after the role's tuning; an expert moves farther than the MLLM."""
    norm = float(weight.norm()) * size * (1.5 if role else 1.0)
    return weight + task_vector(tuple(weight.shape), canonical, role, size=norm)


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of eight words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "one", "plus", "two", "is"]
    model = WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


# --- by hand ---------------------------------------------------------------------------------


def write_triple(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    experts: int = 1,
    size: float = 0.1,
    edit: Callable[[str, dict[str, Tensor]], None] | None = None,
) -> Triple:
    """A plain triple whose weights have the given shapes by canonical name.

    `edit` may change a role's tensors before they are saved; a norm is out of scope.
    """
    for number in range(experts + 2):
        role = ("base", "mllm")[number] if number < 2 else f"expert{number - 1}"
        tensors = {"model.norm.weight": torch.full((8,), 1.0 + number, dtype=dtype)}
        for canonical, shape in shapes.items():
            weight = 0.02 * torch.randn(shape, generator=_seeded(canonical, "base"))
            if number:
                weight = tune(weight, canonical, number - 1, size=size)
            tensors[f"model.{canonical}.weight"] = weight.to(dtype)
        if edit is not None:
            edit(role, tensors)
        (folder / role).mkdir(parents=True)
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}
        (folder / role / "config.json").write_text(json.dumps(config))
    slots = tuple(
        Slot(canonical, Where(f"model.{canonical}.weight"), Where(f"model.{canonical}.weight"))
        for canonical in shapes
    )
    paths = tuple(folder / f"expert{n}" for n in range(1, experts + 1))
    return Triple(folder / "base", folder / "mllm", paths, slots)


SMALL = {"layers.0.self_attn.q_proj": (96, 64), "layers.0.mlp.gate_proj": (64, 80)}
"""Shapes that are analysed exactly; expert 1 is aligned on both, expert 2 on q_proj alone."""
SKETCHED = {"layers.0.self_attn.q_proj": (528, 560), "layers.0.self_attn.v_proj": (560, 528)}
"""Shapes that take the sketched path; v_proj is not aligned."""

__all__ = [
    "ALIGNED",
    "SKETCHED",
    "SMALL",
    "Case",
    "Slot",
    "Triple",
    "cases",
    "contents",
    "load",
    "relative_error",
    "replace",
    "rows_of",
    "shard_names",
    "write_triple",
]
