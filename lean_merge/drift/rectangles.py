"""Find the rectangles of stored tensors that hold the rows of one logical weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lean_merge.checkpoints import Place

Box = Sequence[tuple[int, int]]
"""The part of a tensor that one process holds: (start, stop) of each dimension."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle of a stored tensor that holds rows of a logical weight [out, in].

    Attributes
    ----------
    matrix
        Its index along the first dimension of a stack; None where the tensor is a matrix.
    turned
        Whether the rows are stored as columns.
    start
        The index of its first row among the rows of that matrix, or among its columns if `turned`.
    first, stop
        The rows of the logical weight that it holds.
    left, right
        The columns of the logical weight that it holds.
    """

    matrix: int | None
    turned: bool
    start: int
    first: int
    stop: int
    left: int
    right: int

    def of(self, tensor: Tensor, box: Box) -> Tensor:
        """Return the rectangle as a view [stop - first, right - left] of the part `box`."""
        if self.matrix is not None:
            tensor, box = tensor[self.matrix - box[0][0]], box[1:]
        along, across = (box[1], box[0]) if self.turned else box
        matrix = tensor.T if self.turned else tensor
        start = self.start - along[0]
        rows = matrix[start : start + self.stop - self.first]
        return rows[:, self.left - across[0] : self.right - across[0]]


def blocks_of(place: Place, box: Box | None = None) -> tuple[Rectangle, ...]:
    """Return the rectangles that hold a logical weight, in the order of its rows.

    Parameters
    ----------
    place
        The weight's place in a stored tensor of two or three dimensions.
    box
        Only what lies in this part of the tensor is wanted; by default all of it.
    """
    out, columns = place.shape
    *lead, height, width = place.tensor.shape
    found = []
    if place.width:
        matrix, start = divmod(place.first, height * width)
        found.append(Rectangle(matrix if lead else None, True, start, 0, out, 0, columns))
    else:
        for first in range(0, out, place.run):
            row = place.first // columns + first // place.run * place.period
            matrix, start = divmod(row, height)
            stop = min(out, first + place.run)
            found.append(Rectangle(matrix if lead else None, False, start, first, stop, 0, columns))
    if box is None:
        return tuple(found)
    return tuple(cut for each in found if (cut := _inside(each, box)) is not None)


def _inside(block: Rectangle, box: Box) -> Rectangle | None:
    if block.matrix is not None:
        if not box[0][0] <= block.matrix < box[0][1]:
            return None
        box = box[1:]
    (low, high), (left, right) = (box[1], box[0]) if block.turned else box
    start, stop = max(block.start, low), min(block.start + block.stop - block.first, high)
    left, right = max(block.left, left), min(block.right, right)
    if start >= stop or left >= right:
        return None
    first = block.first + start - block.start
    return Rectangle(block.matrix, block.turned, start, first, first + stop - start, left, right)
