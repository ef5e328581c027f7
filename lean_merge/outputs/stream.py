"""An output that gives whole tensors in memory to the caller, one after another."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints import as_bytes, torch_dtype
from lean_merge.errors import RecipeError
from lean_merge.outputs.base import Output, Request, Sink, register_kind
from lean_merge.outputs.checkpoint import CheckpointOutput
from lean_merge.recipe import MergeRecipe
from lean_merge.store import OutputFolder, Spans, WriteBytes
from lean_merge.tasks import CopyTask, WeightTask


@register_kind
class StreamOutput(Output):
    """The tensors of a checkpoint, in the order of the MLLM's files; nothing is written.

    Parameters
    ----------
    request
        The facts of the merge. RecipeError is raised if a method's threshold is still unknown.
    """

    name: ClassVar[str] = "stream"
    in_recipes: ClassVar[bool] = False
    needs_folder: ClassVar[bool] = False
    writes_rows: ClassVar[bool] = True
    in_pairs: ClassVar[bool] = False

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        if not all(method.is_settled for method in self.methods.values()):
            raise RecipeError("A stream finds no threshold of its own; give one instead of auto.")

    @classmethod
    def check(cls, recipe: MergeRecipe) -> None:
        """Raise RecipeError unless the recipe asks for a checkpoint, whose tensors these are."""
        if recipe.output != CheckpointOutput.name:
            raise RecipeError(
                f"A stream gives whole tensors, and the recipe asks for output {recipe.output}; "
                "leave output out."
            )

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the largest tensor, which is held while it is made."""
        return max((tensor.nbytes for tensor in self.tensors.values()), default=0)

    def sink(self, folder: OutputFolder | None) -> TensorSink:
        """Return the sink that makes the tensors."""
        return TensorSink()


class TensorSink(Sink):
    """A sink that makes one whole tensor at a time; it must be taken before the next is begun."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def take(self) -> Tensor:
        """Return the tensor of the last task, which is the caller's from now on."""
        assert self._tensor is not None
        tensor, self._tensor = self._tensor, None
        return tensor

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes:
        """Return a function that writes into the tensor, which its first weight creates."""
        if self._tensor is None:
            dtype = torch_dtype(task.tensor.dtype)
            self._tensor = torch.empty(task.tensor.shape, dtype=dtype)
        view = as_bytes(self._tensor)

        def write(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            data, done = data.cast("B"), 0
            for start, length in spans or [(0, data.nbytes)]:
                first = offset + start
                view[first : first + length] = data[done : done + length]
                done += length

        return write
