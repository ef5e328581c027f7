"""Read and write byte sizes as people do: 5GB, 5G, 5GiB, 500MB, 1048576."""

from __future__ import annotations

import re

from lean_merge.errors import RecipeError, shown

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {_prefix: 1000**_power, f"{_prefix}B": 1000**_power}
    _UNITS |= {f"{_prefix}I": 1024**_power, f"{_prefix}IB": 1024**_power}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]{0,3})\s*", re.ASCII)
_LARGEST = 2**63 - 1
"""The largest number of bytes that a file system can address."""


def parse_size(text: str | int) -> int:
    """Return the number of bytes that `text` names, where GB or G is 10^9 and GiB or Gi is 2^30.

    Raises
    ------
    RecipeError
        `text` is no size, is not positive, or is 2^63 bytes or more.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise RecipeError(
                f"{shown(text)} is not a size; write one like 5GB, 2GiB, 500MB or 1048576."
            )
        size = int(float(match[1]) * unit)
    if not 0 < size <= _LARGEST:
        raise RecipeError(f"A size must be positive and below 2^63 bytes, not {shown(text)}.")
    return size


def format_size(count: float) -> str:
    """Return `count` bytes in binary units, as people read them: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
