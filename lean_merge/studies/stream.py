"""Merge in memory, and give whole tensors to the caller, one after another."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from torch import Tensor

from lean_merge.engine import RunResult, early_look, steps
from lean_merge.outputs import stream_kind
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.plan.resources import Resources
from lean_merge.recipe import MergeRecipe


def stream(
    recipe: MergeRecipe, *, resources: Resources | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Merge in memory, and yield the name and the finished tensor of each tensor of the MLLM.

    They have the MLLM's own names and come in the order of its files, each as it is made. A tensor
    is on the CPU, in memory of its own, and belongs to the caller from then on. `resources.memory`
    covers the memory of the engine, including one tensor that is being made, but not the caller's
    tensors. Nothing is written. Leaving the loop early, or closing the iterator, ends the merge.

    Parameters
    ----------
    recipe
        What to merge. The tensors are, byte for byte, those of its `checkpoint` output.
    resources
        Device, memory and threads.

    Raises
    ------
    LeanMergeError
        Errors that show in the headers are raised at once; all others when the tensor is made.
    """
    plan = make_plan(recipe, resources, output=stream_kind())
    early_look(plan)
    return _tensors(plan)


def _tensors(plan: Plan) -> Generator[tuple[str, Tensor], None, None]:
    sink = plan.output.sink(None)
    with closing(steps(plan, sink, RunResult())) as events:
        for event in events:
            yield event.name, sink.take()
