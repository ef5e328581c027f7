"""Show on a terminal how far a command has come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from lean_merge.cli.app import SPEAKS
from lean_merge.engine import Event
from lean_merge.plan import Plan
from lean_merge.sizes import format_size


@contextmanager
def progress(plan: Plan, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """Show a bar of the bytes that are done, and yield the function that receives the events."""
    quiet = quiet or not SPEAKS.get()
    total = sum(task.tensor.nbytes for task in plan.tasks)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:

        def on_event(event: Event) -> None:
            bar.set_postfix_str(f"{event.name[-40:]}{come(plan)}", refresh=False)
            bar.update(event.nbytes)
            if not quiet:
                for line in event.warnings:
                    bar.write(f"warning: {line}", file=sys.stderr)

        yield on_event


def come(plan: Plan) -> str:
    """Tell how much of what travels has come, and how fast; nothing if all inputs are local."""
    if not plan.prediction.travels:
        return ""
    from lean_merge.checkpoints.remote.client import TRAFFIC

    come, rate = format_size(TRAFFIC.received), format_size(TRAFFIC.rate)
    return f", {come} of {format_size(plan.prediction.travels)} came, {rate}/s"
