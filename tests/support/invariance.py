"""What memory, threads and order must not change, and the smallest memory that a merge takes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lean_merge import BudgetError, MergeResult, Plan, Resources, memory
from lean_merge import plan as make_plan
from lean_merge.methods import leading
from lean_merge.tasks import tiles
from support.families import Triple, contents

NAMED = re.compile(r"the smallest that works is --memory (\d+)MiB\.$")
METHODS: dict[str, dict[str, Any]] = {
    "ip-merging": {},
    "stochastic": {"rounding": "stochastic", "seed": 7},
    "adapter": {"output": "lora"},
    "whole": {"stages": ("select", "rescale")},
    "task-arithmetic": {"merge_method": "task_arithmetic", "symmetric": True, "scale": 0.4},
    "ties": {"merge_method": "ties", "density": 0.3},
    "ties over the model": {"merge_method": "ties", "trim_over": "model"},
    "linear": {"merge_method": "linear"},
    "slerp": {"merge_method": "slerp", "t": 0.3},
    "dare": {"merge_method": "dare_ties", "rescale": "l1"},
    "della": {"merge_method": "della_linear", "seed": 5},
    "breadcrumbs": {"merge_method": "breadcrumbs_ties"},
    "rank_one": {"merge_method": "rank_one", "scale": 0.5},
    "star": {"merge_method": "star", "eta": 0.2},
    "tsv_m": {"merge_method": "tsv_m", "rank": 16},
    "iso_c": {"merge_method": "iso_c"},
    "wudi": {"merge_method": "wudi", "keep": 1.0},
    "optmerge": {"merge_method": "optmerge", "rank": 16},
    "svc": {"merge_method": "svc", "rank": 16},
}
IN_FLOAT32 = ("ties", "slerp", "dare", "breadcrumbs", "iso_c", "wudi")
"""Methods whose task vectors are formed in float32, and tiles of them kept."""
ONE_PASS = ("task-arithmetic", "ties over the model", "linear", "della")
"""Methods that keep no tile resident, so that memory does not change what they read."""


def cut_tiles(patch: pytest.MonkeyPatch, *, tile: int, strip: int) -> None:
    """Set the numbers in a tile and in a strip, and say that the process holds no memory."""
    patch.setattr(tiles, "TILE_ELEMENTS", tile)
    patch.setattr(tiles, "STRIP_ELEMENTS", strip)
    patch.setattr(leading, "WHOLE_BELOW", 96)
    patch.setattr(memory, "usage", lambda: memory.Usage(anonymous=0, file_backed=0))


def smallest_memory(triple: Triple, *, threads: int = 2, **options: Any) -> int:
    """The bytes that BudgetError names, found as a user finds them."""
    given_bytes = 1
    for _ in range(10):
        try:
            make_plan(
                triple.recipe(**options),
                Resources(device="cpu", threads=threads, memory=given_bytes),
            )
        except BudgetError as error:
            found = NAMED.search(str(error))
            assert found, str(error)
            assert int(found[1]) << 20 > given_bytes
            given_bytes = int(found[1]) << 20
        else:
            return given_bytes
    raise AssertionError("the smallest memory is never reached")


def exact_smallest_memory(triple: Triple, **options: Any) -> int:
    """The smallest memory to 64 bytes, between the mebibytes that are named."""
    high = smallest_memory(triple, **options)
    low = high - (1 << 20)
    while high - low > 64:
        middle = (low + high) // 2
        try:
            resources = Resources(device="cpu", threads=2, memory=middle)
            make_plan(triple.recipe(**options), resources)
            high = middle
        except BudgetError:
            low = middle
    return high


def identity(result: MergeResult) -> dict[str, Any]:
    """Everything of an output that must not vary: all files, and the report's decisions."""
    files = contents(result.path)
    report = json.loads(files.pop("lean_merge_report.json"))
    # It holds the report's digest, and tests/store/test_resume.py compares the rest.
    del files["lean_merge_journal.jsonl"]
    return {**files, "weights": report["weights"], "warnings": report["warnings"]}


def residency(plan: Plan) -> list[int]:
    """How many tiles of each weight stay in memory, task vector by task vector."""
    return [count for task in plan.weights for count in task.resident]
