"""Read a prior, the differences D that DRIFT pulls gradients along, from its folder.

`lean-merge prior` writes such a folder. Only headers are read when it is opened. A difference is
read from the disk each time that it is loaded, so a prior takes no memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, TensorSpec, as_bytes, read_header, torch_dtype
from lean_merge.checkpoints.identity import look_at
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.safepaths import checked_file, resolved
from lean_merge.checkpoints.weightfiles import SAFETENSORS, find_weights, unfinished
from lean_merge.errors import CheckpointError, shown

PRIOR_FILE = "prior.json"
"""The file that tells what a prior holds; it is written last."""
PRIOR_FORMAT = "lean-merge prior"
PRIOR_VERSION = 1
DIFFERENCES = ("expert-mllm", "expert-base")
"""The differences that a prior may hold: W_expert - W_mllm, and W_expert - W_0."""
PRIOR_DTYPES = MappingProxyType({"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"})
"""The dtypes in which a prior may be stored, with the names that safetensors has for them."""
_MAX_DOCUMENT = 1 << 28
_MEND = "make the prior again with lean-merge prior"


@dataclass(frozen=True, slots=True)
class PriorMatrix:
    """A difference as it is, or some of its rows.

    Attributes
    ----------
    matrix : Tensor [out, in], or [experts, *, *] for a stack
        It is laid out as the MLLM's tensor on the disk is.
    """

    matrix: Tensor


@dataclass(frozen=True, slots=True)
class PriorFactors:
    """A difference in factors, D ~ left @ right, which share its singular values as square roots.

    Attributes
    ----------
    left, right : Tensor [out, r], [r, in]; for a stack [experts, *, r], [experts, r, *]
        r may be 0, for a difference of zero.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True)
class PriorPart:
    """One logical weight in a tensor that holds several, such as q of q, k and v.

    Attributes
    ----------
    name : str
        Its canonical name, such as "layers.0.self_attn.q_proj".
    norm, kept : float
        As those of `PriorWeight`, of this part alone.
    matrix : int or None
        Its index along the first dimension of a stack; None where the tensor is no stack.
    dim : int
        0 if its rows are rows of that matrix, 1 if they are columns.
    runs : tuple of (start, stop)
        The indices of its rows along `dim`, in order; it has all of the other dimension.
    """

    name: str
    norm: float
    kept: float
    matrix: int | None
    dim: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PriorWeight:
    """The facts that a prior tells of one tensor of the MLLM.

    Attributes
    ----------
    shape : tuple of int
        The shape of the MLLM's tensor on the disk.
    rank : int or None
        The number of columns of the left factor; None where D is kept whole.
    norm : float
        The Frobenius norm of the whole D, before anything was cut off or rounded.
    kept : float
        The share of its squared norm that is kept, in 0 .. 1; 1 where D is zero.
    parts : tuple of PriorPart
        The logical weights in it, if there are several; else it is empty.
    """

    shape: tuple[int, ...]
    rank: int | None
    norm: float
    kept: float
    parts: tuple[PriorPart, ...] = ()


