"""Tell what the making of an output would meet, and touch nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lean_merge.store.journal import start_record
from lean_merge.store.layout import Shard
from lean_merge.store.state import Step, choose, is_complete
from lean_merge.store.storage import explain
from lean_merge.store.workplace import Workplace, beside, check_disk, checked_place


def check_output(
    out: Path,
    shards: Sequence[Shard],
    *,
    inputs: Sequence[Path],
    overwrite: bool,
    run: Mapping[str, Any] | None = None,
    resume: bool = True,
    disk: int = 0,
) -> None:
    """Raise what `OutputFolder.create` would raise, but touch nothing; plans call this."""
    final = checked_place(out, inputs)
    start = start_record(run or {}, shards)
    try:
        if resume and not overwrite and is_complete(final, start):
            return
        step = choose(final, start, overwrite=overwrite, resume=resume)
        if step is not Step.GO_ON:
            new, _ = beside(final)
            check_disk(Workplace(final, new if step is Step.REPLACE else final), start, disk)
    except OSError as error:
        raise explain(final, error) from error
