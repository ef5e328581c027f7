"""The accuracy bars of the tests, and how far below them this machine stays.

If the environment variable LEAN_MERGE_BARS names a file, each value that was compared is appended
to it as a line of JSON, for `bench/processors.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def hold(name: str, error: float, bar: float, *about: Any) -> None:
    """Assert that `error` is at most `bar`, and say what it is `about` otherwise."""
    file = os.environ.get("LEAN_MERGE_BARS")
    if file:
        line = {"name": name, "error": float(error), "bar": bar}
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    assert error <= bar, (name, error, bar, *about)


def relative(found: float, wanted: float) -> float:
    """The error of `found` as a share of `wanted`."""
    return abs(found / wanted - 1)