class Prior:
    """A complete prior on the disk; make one with `Prior.open`.

    Attributes
    ----------
    path : Path
        Its folder.
    weights : Mapping of str to PriorWeight
        What it holds, by the names that the MLLM's tensors have on the disk.
    difference, dtype : str
        One of `DIFFERENCES` and one of `PRIOR_DTYPES`.
    rank : int or str
        The rank that was asked for: a number, "auto" or "full".
    models : Mapping
        The models that it was made from, by role.
    """

    def __init__(
        self, path: Path, document: Mapping[str, Any], tensors: Mapping[str, TensorSpec], seen: Any
    ) -> None:
        self.path = path
        self.weights: Mapping[str, PriorWeight] = MappingProxyType(_weights(document))
        self.difference: str = document["difference"]
        self.dtype: str = document["dtype"]
        self.rank: int | str = document["rank"]
        self.models: Mapping[str, Any] = MappingProxyType(dict(document["models"]))
        self._tensors = tensors
        self._reader = TensorReader(max_files=16, seen=seen)
        self._finite: set[str] = set()

    @classmethod
    def open(cls, folder: str | Path) -> Prior:
        """Open the prior in `folder`, and check everything that its headers tell.

        Raises
        ------
        CheckpointError
            The folder holds no prior, an unfinished one, or one that is damaged or of a version
            that is not known.
        """
        path = resolved(folder)
        file = path / PRIOR_FILE
        if not path.is_dir():
            raise CheckpointError(f"{path}: is no folder; pass one that lean-merge prior made.")
        if any(path.glob("*.partial")):
            raise unfinished(path)
        if not file.is_file():
            raise CheckpointError(
                f"{path}: holds no {PRIOR_FILE}, so it is no finished prior; {_MEND}."
            )
        document = read_object(
            checked_file(path, file), limit=_MAX_DOCUMENT, what="the prior", mend=_MEND
        )
        _check_head(file, document)
        files = find_weights(path, (SAFETENSORS,))
        if files is None:
            raise CheckpointError(
                f"{path}: holds no safetensors file beside {PRIOR_FILE}; {_MEND}."
            )
        seen = look_at(path, files.files)
        tensors: dict[str, TensorSpec] = {}
        for each in files.files:
            tensors |= read_header(each)[0]
        try:
            prior = cls(path, document, tensors, seen)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file}: is damaged or none of ours ({error}); {_MEND}."
            ) from error
        prior._check_tensors()
        return prior

    def close(self) -> None:
        """Close the files; nothing more can be loaded."""
        self._reader.close()

    def load(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        rows: slice | None = None,
    ) -> PriorMatrix | PriorFactors:
        """Read the difference of one tensor.

        Parameters
        ----------
        name
            A key of `weights`.
        device, dtype
            Where the result shall be, and its dtype. On its way to CUDA it passes pinned
            memory, and the copy is ordered on the current stream.
        rows
            The indices along the first dimension that are wanted, without a step; by default all.

        Raises
        ------
        CheckpointError
            A file has changed or holds NaN or Inf.
        """
        weight = self.weights[name]
        count = weight.shape[0]
        first, stop, _ = slice(0, count).indices(count) if rows is None else rows.indices(count)
        wanted = slice(first, max(first, stop))
        if weight.rank is None:
            return PriorMatrix(self._read(name, wanted, device, dtype))
        stack = weight.shape[:-2]
        if not weight.rank:
            height = wanted.stop - wanted.start
            shape = (height, *weight.shape[1:])
            left = torch.zeros(*shape[:-1], 0, device=device, dtype=dtype)
            lead = (height,) if stack else ()
            return PriorFactors(left, torch.zeros(*lead, 0, shape[-1], device=device, dtype=dtype))
        left = self._read(f"{name}.left", wanted, device, dtype)
        whole = slice(0, weight.rank)
        return PriorFactors(
            left, self._read(f"{name}.right", wanted if stack else whole, device, dtype)
        )

    def _read(
        self, name: str, rows: slice, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        spec = self._tensors[name]
        found = self._stored(spec, rows, device).to(dtype)
        if spec.dtype == PRIOR_DTYPES["float8_e4m3fn"]:
            found.mul_(self._stored(self._tensors[f"{name}.scale"], rows, device).to(dtype))
        return found

    def _stored(self, spec: TensorSpec, rows: slice, device: torch.device | str) -> Tensor:
        """Read rows as they are stored; those of a whole tensor are checked once."""
        shape = (rows.stop - rows.start, *spec.shape[1:])
        raw = torch.empty(
            shape,
            dtype=torch_dtype(spec.dtype),
            device="cpu",
            pin_memory=torch.device(device).type == "cuda",
        )
        row = spec.nbytes // spec.shape[0]
        self._reader.read_into(spec, rows.start * row, as_bytes(raw))
        if spec.name not in self._finite and shape == spec.shape:
            if not math.isfinite(float(raw.float().abs().sum())):
                raise CheckpointError(f"{spec.file}: {shown(spec.name)} holds NaN or Inf; {_MEND}.")
            self._finite.add(spec.name)
        return raw.to(device, non_blocking=True)

    def _check_tensors(self) -> None:
        """Raise CheckpointError unless the files hold the tensors that prior.json tells of."""
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, weight in self.weights.items():
            for key, shape in tensor_shapes(name, weight.shape, weight.rank).items():
                wanted[key] = (PRIOR_DTYPES[self.dtype], shape)
                if self.dtype == "float8_e4m3fn":
                    scale = f"{key}.scale"
                    found = self._tensors.get(scale)
                    turned = len(shape) > 2 and found is not None and found.shape[-1] != 1
                    wanted[scale] = ("F32", scale_shape(shape, int(turned)))
        for key, (dtype, shape) in wanted.items():
            spec = self._tensors.get(key)
            if spec is None or (spec.dtype, spec.shape) != (dtype, shape):
                there = "is missing" if spec is None else f"is {spec.dtype} {[*spec.shape]}"
                raise CheckpointError(
                    f"{self.path}: {shown(key)} {there}, and {PRIOR_FILE} tells of {dtype} "
                    f"{[*shape]}; {_MEND}."
                )
        if foreign := self._tensors.keys() - wanted.keys():
            raise CheckpointError(
                f"{self.path}: holds {shown(min(foreign))}, of which {PRIOR_FILE} tells nothing; "
                f"{_MEND}."
            )


def tensor_shapes(
    name: str, shape: tuple[int, ...], rank: int | None
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that hold the difference of one tensor, with their shapes.

    A float8 tensor also has scales, which this does not list.
    """
    if rank is None:
        return {name: shape}
    if not rank:
        return {}
    *stack, out_features, in_features = shape
    return {
        f"{name}.left": (*stack, out_features, rank),
        f"{name}.right": (*stack, rank, in_features),
    }


def scale_shape(shape: tuple[int, ...], dim: int = 0) -> tuple[int, ...]:
    """Return the shape of a float8 tensor's scales: one for each row or, with `dim` 1, column."""
    *stack, height, width = shape
    return (*stack, 1, width) if dim else (*stack, height, 1)


def _check_head(file: Path, document: Mapping[str, Any]) -> None:
    if document.get("format") != PRIOR_FORMAT:
        raise CheckpointError(f"{file}: is no prior of lean-merge; {_MEND}.")
    if document.get("version") != PRIOR_VERSION:
        raise CheckpointError(
            f"{file}: has the version {shown(document.get('version'))}, and this lean-merge reads "
            f"{PRIOR_VERSION}; {_MEND}."
        )
    known = {"difference": DIFFERENCES, "dtype": (*PRIOR_DTYPES,)}
    for key, values in known.items():
        if document.get(key) not in values:
            raise CheckpointError(
                f"{file}: its {key} is {shown(document.get(key))}, not one of "
                f"{', '.join(values)}; {_MEND}."
            )
    if not isinstance(document.get("weights"), dict) or not document["weights"]:
        raise CheckpointError(f"{file}: tells of no weights; {_MEND}.")


def _weights(document: Mapping[str, Any]) -> dict[str, PriorWeight]:
    """Read what prior.json tells of weights. Raises ValueError, TypeError or KeyError."""
    found = {}
    for name, entry in document["weights"].items():
        shape = tuple(_whole(each, 1) for each in entry["shape"])
        if len(shape) not in (2, 3):
            raise ValueError(f"{shown(name)} has {len(shape)} dimensions")
        rank = None if entry["rank"] is None else _whole(entry["rank"], 0)
        parts = tuple(_part(each, shape) for each in entry.get("parts", ()))
        found[name] = PriorWeight(
            shape, rank, _number(entry["norm"]), _number(entry["kept"], 1.0), parts
        )
    return found


def _part(entry: Mapping[str, Any], shape: tuple[int, ...]) -> PriorPart:
    matrix, dim = entry["matrix"], _whole(entry["dim"], 0, 1)
    if (matrix is None) != (len(shape) == 2):
        raise ValueError(f"{shown(entry['name'])} lies in no matrix of its stack")
    if matrix is not None:
        _whole(matrix, 0, shape[0] - 1)
    length = shape[len(shape) - 2 + dim]
    runs = tuple((_whole(a, 0, length), _whole(b, 0, length)) for a, b in entry["runs"])
    if any(start >= stop for start, stop in runs):
        raise ValueError(f"{shown(entry['name'])} has no rows")
    norm, kept = _number(entry["norm"]), _number(entry["kept"], 1.0)
    return PriorPart(str(entry["name"]), norm, kept, matrix, dim, runs)


def _whole(value: Any, least: int, most: int = 1 << 40) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{shown(value)} is no whole number from {least} to {most}")
    return value


def _number(value: Any, most: float = math.inf) -> float:
    if type(value) not in (int, float) or not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{shown(value)} is no share or norm")
    return float(value)
