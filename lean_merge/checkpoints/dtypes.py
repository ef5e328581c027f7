"""The dtypes of the safetensors format, with their names, sizes and torch dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

import torch

# The rows are in the format's own rank, by which `save_file` lays tensors out in descending order.
_TABLE: tuple[tuple[str, int, torch.dtype | None], ...] = (
    ("BOOL", 8, torch.bool),
    # Shapes of sub-byte dtypes count elements, but torch's packed dtypes count bytes.
    ("F4", 4, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, torch.uint8),
    ("I8", 8, torch.int8),
    ("F8_E5M2", 8, torch.float8_e5m2),
    ("F8_E4M3", 8, torch.float8_e4m3fn),
    ("F8_E8M0", 8, getattr(torch, "float8_e8m0fnu", None)),
    ("F8_E4M3FNUZ", 8, torch.float8_e4m3fnuz),
    ("F8_E5M2FNUZ", 8, torch.float8_e5m2fnuz),
    ("I16", 16, torch.int16),
    ("U16", 16, torch.uint16),
    ("F16", 16, torch.float16),
    ("BF16", 16, torch.bfloat16),
    ("I32", 32, torch.int32),
    ("U32", 32, torch.uint32),
    ("F32", 32, torch.float32),
    ("C64", 64, torch.complex64),
    ("F64", 64, torch.float64),
    ("I64", 64, torch.int64),
    ("U64", 64, torch.uint64),
)

ITEM_BITS = MappingProxyType({name: bits for name, bits, _ in _TABLE})
"""Bits of one element, by safetensors dtype name."""

LAYOUT_RANK = MappingProxyType({row[0]: rank for rank, row in enumerate(_TABLE)})
"""The rank by which `safetensors.save_file` orders tensors, the highest first."""

FLOATING = frozenset({"F16", "BF16", "F32"})
"""The dtypes whose tensors are merged; tensors of other dtypes are only copied."""

_TORCH = {name: dtype for name, _, dtype in _TABLE}
_NAMES = {dtype: name for name, dtype in _TORCH.items() if dtype is not None}
_BY_TORCH_NAME = {str(dtype): name for dtype, name in _NAMES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of the safetensors dtype `name`.

    Raises
    ------
    ValueError
        The format has no such dtype, or torch has no equivalent.
    """
    dtype = _TORCH.get(name)
    if dtype is None:
        raise ValueError(f"torch has no dtype for the safetensors dtype {name!r}.")
    return dtype


def common_dtype(names: Iterable[str]) -> torch.dtype:
    """Return the dtype that holds the differences of tensors stored in these floating dtypes.

    The difference of two close bfloat16 (or float16) numbers is exact in the same format
    (Sterbenz), so a common format is kept; different formats are widened to float32.
    """
    distinct = set(names)
    return torch_dtype(distinct.pop()) if len(distinct) == 1 else torch.float32


def safetensors_dtype(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype. Raises ValueError if the format has none."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"The safetensors format has no dtype for {dtype}.") from None


def dtype_by_torch_name(name: str) -> str | None:
    """Return the safetensors name of the dtype that torch prints as `name`; None if it has none."""
    return _BY_TORCH_NAME.get(name)


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Return the bytes of a tensor; None if its bits do not fill whole bytes.

    Parameters
    ----------
    dtype
        A safetensors dtype name, a key of `ITEM_BITS`.
    shape
        The lengths of its dimensions, none negative.
    """
    bits = ITEM_BITS[dtype]
    for length in shape:
        bits *= length
    return None if bits % 8 else bits // 8
